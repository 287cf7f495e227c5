"""How many of many alike are tried: all of them by `make exhaustive` alone."""

import os
from typing import Any

import pytest


def examples(most: int, least: int = 10) -> int:
    """How many a test tries: the most where `make exhaustive` asks for them, a third otherwise.

    Where an example takes seconds, fewer than ten will do.
    """
    return most if os.environ.get("GRAPHPAR_EXHAUSTIVE") else max(least, most // 3)


def exhaustive(*values: Any, id: str | None = None) -> Any:
    """A case that only `make exhaustive` tries."""
    return pytest.param(*values, id=id, marks=(pytest.mark.slow, pytest.mark.exhaustive))
