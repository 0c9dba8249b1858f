"""The small model that comes with the package, and a story for it to read."""

from pathlib import Path

NAME = "demo"
FOLDER = Path(__file__).parent
STORY = FOLDER / "story.txt"
