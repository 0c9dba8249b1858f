"""``python -m mlx_sink COMMAND``; the console script ``mlx-sink`` is the same."""

from mlx_sink.commands.entry import main

if __name__ == "__main__":
    main()
