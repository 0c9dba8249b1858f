"""The door of ``python -m mlx_sink.compare``; what it does is in `mlx_sink.commands`."""

from mlx_sink.commands import options
from mlx_sink.commands.compare.command import PROG, main

if __name__ == "__main__":
    options.run(main, PROG)
