"""SinkConfig: what it accepts, what it says when it does not, and its JSON form."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mlx_sink import ConfigError, SinkConfig, SinkError


def test_defaults():
    config = SinkConfig()
    assert (config.num_sinks, config.window, config.epoch) == (4, 1024, None)
    assert config.capacity == 1028


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": -3}, "window must be at least 1, got -3"),
        ({"num_sinks": -1}, "num_sinks must be at least 0, got -1"),
        ({"window": 2.0}, "window must be an integer, got 2.0"),
        ({"window": True}, "window must be an integer, got True"),
        ({"num_sinks": "4"}, "num_sinks must be an integer, got '4'"),
        ({"num_sinks": None}, "num_sinks must be an integer, got None"),
        ({"epoch": 0}, "epoch must be at least 1, got 0"),
        ({"rollback": -1}, "rollback must be at least 0, got -1"),
        ({"rollback": 1.0}, "rollback must be an integer, got 1.0"),
        (
            {"num_sinks": 1, "window": 2, "rollback": 3, "epoch": 5},
            "epoch must be at least num_sinks + window + rollback (6), got 5",
        ),
        ({"kv_bits": 2}, "kv_bits must be 8 or 4, got 2"),
        ({"kv_bits": True}, "kv_bits must be 8 or 4, got True"),
        ({"kv_bits": "8"}, "kv_bits must be 8 or 4, got '8'"),
        ({"kv_bits": 8, "v_bits": 16}, "v_bits must be 8 or 4, got 16"),
        ({"k_bits": 8}, "k_bits alone is not supported: give kv_bits for the others"),
        ({"kv_group_size": 16}, "kv_group_size must be 32, 64 or 128, got 16"),
        ({"epoch": 1.5}, "epoch must be an integer, got 1.5"),
        (
            {"num_sinks": 2, "window": 8, "epoch": 9},
            "epoch must be at least num_sinks + window (10), got 9",
        ),
    ],
)
def test_refuses_in_one_line(settings: dict[str, object], says: str):
    """A setting that cannot keep the contract must not become a config."""
    with pytest.raises(ConfigError) as caught:
        SinkConfig(**settings)
    assert str(caught.value) == says
    assert isinstance(caught.value, SinkError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("settings", [(0, 1), (0, 1, 1), (3, 5, 8), (4, 2**31)])
def test_accepts_the_extremes(settings: tuple[int, ...]):
    config = SinkConfig(*settings)
    assert config.capacity == settings[0] + settings[1]


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (SinkConfig(4, 1024), 4096),
        (SinkConfig(0, 4096), 4096),
        (SinkConfig(1, 4096), 4097),
        (SinkConfig(4, 100_000), 100_004),
        (SinkConfig(1, 2, epoch=3), 3),
        (SinkConfig(4, 4000, rollback=100), 4104),
    ],
)
def test_epoch_length_holds_the_capacity(config: SinkConfig, length: int):
    """A window that spans three epochs would have keys under no known turn."""
    assert config.epoch_length == length


@pytest.mark.parametrize(
    ("settings", "bits"),
    [
        ({}, (None, None)),
        ({"kv_bits": 8}, (8, 8)),
        ({"kv_bits": 4, "k_bits": 8}, (8, 4)),
        ({"kv_bits": 8, "v_bits": 4}, (8, 4)),
        ({"k_bits": 4, "v_bits": 8}, (4, 8)),
    ],
)
def test_bits_of_keys_and_of_values(settings: dict[str, int], bits: tuple[int | None, int | None]):
    assert SinkConfig(**settings).bits == bits


def test_is_frozen_and_comparable():
    config = SinkConfig(1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert config == SinkConfig(num_sinks=1, window=2)
    assert len({config, SinkConfig(1, 2), SinkConfig(1, 3)}) == 2


@pytest.mark.parametrize(
    "config",
    [
        SinkConfig(),
        SinkConfig(0, 7),
        SinkConfig(2, 9, epoch=20, rollback=3),
        SinkConfig(kv_bits=8, v_bits=4, kv_group_size=32),
    ],
)
def test_json_round_trip(config: SinkConfig):
    assert SinkConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_an_unknown_setting():
    with pytest.raises(ConfigError, match=r"unknown setting 'sinks'.*'num_sinks'"):
        SinkConfig.from_dict({"window": 8, "sinks": 4})


def test_from_dict_checks_the_values():
    with pytest.raises(ConfigError, match="window must be at least 1"):
        SinkConfig.from_dict({"window": 0})


@pytest.mark.parametrize(("context", "fits"), [(None, True), (20, True), (21, True), (19, False)])
def test_capacity_within_the_trained_context(context: int | None, fits: bool):
    """Distances reach S + W - 1; beyond the trained context the model answers nonsense."""
    config = SinkConfig(4, 16)
    if fits:
        config.check_context(context)
    else:
        with pytest.raises(ConfigError, match=r"is 20, more than the 19 .* window of at most 15"):
            config.check_context(context)


def test_more_sinks_than_context():
    """No window helps here, so the remedy must be another one."""
    with pytest.raises(ConfigError, match="use fewer than 8 sinks"):
        SinkConfig(8, 1).check_context(8)


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ((None,), SinkConfig(4, 1024)),
        ((4096,), SinkConfig(4, 1024)),
        ((1028,), SinkConfig(4, 1024)),
        ((1027,), SinkConfig(4, 1023)),
        ((512,), SinkConfig(4, 508)),
        ((512, 0), SinkConfig(0, 512)),
        ((512, 100), SinkConfig(100, 412)),
        ((512, None, 64), SinkConfig(4, 64)),
        ((512, 1, 600), SinkConfig(1, 600)),
        ((4, 8), SinkConfig(8, 1)),
    ],
)
def test_defaults_cut_to_the_context(arguments: tuple[int | None, ...], config: SinkConfig):
    """What the user asked for stays (and is refused later); only defaults shrink."""
    assert SinkConfig.for_context(*arguments) == config
