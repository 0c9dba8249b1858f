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
    """Where a model is: on this machine, or else in a repository on the hub.

    Attributes:
        path: Its folder, or a file.
        repo: The repository, as ``owner/name``, or ``name`` where it has no owner.
        revision: Its branch, tag or commit; ``None`` for the main branch.
    """

    path: Path | None = None
    repo: str = ""
    revision: str | None = None


def place_of(name: str, revision: str | None = None) -> Place:
    """Say where a model is from what it is called; nothing is downloaded.

    Understood besides paths and ``owner/name``: an address on huggingface.co, ``hf://``,
    ``owner/name@revision``, and a repository's folder in the hub's cache.

    Args:
        name: As a person writes it.
        revision: Branch, tag or commit of a repository; what the name itself says is the default.

    Raises:
        ModelError: It is neither a path that exists, nor a repository's name.
    """
    if name == demo.NAME:
        return Place(demo.FOLDER)
    for spelled in dict.fromkeys((name, name.strip(), name.strip().replace("\\", "/"))):
        if path := _existing(spelled):
            return Place(_snapshot(path))
    return _repository(name, revision)


def _existing(name: str) -> Path | None:
    try:
        path = Path(name).expanduser()
        return path if name and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # Too long for a path; the home of nobody.
        return None


def _snapshot(folder: Path) -> Path:
    """Return the snapshot in a repository's folder of the hub's cache, or the folder itself."""
    main = folder / "refs" / "main"
    if folder.name.startswith("models--") and main.is_file():
        snapshot = folder / "snapshots" / main.read_text(encoding="utf-8").strip()
        return snapshot if snapshot.is_dir() else folder
    return folder


def _repository(name: str, revision: str | None) -> Place:
    """Read a name that is not that of a file or folder."""
    scheme, is_address, repo = name.strip().partition("://")
    if is_address and scheme.lower() != "hf":
        repo = _of_address(name.strip())
    elif not is_address:
        repo = name.strip()
        repo = _of_address(f"https://{repo}") if repo.split("/")[0] in HOSTS else repo
    if repo.count("/") > 1:
        repo = repo.rstrip("/")
    repo, _, own = repo.partition("@")
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
            f"model {name!r} is spelled as Ollama spells it: name its file, which the line FROM "
            f"of 'ollama show --modelfile {name}' says, a folder, or a repository such as "
            "mlx-community/Llama-3.2-3B-Instruct-4bit"
        )
    return (
        f"model folder {name!r} does not exist, and the name is none of a config.json or of a "
        "repository"
    )
