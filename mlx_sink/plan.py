"""The door of ``python -m mlx_sink.plan``; what it does is in `mlx_sink.commands`."""

from mlx_sink.commands import options
from mlx_sink.commands.plan import PROG, main

if __name__ == "__main__":
    options.run(main, PROG)
