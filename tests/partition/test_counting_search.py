"""Where the search over counting programmes looks for better pipelines, and what it finds."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from cost_tables import make_table

from graphpar.cost import LinkCost, Mode, ModeCost, Topology
from graphpar.partition.cells import class_cells
from graphpar.partition.chains.limits import ChainAnswer
from graphpar.partition.counting import judging as counting_judging
from graphpar.partition.counting import search as counting_search
from graphpar.partition.counting.lines import Line
from graphpar.partition.counting.options import counting_options
from graphpar.partition.counting.programme import CountingLimits
from graphpar.partition.family import Family
from graphpar.partition.programs import Programs
from graphpar.partition.repeats import Repeats
from graphpar.partition.search import Asked, Found, Task
from graphpar.partition.unit_arrays import IntArray, Setting


def test_better_pipelines_are_sought_between_a_failure_and_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At other places each time, from the first again after a better pipeline, until all were tried."""
    tried: list[float] = []
    counted_search = counting_search._CountedSearch
    monkeypatch.setattr(counted_search, "_program", lambda *_: None)
    monkeypatch.setattr(counted_search, "_try", lambda *args, widely: tried.append(args[3]))

    def found(setting: Setting, extra_s: float) -> Found:
        return Found(setting, ChainAnswer(1.0, extra_s, 0.0, 0.0, ()))

    own, other = Setting(8, 4, "1f1b"), Setting(8, 2, "1f1b")
    tasks = [Task(s, 2.0, 1.0, 1.0, 0.0, lambda: pytest.fail("built")) for s in (other, own)]
    seeking = counted_search(tasks, Asked(np.inf, 0.1, np.inf), lambda _: None)
    seeking._seek(1.0, 0.5)
    assert tried == []
    # Whatever has 9 seconds or more with the least fill of a task does not beat the best by the gap.
    seeking.best, seeking._cutoff = found(own, 9.0), 10.0
    seeking._seek(4.0, 0.5)
    assert tried == [6.0]
    seeking._seek(8.0, 0.5)
    assert tried == [6.0]
    tried.clear()
    for _ in range(20):
        seeking._seek_again(4.0)
    assert len(tried) == len(set(tried)) > 5
    assert all(4.0 < extra_s < 8.0 for extra_s in tried)
    first = tried[0]
    seeking.best = found(own, 8.5)
    seeking._seek_again(4.0)
    assert tried[-1] == first
    seeking.best = found(Setting(8, 8, "1f1b"), 8.5)
    tried.clear()
    seeking._seek_again(4.0)
    assert tried == []


def test_groups_of_a_whole_node_are_as_many_as_nodes_beside_smaller_ones() -> None:
    """Nodes of six: groups of four fill two thirds of each, which is no limit for groups of six."""
    table = make_table([1.0] * 4, (1.0,), (12,), batch=4)
    fast = LinkCost(1e-6, 1e12)
    node_of = {d: f"node {int(d[2:]) // 6}" for d in table.class_of}
    topology = Topology(node_of, dict.fromkeys(node_of.values(), fast), LinkCost(1.0, 1e3))
    nothing = (0.0,) * len(table.sizes)

    def group(size: int) -> Mode:
        held, kept = (0.0,) * size, (nothing,) * size
        forward = tuple(s / size for s in table.sizes)
        backward = tuple(2 * f for f in forward)
        cost = ModeCost(forward, backward, 0.0, held, held, held, kept, kept)
        return Mode((0,) * size, (cost,) * len(table.costs), link=fast)

    modes = group(4), group(6)
    table = replace(table, topology=topology, modes=modes)
    cells = class_cells(table)
    options = tuple(counting_options(table, cells, table.max_replicas))
    family = Family(table, cells, False, options, ("1f1b",), "auto", "", Repeats(1, 1, 2))
    programs = Programs(family, CountingLimits(0.0, "highs"))
    tasks = programs.tasks(cells.counts, 4, ("1f1b",))
    found = programs.search(tasks, cutoff_s=float("inf"), gap=0.0, deadline_s=float("inf"))
    assert found.best is not None
    # Two replicas of six run two samples each.
    assert found.best.step_s == pytest.approx(2 * 4 * 3.0 / 6, rel=1e-3)


@pytest.mark.parametrize(
    ("real_s", "stands", "offered"),
    [(12.0, False, ["counted", "packed"]), (12.0, True, ["counted"]), (10.02, False, ["counted"])],
)
def test_a_pipeline_that_real_nodes_make_longer_is_followed_by_one_that_stands_in_them(
    real_s: float, stands: bool, offered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where it stands in them, or takes what was counted to within a tenth of the gap."""
    lines = {name: Line((index,), 1.0, np.zeros(0)) for index, name in enumerate(("counted", "packed"))}
    took: list[str] = []

    def best_among(_lines: object, index: IntArray, *_: object, packed: bool) -> Line:
        assert packed
        assert index.tolist() == [0, 1]
        return lines["packed"]

    def offer(_task: int, answer: ChainAnswer) -> float:
        took.append("counted" if answer.fill_s == 9.0 else "packed")
        return real_s if answer.fill_s == 9.0 else 11.0

    def answer_of(_lines: object, line: Line, bound_s: float) -> ChainAnswer:
        return ChainAnswer(9.0 if line is lines["counted"] else 10.0, 1.0, 0.0, bound_s, ())

    monkeypatch.setattr(counting_judging, "best_among", best_among)
    monkeypatch.setattr(counting_judging, "cheapest", lambda _: np.array([1]))
    seeking = counting_search._CountedSearch([], Asked(np.inf, 0.1, np.inf), lambda _: None)
    monkeypatch.setattr(seeking, "_offer", offer)
    program, known, box = Mock(answer_of=answer_of), Mock(is_packed=lambda _: stands), Mock(task=0)
    value = seeking._offer_line(program, box, known, lines["counted"], 20.0)
    assert (took, value) == (offered, 11.0 if len(offered) == 2 else real_s)
