"""What a person calls a model: the embedded one, a folder, or a repository on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from mlx_sink.errors import ModelError
from mlx_sink.models import demo

HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
OTHER_KINDS = ("datasets", "spaces", "collections", "papers", "docs", "blog", "models")
"""What is on the hub under a first word of its own, and is no model."""

_WORD = r"[A-Za-z0-9_][\w.-]*"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model is: in a folder, or else in a repository on the hub.

    Attributes:
        folder: The folder.
        repo: The repository, as ``owner/name``.
        revision: Its branch, tag or commit; ``None`` for the main branch.
    """

    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None


def place_of(name: str, revision: str | None = None) -> Place:
    """Say where a model is from what it is called; nothing is downloaded.

    Understood besides paths and ``owner/name``: an address on huggingface.co, ``hf://`` and
    ``owner/name@revision``; a file of a model folder; a folder of the hub's cache.

    Args:
        name: As a person writes it.
        revision: Branch, tag or commit of a repository; what the name itself says is the default.

    Raises:
        ModelError: It is no model's name.
    """
    name = name.strip()
    if name == demo.NAME:
        return Place(demo.FOLDER)
    if not name:
        raise ModelError("a model named '' does not exist: name a folder or a repository")
    for spelled in (name, name.replace("\\", "/")):
        path = _path(spelled)
        if path.is_dir():
            return Place(_snapshot(path))
        if path.exists():
            return Place(_folder_of(path))
    return _repository(name, revision)


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # There is no such user.
        return Path(name)


def _folder_of(file: Path) -> Path:
    """Return the model folder that a file belongs to."""
    if file.suffix == ".gguf":
        raise ModelError(
            f"model {str(file)!r} is a GGUF file, which mlx-lm does not read: "
            "use the repository that it was made from"
        )
    if (file.parent / "config.json").is_file() and file.suffix in (".json", ".safetensors"):
        return file.parent
    raise ModelError(f"model {str(file)!r} is a file: name the folder that holds config.json")


def _snapshot(folder: Path) -> Path:
    """Return the snapshot inside a repository's folder of the hub's cache, or the folder itself."""
    main = folder / "refs" / "main"
    if folder.name.startswith("models--") and main.is_file():
        snapshot = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else folder
    return folder


def _repository(name: str, revision: str | None) -> Place:
    """Read a name that is not that of a file or folder."""
    scheme, is_address, repo = name.partition("://")
    if is_address and scheme.lower() != "hf":
        repo = _of_address(name)
    elif not is_address:
        repo = _of_address(f"https://{name}") if name.split("/")[0] in HOSTS else name
    repo, _, own = repo.rstrip("/").partition("@")
    repo = repo.removesuffix(".git")
    if re.fullmatch(rf"{_WORD}(/{_WORD})?", repo) and not repo.endswith(".json"):
        return Place(repo=repo, revision=revision or own or None)
    raise ModelError(_no_repository(name))


def _of_address(address: str) -> str:
    """Return ``owner/name`` or ``owner/name@revision`` from an address on the hub."""
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").lower()
    except ValueError:
        raise ModelError(f"model {address!r} is no address") from None
    words = [unquote(word) for word in parts.path.split("/") if word]
    if host not in HOSTS:
        raise ModelError(
            f"model {address!r} is an address outside huggingface.co: download it, and name its "
            "folder"
        )
    if not words or words[0] in OTHER_KINDS:
        raise ModelError(f"model {address!r} is an address on the hub, but not that of a model")
    repo = "/".join(words[:2])
    if len(words) > 3 and words[2] in ("tree", "blob", "resolve", "commit"):
        return f"{repo}@{words[3]}"
    return repo


def _no_repository(name: str) -> str:
    """Say what a name looks like that is neither a folder nor a repository."""
    if re.fullmatch(r"(.+/)?[\w.-]+:[\w.-]+", name) and "\\" not in name:
        return (
            f"model {name!r} is spelled as Ollama spells it, whose GGUF files mlx-lm does not read: name "
            "a folder or a repository such as mlx-community/Llama-3.2-3B-Instruct-4bit"
        )
    return (
        f"model folder {name!r} does not exist, nor is it a config.json or the name of a repository"
    )
