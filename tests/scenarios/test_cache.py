"""Which answers on disk are taken again."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpar.scenarios import cache as kept_answers
from graphpar.scenarios.types import Answer


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


@given(st.data())
def test_a_damaged_or_foreign_kept_answer_counts_as_absent(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kept = kept_answers.AnswerCache(Path(folder))
        file, right = Path(folder) / "key.json", Answer("x", status="infeasible", problem="too little")
        kept.put("key", right)
        kept.put("other", Answer("y", status="ok", step_s=1.0))
        whole = file.read_bytes()
        assert kept.get("key") == right
        place = data.draw(st.integers(0, len(whole) - 1))
        swapped = (Path(folder) / "other.json").read_bytes()
        changed = (
            whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :]
        )
        other = b'{"title": "x", "status": "infeasible"}'
        file.write_bytes(
            data.draw(st.sampled_from([whole[:place], changed, whole + b" ", swapped, other]))
        )
        assert kept.get("key") is None


def test_where_nothing_can_be_kept_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    inside = kept_answers.AnswerCache(tmp_path / "file" / "below")
    inside.put("key", Answer("x"))
    assert inside.get("key") is None
