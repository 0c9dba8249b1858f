"""Settings for every test, and the table of those that are slow."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Generator, Iterator

import pytest
import slow
from hypothesis import HealthCheck, settings
from slow import Slow

# A stray download would hang a machine without a network, and no test needs one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Points that no run has seen before: some in each run, many in that of all tests.
for name, examples in (("dev", 8), ("ci", 120)):
    settings.register_profile(
        name,
        settings.get_profile("default"),
        max_examples=examples,
        deadline=None,
        derandomize=False,
        suppress_health_check=[HealthCheck.too_slow],
    )

_ARCHITECTURES = """
    deepseek_v3 deepseek_v32 gemma2 gemma3n gpt_oss jamba llama llama4 minicpm3 mixtral
    nemotron-nas phi3 qwen3_next recurrent_gemma
"""
STAND_FOR_THE_REST = tuple(rf"\[{name}\]" for name in _ARCHITECTURES.split())
"""One of each kind: dense, sliding, chunked, latent, sparse, recurrent, learned sinks, lenders."""

ONE_OF_EACH_CHECK = (
    r"\[window one too long",  # Wrong numbers: of the decode kernel, the packed one, and prefill.
    "bias left out",
    "prefill: outputs not faded",
    r"\[dead rows loaded",
    "kv head ignored",
    "slices merged before they are given",
    "a barrier that half the slices skip",
    "a sum that half the lanes skip",
    "more than 32 KB shared",
    "last row not stored",
    "staged tiles taken for device memory",
)
"""A mistake for each thing that may notice it: `Mutation.kind`."""

SLOW = [
    # What some architectures show the others show too.
    Slow("test_every.py", r"\[", ("refused", *STAND_FOR_THE_REST)),
    Slow("test_every_recall.py", r"\[", STAND_FOR_THE_REST),
    Slow("test_every_rollback.py", "nothing|never_come|take_none", STAND_FOR_THE_REST),
    Slow("test_every_tiny.py", "weight|logits|single", STAND_FOR_THE_REST),
    Slow("test_calibrate.py", "test_shares_of_every_architecture", STAND_FOR_THE_REST),
    # Points of a grid, beyond some that have every value of its axes.
    Slow("test_kernel_grid.py", "test_grid", 11),
    Slow("test_kernel_mutations.py", "test_killed", ONE_OF_EACH_CHECK),
    Slow("test_kernel_dispatch.py", "test_a_few_new_tokens", ("plain-2", "plain-8", "softcap-3")),
    Slow("test_kernel_decode.py", "test_strided", ("dims0-2-", "dims1-16-")),
    Slow("test_kernel_decode.py", "test_bytes", ("64, 4, 8", "128, 16, 1", "256, 8", "80, 4")),
    Slow("test_kernel_decode.py", "test_learned_sinks_and_softcap", ("16-1.5-T", "2-None-T")),
    Slow("test_kernel_decode.py", "test_queries", ("1-1", "1-8", "3-2", "3-5")),
    Slow("test_kernel_decode.py", "test_kinds_of_rotation", ("False-24", "True-64", "True-0")),
    Slow("test_kernel_prefill.py", "test_head_dims", ("128-40", "80-33-.*bf", "96-17-.*t16")),
    Slow("test_kernel_prefill.py", "test_learned_sinks_and_softcap", ("float32",)),
    Slow("test_kernel_packed.py", "test_bytes", ("64, 16, 1", "128, 4, 1, 4", "96, 4, 2")),
    Slow("test_kernel_packed.py", "test_head_dims", 3),
    Slow("test_kernel_packed.py", "test_dtypes", ("16-.8.*float32", "1-.4.*t16", "16-.8.*bfl")),
    Slow("test_draft.py", "test_the_text_of_the_model_alone", ("1-greedy", "3-pen", "5-p]")),
    Slow("test_draft.py", "test_breaking_off", (r"\[1]", r"\[4]", r"\[23]")),
    Slow("test_loop.py", "test_same_as_mlx_lm_to_the_last_bit", (r"\[4-", "2048-greedy-]")),
    Slow("test_rollback.py", "follows", (r"llama-\[3", r"smollm3-\[1, 3", r"phi3.*-\[4")),
    Slow("test_rollback.py", "loop_stands", (r"\[0-4", r"\[1-1", "30-3", "31-2", "47-4", "2-0")),
    Slow("test_ring.py", "test_visible_keys_and_distances", ("-2]",)),
    Slow("test_ring_rollback.py", "test_taken_back", ("-1]", "-3]")),
    Slow("test_quantised.py", "rounded", (r"llama-.8, 8", r"qwen3-.4, 4", r"smollm3-.8, 4")),
    Slow("test_quantised.py", "test_cuts_change_no_logits", ("llama-8", "qwen3-4", "smollm3-4")),
    Slow("test_plan.py", "_byte", ("gqa", "chunks", "recurrent and", "latent]", "exp", "lent k")),
    Slow("test_turns.py", "test_an_interrupted_turn", (r"\[0]", r"\[3]", r"\[20]", r"\[63]")),
    Slow("test_transformers_configs.py", "test_the_default_of_a_class_builds", 6),
    Slow("test_transformers_configs.py", "test_fields_under_two_names", ("qwen3_moe", "mellum")),
    Slow(
        "test_plan_and_convert.py",
        "either_key",
        (r"\[dtype-bfloat16-float32", r"\[torch_dtype-bfloat16-float32", "None-float32"),
    ),
    Slow("test_plan_and_convert.py", "test_architectures", ("gemma3n", "gpt_oss-None")),
    Slow("test_quantization.py", "test_what_is_not_read", ("-plan", "bitsandbytes-", "FP8-")),
    Slow("test_folders.py", "test_folders", ("-generate",)),
    Slow("test_budget.py", "test_mlx_holds", ("llama", "gemma", "phi3", "mixtral")),
    # What takes long, or a program that not everyone has.
    Slow("test_compare.py", "test_an_interrupted_run_is_resumed"),
    Slow("test_old_comparisons.py", "test_an_interrupted_run_is_resumed", ("asking",)),
    Slow("test_refusals.py", "that_nothing_loads", (r"\[0-", "9-.*recurrent")),
    Slow("test_tail.py", "test_an_endless_line_takes_no_memory"),
    Slow("test_session.py", "test_half_precision", ("dtype1",)),
    Slow("test_convert.py", "test_killed_at_any_moment"),
    Slow("test_calibrate.py", "test_the_model_inside_has_a_sink"),
    Slow("test_turns.py", "test_killed_again|test_a_small_file_system"),
    Slow("test_loop.py", "test_nothing_grows_in_eight_thousand_tokens"),
    Slow("test_scripts.py", "test_soak_goes_on", (r"\[1-0]",)),
    Slow("test_mutate_package.py", "test_what_the_tests_notice"),
    Slow("test_package.py", "test_a_wheel"),
    Slow("test_kernel_cuda.py", "compile"),
    Slow("test_fuzz.py", "no_input"),
    Slow("test_follow.py", "test_ctrl_c_is_a_normal_end|test_standard_input_is_answered"),
    Slow("test_scripts.py", "test_bench_convert"),
    Slow("test_real_weights.py", "test_perplexity"),
    Slow("test_turns.py", "test_a_disk_that_stays_full"),
    Slow("test_forged_sessions.py", "test_a_turn|test_a_followed_file"),
    Slow("test_two_processes.py", "test_a_killed_command|test_a_comparison"),
    Slow("test_chat_server.py", "that_answers|idle_connection|so_many|a_name_that_is_none"),
    Slow("test_plan_and_convert.py", "test_quantised|test_architectures|test_both_keys"),
    Slow("test_trust.py", "test_commands"),
    Slow("test_readme.py", "test_the_kernel_example|test_the_demo_reads"),
    Slow("test_special_tokens.py", "test_an_answer_that_never_ends"),
    Slow("test_page.py"),
    Slow("test_smollm2.py"),
]
"""What the default set leaves out."""


RUNS_ON_A_CPU = re.compile(
    r"(^|/)test_(host_metal|kernel_|doctor)\w*\.py|test_scripts\.py::test_(measure|sweep)"
)
"""Tests that run the kernels' text on a CPU, or pretend that this machine has a GPU or none."""


def pytest_configure(config: pytest.Config) -> None:
    """Stop where the table is out of date: so that it cannot rot."""
    if gone := slow.gone(SLOW):
        raise pytest.UsageError(f"SLOW in tests/conftest.py names {gone}, which is not there")


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Mark what is slow in a file. Who asks for tests by their names gets them all the same."""
    report = yield
    if isinstance(collector, pytest.Module) and report.passed:
        try:
            marked = slow.among(SLOW, collector.path.name, [item.name for item in report.result])
        except slow.OutOfDateError as error:
            report.outcome, report.longrepr = "failed", f"SLOW in tests/conftest.py: {error}"
            return report
        if not any("::" in argument for argument in collector.config.args):
            for item in report.result:
                if item.name in marked:
                    item.add_marker("slow")
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what runs Metal text on a CPU where Metal itself is."""
    skip = pytest.mark.skip(reason="the Metal runner is for Linux; here the kernels run for real")
    for item in items:
        if sys.platform == "darwin" and RUNS_ON_A_CPU.search(item.nodeid):
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give the tests what a command has at a terminal, and nothing of what this user keeps.

    A shell's background job ignores Ctrl-C, and a program under ``nohup`` ignores SIGHUP. What a
    process ignores its children ignore too, and Python leaves it so.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLX_SINK_KERNEL", raising=False)
        patch.setenv("MLX_SINK_CACHE", str(tmp_path_factory.mktemp("verdicts")))
        yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Attend in blocks of the (indirect) parameter's size, so that a chunk has many."""
    monkeypatch.setattr("mlx_sink.attention.dispatch.BLOCK", request.param)
    return request.param
