"""Answers kept on disk by content: the same question about the same model is not solved twice."""

import contextlib
import hashlib
import os
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from graphpar.kept_files import read_kept, write_kept
from graphpar.scenarios.types import Answer

_NAMES, _MOST = r"[0-9a-f]{64}\.json", 5000
"""Names of answers, and how many are kept, of some kilobytes each."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/graphpar/what-if`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "graphpar" / "what-if"


@cache
def own_files() -> list[Path]:
    """The code that answers, and the data that prices come from."""
    packages = map(import_module, ("graphpar", "graphpar.passes", "graphpar.cost_models"))
    folders = [Path(folder) for package in packages for folder in package.__path__]
    found = {f for end in ("py", "toml") for folder in folders for f in folder.rglob(f"*.{end}")}
    return sorted(file for file in found if file.is_file())  # some editors' locks are links to nowhere


@cache
def maker() -> str:
    """A hash of those files: with any of them changed answers may be others (0.05 s)."""
    digest = hashlib.sha256(import_module("graphpar").__version__.encode())
    for file in own_files():
        digest.update(file.read_bytes())
    return digest.hexdigest()


def key_of(parts: dict[str, Any]) -> str:
    """A hash of everything an answer depends on, graphpar's own code and catalogue included.

    >>> key_of({"a": 1}) == key_of({"a": 1}) != key_of({"a": 2})
    True
    """
    return hashlib.sha256(msgspec.json.encode({**parts, "by": maker()}, order="sorted")).hexdigest()


_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class AnswerCache:
    """A folder of answers; None keeps nothing. A damaged, foreign or unwritable file counts as absent."""

    folder: Path | None

    def get(self, key: str) -> Answer | None:
        """The answer under a key."""
        return self.get_as(Answer, key)

    def get_as(self, kind: type[_Kind], key: str) -> _Kind | None:
        """What of some kind was kept under a key."""
        found = None if self.folder is None else read_kept(self.folder / f"{key}.json")
        data = (found or b"").partition(b"\n")[2]
        if found != _sealed(key, data):
            return None
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.DecodeError:
            return None

    def put(self, key: str, answer: object) -> None:
        """Keep an answer; written whole or not at all. Those not asked for the longest make room."""
        if self.folder is not None:
            with contextlib.suppress(OSError):
                data = _sealed(key, msgspec.json.encode(answer))
                write_kept(self.folder / f"{key}.json", data, _NAMES, _MOST)


def _sealed(key: str, data: bytes) -> bytes:
    """What is kept under a key behind a hash of both, which nothing else has that reads as an answer."""
    return hashlib.sha256(key.encode() + data).hexdigest().encode() + b"\n" + data
