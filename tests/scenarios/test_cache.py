"""Which answers on disk are taken again."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from graphpar.scenarios import cache as kept_answers


def test_answers_of_other_code_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A release is too coarse: prices change between commits, too."""
    names = {"/".join(file.parts[-2:]) for file in kept_answers.own_files()}
    assert {"partition/pipeline.py", "passes/fuse.py", "cost_models/devices.toml"} <= names
    for known in (kept_answers.own_files, kept_answers.maker):
        request.addfinalizer(known.cache_clear)
    own = SimpleNamespace(__path__=[tmp_path], __version__="1")
    monkeypatch.setattr(kept_answers, "import_module", lambda _name: own)
    (tmp_path / ".#code.py").symlink_to("nowhere")  # as an editor's lock
    keys = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "code.py").write_text(text)
        for known in (kept_answers.own_files, kept_answers.maker):
            known.cache_clear()
        keys.add(kept_answers.key_of({}))
    assert len(keys) == 2
