"""Answers kept on disk by content: the same question about the same model is not solved twice."""

import hashlib
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from graphpar.scenarios.types import Answer

FORMAT = 6
"""Part of every key; raised when answers get other fields or other meaning."""


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/graphpar/what-if`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "graphpar" / "what-if"


def key_of(parts: dict[str, Any]) -> str:
    """A hash of everything an answer depends on.

    >>> key_of({"a": 1}) == key_of({"a": 1}) != key_of({"a": 2})
    True
    """
    return hashlib.sha256(msgspec.json.encode({**parts, "format": FORMAT}, order="sorted")).hexdigest()


@dataclass(frozen=True)
class AnswerCache:
    """A folder of answers; None keeps nothing. A damaged or unwritable file counts as absent."""

    folder: Path | None

    def get(self, key: str) -> Answer | None:
        """The answer under a key."""
        if self.folder is None:
            return None
        try:
            return msgspec.json.decode((self.folder / f"{key}.json").read_bytes(), type=Answer)
        except (OSError, msgspec.DecodeError):
            return None

    def put(self, key: str, answer: Answer) -> None:
        """Keep an answer; written whole or not at all."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "wb") as file:
                file.write(msgspec.json.encode(asdict(answer)))
            os.replace(name, self.folder / f"{key}.json")
        except OSError:
            return
