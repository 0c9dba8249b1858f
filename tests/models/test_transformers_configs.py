"""Configurations that transformers writes, of every class of it that mlx-lm has a model for.

The list is generated: transformers' classes, mlx-lm's modules, and the architectures that mlx_sink
supports. Nothing is computed: a model of hundreds of GB costs its list of layers.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.utils import MODEL_REMAPPING
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mlx_sink import ModelError
from mlx_sink.models import architectures
from mlx_sink.models.checkpoints.spelling import for_mlx_lm
from mlx_sink.models.lazy import build, parameters

NO_DEFAULT = {
    "dots1": "its default has no experts",
    "lfm2_moe": "its default has no layer_types",
    "minimax": "transformers' is MiniMax-Text-01, mlx-lm's MiniMax-M2: another model",
    "pixtral": "transformers' is the vision tower alone",
}
"""Classes whose default is no model of mlx-lm's."""

KINDS = [
    kind for kind in CONFIG_MAPPING if MODEL_REMAPPING.get(kind, kind) in architectures.VERIFIED
]


def written(kind: str, **options: Any) -> dict[str, Any]:
    """Return what transformers writes to config.json."""
    return json.loads(CONFIG_MAPPING[kind](**options).to_json_string())


def arguments(config: dict[str, Any]) -> Any:
    """Return mlx-lm's arguments of a configuration, of the text model where it has one."""
    config = config | for_mlx_lm(config)
    model_class, args_class = mlx_lm_utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    return getattr(model, "language_model", model).args


def test_the_list_is_long():
    assert len(KINDS) > 80
    assert NO_DEFAULT.keys() <= set(KINDS)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NO_DEFAULT])
def test_the_default_of_a_class_builds(kind: str):
    assert len(parameters(build(written(kind)))) > 10


@pytest.mark.parametrize("kind", NO_DEFAULT)
def test_what_is_no_model_is_named(kind: str):
    with pytest.raises(ModelError) as caught:
        build(written(kind))
    assert "\n" not in str(caught.value)


def test_experts_and_layers_given():
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
    assert build(written("dots1", **experts))
    layers = ["conv", "full_attention"]
    assert build(written("lfm2_moe", num_hidden_layers=2, layer_types=layers))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NO_DEFAULT])
def test_fields_under_two_names(kind: str):
    """A name that transformers takes, and writes under another: mlx-lm must see its value."""
    config = written(kind)
    _, args_class = mlx_lm_utils._get_classes(config)
    fields = inspect.signature(args_class).parameters
    both = config | for_mlx_lm(config)
    for other, canonical in (CONFIG_MAPPING[kind].attribute_map or {}).items():
        if other in fields and canonical not in fields and canonical in config:
            assert both.get(other) == config[canonical], (other, canonical)


LAYERS = ["sliding_attention", "sliding_attention", "full_attention"] * 2
EVERY_THIRD = {"num_hidden_layers": 6, "layer_types": LAYERS}
LINEAR = ["linear_attention", "linear_attention", "full_attention"] * 2
SMALL = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}

VALUES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "attention bias": ("internlm3", {"attention_bias": True, "mlp_bias": True}, {"bias": True}),
    "experts": ("qwen3_moe", {"num_experts": 7}, {"num_experts": 7}),
    "experts again": ("mellum", {"num_experts": 7}, {"num_experts": 7}),
    "every third": ("gemma3_text", EVERY_THIRD, {"sliding_window_pattern": 3}),
    "every third, command": ("cohere2", EVERY_THIRD, {"sliding_window_pattern": 3}),
    "linear": (
        "qwen3_next",
        {"num_hidden_layers": 6, "layer_types": LINEAR},
        {"full_attention_interval": 3},
    ),
    "head_dim": ("exaone4", SMALL, {"head_dim": 16}),
    "head_dim, falcon": ("falcon_h1", SMALL, {"head_dim": 16}),
    "key heads": ("nemotron", {"num_key_value_heads": None}, {"num_key_value_heads": 48}),
    "letters": (
        "exaone4",
        EVERY_THIRD,
        {"sliding_window_pattern": "LLGLLG"},
    ),
    "no rope": ("granitemoehybrid", {}, {"position_embedding_type": "nope"}),
    "rotary part": (
        "gpt_neox",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 7000.0,
                "partial_rotary_factor": 0.5,
            }
        },
        {"rotary_emb_base": 7000.0, "rotary_pct": 0.5},
    ),
    "dense first": (
        "glm4_moe_lite",
        {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "dense", "sparse"]},
        {"first_k_dense_replace": 2},
    ),
    "window": ("mimo_v2_flash", {"sliding_window": 33}, {"sliding_window_size": 33}),
    "wide": ("mamba2", {"expand": 4, "num_heads": 256}, {"intermediate_size": 16384}),
    "longrope": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 4096,
            }
        },
        {"rope_theta": 10000.0},
    ),
    "vocabulary": ("gemma3", {"text_config": {"vocab_size": 777}}, {"vocab_size": 777}),
    "not tied": (
        "qwen3_vl_moe",
        {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}},
        {"tie_word_embeddings": False},
    ),
    "tied": ("qwen3_vl", {"tie_word_embeddings": True}, {"tie_word_embeddings": True}),
    "own global heads": (
        "gemma4_text",
        {"global_head_dim": 128},
        {"global_head_dim": 128},
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_arrive(case: str):
    """mlx-lm would take a default of its own for most of these, and say nothing."""
    kind, options, expected = VALUES[case]
    args = arguments(written(kind, **options))
    assert dataclasses.is_dataclass(args)
    assert {name: getattr(args, name) for name in expected} == expected


UNEVEN = {
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "full_attention", "sliding_attention"],
}


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("gemma3_text", UNEVEN, "every n-th layer"),
        ("cohere2", UNEVEN, "every n-th layer"),
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 64}}}, "per_layer_config"),
        (
            "glm4_moe_lite",
            {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "dense"]},
            "dense layers at the beginning",
        ),
        ("minimax", {}, "MiniMax-M2"),
        (
            "llama4",
            {"text_config": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]}},
            "no_rope_layers",
        ),
    ],
)
def test_what_cannot_be_said_is_refused(kind: str, options: dict[str, Any], words: str):
    """Another model, built without a word, would be worse."""
    with pytest.raises(ModelError, match=words) as caught:
        for_mlx_lm(written(kind, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "tied"),
    [(["language_model.lm_head.weight"], False), (["language_model.model.norm.weight"], True)],
)
def test_the_weights_tell_whether_embeddings_are_tied(tensors: list[str], tied: bool):
    """Where the two levels disagree: a checkpoint of transformers 4 has been written again."""
    config = {
        "model_type": "mistral3",
        "tie_word_embeddings": not tied,
        "text_config": {"model_type": "mistral", "tie_word_embeddings": tied},
    }
    assert for_mlx_lm(config, tensors) == {}
    config["tie_word_embeddings"], config["text_config"]["tie_word_embeddings"] = tied, not tied
    assert for_mlx_lm(config, tensors)["text_config"]["tie_word_embeddings"] == tied
