"""Pages of text: golden, 80 columns wide, the same facts as the pictures."""

from pathlib import Path

import pytest
from golden_files import PAGES
from plan_samples import sample_plan
from view_samples import explained_plan, hostile_plan

from graphpar import cli
from graphpar.errors import PlanError
from graphpar.explanation.page import format_explanation

GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_golden_and_eighty_columns_wide(name: str) -> None:
    page = PAGES[name]()
    assert page + "\n" == (GOLDEN / name).read_text(encoding="utf-8")
    assert max(map(len, page.splitlines())) <= 80


def test_a_block_is_found_by_name_by_part_and_by_number() -> None:
    plan = explained_plan()
    assert format_explanation(plan, "h.2") == format_explanation(plan, "3")
    assert "h.0, h.1, h.2, h.3" in format_explanation(plan, "H.")


def test_an_unknown_block_and_a_plan_without_reasons_say_what_to_do() -> None:
    with pytest.raises(PlanError, match=r"no block named like 'nose'; its blocks are embed, h\.0"):
        format_explanation(explained_plan(), "nose")
    with pytest.raises(PlanError, match=r"from 0 to 5"):
        format_explanation(explained_plan(), "6")
    with pytest.raises(PlanError, match="make it anew with `graphpar plan`"):
        format_explanation(sample_plan())


def test_hostile_names_do_not_break_the_pages() -> None:
    plan = explained_plan(hostile_plan())
    assert "</script>" in format_explanation(plan, "0")
    assert str(plan)


def test_the_command_explains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(explained_plan().save(tmp_path / "plan.json"))
    assert cli.run(["explain", path, "h.1"], cli.Settings()) == 0
    assert capsys.readouterr().out == format_explanation(explained_plan(), "h.1") + "\n"
    assert cli.run(["explain", path, "--json"], cli.Settings()) == 0
    assert '"shadow_prices"' in capsys.readouterr().out
    assert cli.run(["explain", path, "nose"], cli.Settings()) == 2
    assert "no block named like" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["show"], ["explain"], ["view", "-o", "x.html"], ["diff", "{}"]])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x89PNG\r\n", b'{"traceEvents": []}'])
def test_a_file_that_is_no_plan_is_told_by_name(
    command: list[str], content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(content)
    words = [word.format(path) if word == "{}" else word for word in command]
    assert cli.run([words[0], str(path), *words[1:]], cli.Settings()) == 2
    captured = capsys.readouterr()
    assert "other.json" in captured.err and "plan" in captured.err and not captured.out
    assert not Path("x.html").exists()
