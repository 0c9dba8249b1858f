"""The door of ``python -m mlx_sink.doctor``; what it does is in `mlx_sink.commands`."""

from mlx_sink.commands.entry import run

if __name__ == "__main__":
    run("doctor")
