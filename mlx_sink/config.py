"""What a stream keeps: how many first tokens, how many of the newest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, cast

from mlx_sink.errors import ConfigError

DEFAULT_NUM_SINKS = 4
DEFAULT_WINDOW = 1024
DEFAULT_EPOCH = 4096
"""Tokens an epoch lasts unless stated.

The error of a float32 RoPE angle grows with the position: up to here it moves a logit by less
than 1e-4, at 32,768 by 5e-4.
"""

PREFILL_STEP = 2048
"""Tokens of a prompt that are read in one call unless stated, as in mlx-lm."""

NUM_DRAFT_TOKENS = 3
"""Tokens that a draft model guesses at once unless stated, as in mlx-lm's command."""

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
"""As in mlx-lm and MLX."""

RECALL_BLOCKS = (16, 32, 64)
DEFAULT_RECALL_BLOCK = 32
DEFAULT_RECALL_MEMORY = 2_000_000_000
"""Bytes of an archive unless stated."""
RECALL_BITS = 8
"""Bits of what is archived unless stated: nothing measured tells them from the model's dtype."""

ASKED, ALWAYS = "asked", "always"
RECALL_MODES = (ASKED, ALWAYS)


@dataclass(frozen=True, slots=True)
class SinkConfig:
    """Size and shape of the context of an endless stream.

    Token ``t`` attends to the first ``num_sinks`` tokens of the stream and to the newest
    ``window`` tokens, itself included.

    Args:
        num_sinks: First tokens of the stream that are never evicted; at least 0.
        window: Newest tokens that stay visible, the token's own included; at least 1.
        epoch: Tokens after which the positions that RoPE sees start again from 0; at least
            ``num_sinks + window + rollback``. ``None`` means 4096, or that sum if it is more.
            It changes no result beyond rounding; tests make it small.
        rollback: Newest tokens that can be taken back at any time, exactly; at least 0. Each
            costs a slot.
        kv_bits: 8 or 4 to keep keys and values quantised to so many bits, in MLX's affine
            layout; ``None`` for the dtype of the model. Sinks stay in that dtype.
        kv_group_size: Elements of a key or value that share a scale and a bias: 32, 64 or 128.
        k_bits: As ``kv_bits``, for keys alone.
        v_bits: As ``kv_bits``, for values alone.
        recall: Evicted tokens that a token may look up beside what it sees, a multiple of
            ``recall_block``; 0 for none. What is evicted goes to an archive, and every token
            that recalls picks ``recall / recall_block`` blocks of it by its own query. The
            window then begins at the edge of a block, and is up to ``recall_block - 1`` tokens
            longer.
        recall_block: Tokens of a block of the archive: 16, 32 or 64.
        recall_memory: Bytes that the archives of all layers may hold together. The oldest blocks
            are dropped when they are full.
        recall_layers: Layers that recall, by their place in the model; ``None`` for all with
            full attention.
        recall_bits: 8 or 4 to quantise archived keys and values to so many bits; ``None`` for the
            dtype of the model.
        recall_mode: ``"asked"`` if only what is generated recalls, and what is fed as a
            question; ``"always"`` if every token does.

    Raises:
        ConfigError: A value is not an integer or out of range.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks",
    arXiv:2309.17453.
    """

    num_sinks: int = DEFAULT_NUM_SINKS
    window: int = DEFAULT_WINDOW
    epoch: int | None = None
    rollback: int = 0
    kv_bits: int | None = None
    kv_group_size: int = DEFAULT_GROUP_SIZE
    k_bits: int | None = None
    v_bits: int | None = None
    recall: int = 0
    recall_block: int = DEFAULT_RECALL_BLOCK
    recall_memory: int = DEFAULT_RECALL_MEMORY
    recall_layers: tuple[int, ...] | None = None
    recall_bits: int | None = RECALL_BITS
    recall_mode: str = ASKED

    def __post_init__(self) -> None:
        _check_integer("num_sinks", self.num_sinks, at_least=0)
        _check_integer("window", self.window, at_least=1)
        _check_integer("rollback", self.rollback, at_least=0)
        if self.epoch is not None:
            _check_integer("epoch", self.epoch, at_least=1)
            if self.epoch < self.slots:
                parts = "num_sinks + window" + " + recall_block - 1" * (self.recall > 0)
                parts += " + rollback" * (self.rollback > 0)
                raise ConfigError(
                    f"epoch must be at least {parts} ({self.slots}), got {self.epoch}"
                )
        for name, bits in (("kv_bits", self.kv_bits), *self._own_bits):
            if bits is not None:
                _check_choice(name, bits, BITS)
        _check_choice("kv_group_size", self.kv_group_size, GROUP_SIZES)
        given = [name for name, bits in self._own_bits if bits is not None]
        if self.kv_bits is None and len(given) == 1:
            raise ConfigError(f"{given[0]} alone is not supported: give kv_bits for the others")
        self._check_recall()

    def _check_recall(self) -> None:
        _check_integer("recall", self.recall, at_least=0)
        _check_choice("recall_block", self.recall_block, RECALL_BLOCKS)
        _check_integer("recall_memory", self.recall_memory, at_least=1)
        if self.recall % self.recall_block:
            raise ConfigError(
                f"recall must be a multiple of recall_block ({self.recall_block}), "
                f"got {self.recall}"
            )
        if self.recall and self.window < self.recall_block:
            raise ConfigError(
                f"with recall the window must hold a block of {self.recall_block} tokens, "
                f"got {self.window}"
            )
        if self.recall_bits is not None:
            _check_choice("recall_bits", self.recall_bits, BITS)
        if self.recall_mode not in RECALL_MODES:
            raise ConfigError(
                f"recall_mode must be {' or '.join(RECALL_MODES)}, got {self.recall_mode!r}"
            )
        if self.recall_layers is not None:
            _check_layers(self.recall_layers)

    @property
    def _own_bits(self) -> tuple[tuple[str, int | None], ...]:
        return ("k_bits", self.k_bits), ("v_bits", self.v_bits)

    @property
    def bits(self) -> tuple[int | None, int | None]:
        """Bits of keys and of values, the defaults resolved; ``None`` for the model's dtype."""
        k, v = (self.kv_bits if bits is None else bits for _, bits in self._own_bits)
        return k, v

    @property
    def capacity(self) -> int:
        """Tokens that the context of a full cache has: ``num_sinks + window``."""
        return self.num_sinks + self.window

    @property
    def block(self) -> int:
        """Tokens by which the beginning of the window moves: 1 without recall."""
        return self.recall_block if self.recall else 1

    @property
    def seen(self) -> int:
        """Tokens that a token sees at the most, looked up ones included."""
        return self.capacity + self.block - 1 + self.recall

    @property
    def slots(self) -> int:
        """Slots of a full cache: the longest window, and one for each token of `rollback`."""
        return self.capacity + self.block - 1 + self.rollback

    @property
    def spare_blocks(self) -> int:
        """Blocks that an archive holds beyond those looked up: a call's own, and `rollback`'s."""
        return 1 + -(-self.rollback // self.recall_block)

    @property
    def epoch_length(self) -> int:
        """Tokens in an epoch, the default resolved."""
        return max(self.slots, DEFAULT_EPOCH) if self.epoch is None else self.epoch

    def check_context(self, context: int | None) -> None:
        """Raise unless the whole context lies within what the model was trained on.

        Args:
            context: Positions the model was trained on, in tokens; ``None`` when its
                configuration does not say.

        Raises:
            ConfigError: ``num_sinks + window`` exceeds ``context``.
        """
        if context is not None and self.seen > context:
            if self.recall:
                most = context - self.seen + self.window
                fits = most >= self.block
                raise ConfigError(
                    f"num_sinks + window + recall + recall_block - 1 is {self.seen}, more than "
                    f"the {context} tokens the model was trained on: use "
                    + (f"a window of at most {most}, or less recall" if fits else "less recall")
                )
            most = context - self.num_sinks
            remedy = (
                f"use a window of at most {most}"
                if most >= 1
                else f"use fewer than {context} sinks"
            )
            raise ConfigError(
                f"num_sinks + window is {self.capacity}, more than the {context} tokens "
                f"the model was trained on: {remedy}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-ready dictionary, without recall those of recall left out.

        So files that were written before there was recall still say the same.
        """
        values = asdict(self)
        if not self.recall:
            return {name: value for name, value in values.items() if not name.startswith("recall")}
        layers = None if self.recall_layers is None else list(self.recall_layers)
        return values | {"recall_layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SinkConfig:
        """Build a configuration from `to_dict`'s form.

        Raises:
            ConfigError: A key is unknown or a value is out of range.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}: expected {sorted(known)}")
        given = dict(values)
        if isinstance(layers := given.get("recall_layers"), list):
            given["recall_layers"] = tuple(cast("list[int]", layers))
        return cls(**given)

    @classmethod
    def for_context(
        cls,
        context: int | None,
        num_sinks: int | None = None,
        window: int | None = None,
        **others: Any,
    ) -> SinkConfig:
        """Fill in what is left open with the defaults, cut to the model's trained context.

        Args:
            context: Positions the model was trained on, in tokens, or ``None`` if unknown.
            num_sinks: As in the class; ``None`` for 4.
            window: As in the class; ``None`` for 1024, or less where the context is shorter.
            others: Other fields of the class.
        """
        sinks = DEFAULT_NUM_SINKS if num_sinks is None else num_sinks
        config = cls(sinks, DEFAULT_WINDOW if window is None else window, **others)
        if window is not None or context is None or config.seen <= context:
            return config
        return replace(config, window=max(config.block, context - config.seen + config.window))


def _check_integer(name: str, value: object, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} must be an integer, got {value!r}")
    if value < at_least:
        raise ConfigError(f"{name} must be at least {at_least}, got {value}")


def _check_choice(name: str, value: object, choices: tuple[int, ...]) -> None:
    if value not in choices or isinstance(value, bool):
        words = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
        raise ConfigError(f"{name} must be {words}, got {value!r}")


def _check_layers(value: object) -> None:
    if not isinstance(value, tuple) or not value:
        raise ConfigError(f"recall_layers must be a tuple of layers, got {value!r}")
    for layer in cast("tuple[object, ...]", value):
        _check_integer("a layer of recall_layers", layer, at_least=0)
