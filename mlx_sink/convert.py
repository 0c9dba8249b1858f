"""The door of ``python -m mlx_sink.convert``; what it does is in `mlx_sink.commands`."""

from mlx_sink.commands import options
from mlx_sink.commands.convert.convert import PROG, main

if __name__ == "__main__":
    options.run(main, PROG)
