"""Every error that mlx_sink raises; its message is one line that a user can act on."""


class SinkError(ValueError):
    """Base of every error that mlx_sink raises on purpose.

    The message is one line: what was wrong, what it got, what would work.
    """


class ConfigError(SinkError):
    """A setting is out of range, or two settings contradict each other."""


class InputError(SinkError):
    """Text, tokens or a file given as input cannot be used."""


class OutputError(SinkError):
    """A result cannot be written to where it should go."""


class SessionError(SinkError):
    """A saved session is damaged, foreign, or of another model or stream."""


class ModelError(SinkError):
    """A model cannot be found, is damaged, or is incomplete."""


class UnsupportedModelError(SinkError):
    """A model loads, but the contract cannot be kept for it."""


class CacheError(SinkError):
    """A cache was used in a way that would give wrong results."""


class KernelError(SinkError):
    """A kernel was called with arrays that it cannot serve."""


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
