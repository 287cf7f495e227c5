"""Every rule of every level, broken once; and pipelines of passes."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from graphpar.errors import VerifyError
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import Op
from graphpar.ir.rules import RULES, verify
from graphpar.ir.text import parse_graph
from graphpar.passes.comm import InsertMessages
from graphpar.passes.place import Place
from graphpar.rewrite import Pass, Pipeline, describe

GOOD: dict[Level, str] = {
    "captured": """
%x = input("x") : float32[B,4]
%h = aten.split.Tensor(%x, 2, 1) : (float32[B,2], float32[B,2]) {samples="sample"}
%a = getitem(%h, 0) : float32[B,2] {samples="sample"}
%d = gp.dropout(%a, 0.5, false, stream=0) : float32[B,2]
%output = output((%d,))
""",
    "placed": """
%x = input("x") : float32[B,4]
%h = aten.neg.default(%x) : float32[B,4] {stage=0}
%y = aten.neg.default(%h) : float32[B,4] {stage=1}
%output = output((%y,))
""",
    "lowered": """
%x = input("x") : float32[B,4]
%h = aten.neg.default(%x) : float32[B,4] {stage=0}
%s = gp.send(%h, 1, 0) : float32[B,4] {stage=0}
%r = gp.recv(%s, 0, 0) : float32[B,4] {stage=1}
%y = aten.neg.default(%r) : float32[B,4] {stage=1}
%output = output((%y,))
""",
}
BROKEN: list[tuple[Level, str, str, str]] = [
    ("captured", "%output = output((%d,))", "", "the last op must be the output"),
    ("captured", "%d =", "%early = output((%a,))\n%d =", "only the last op may be the output"),
    ("captured", '%x = input("x")', "%x = input(3)", "input must have one argument"),
    ("captured", '%x = input("x")', "%x = input()", "input must have one argument"),
    ("captured", "getitem(%h, 0)", "getitem(%x, 0)", "getitem reads %x, which is no tuple"),
    ("captured", "getitem(%h, 0)", "getitem(%h, 2)", "index 2 is outside the 2 results"),
    ("captured", "getitem(%h, 0)", "getitem(%h)", "getitem needs a tuple and an index"),
    ("captured", "getitem(%h, 0)", "getitem(0, 0)", "getitem needs a tuple and an index"),
    ("captured", "gp.dropout(", "gp.send(", "gp.send is not legal in a captured graph"),
    ("captured", 'samples="sample"', "stage=1", "attribute 'stage' is not legal in a captured graph"),
    ("placed", "aten.neg.default(%h)", "gp.recv(%h)", "gp.recv is not legal in a placed graph"),
    ("placed", "aten.neg.default(%h)", "gp.whole_batch(%h)", "gp.whole_batch is not legal in a placed"),
    ("placed", " {stage=0}", "", "has no stage"),
    ("placed", "{stage=0}", "{stage=2}", "stage 1 reads %h of the later stage 2"),
    ("placed", "{stage=0}", '{shade="dark"}', "attribute 'shade' is not legal in a placed graph"),
    ("lowered", "neg.default(%r)", "neg.default(%h)", "stage 1 reads %h of stage 0 without a message"),
    ("lowered", "gp.recv(%s, 0, 0)", "gp.recv(%h, 0, 0)", "receives from %h, which is no send"),
    (
        "lowered",
        "%r = gp.recv(%s, 0, 0) : float32[B,4]",
        "%r = gp.recv(%s, 0, 0) : int8[B,4]",
        "receives",
    ),
    ("lowered", "gp.recv(%s, 0, 0)", "gp.recv(0, 0)", "receives from nothing"),
    ("lowered", "4] {stage=1}\n%output", "4]\n%output", "has no stage"),
    ("lowered", "gp.send(", "gp.whole_batch(", "gp.whole_batch is not legal in a lowered graph"),
]


def graph_of(level: Level, body: str) -> Graph:
    return parse_graph(f'graph {level} "N" batch=2{body}')


@pytest.mark.parametrize("level", RULES)
def test_good_graphs_pass(level: Level) -> None:
    verify(graph_of(level, GOOD[level]))


@pytest.mark.parametrize(("level", "old", "new", "why"), BROKEN)
def test_broken_rules_are_named(level: Level, old: str, new: str, why: str) -> None:
    assert old in GOOD[level]
    graph = graph_of(level, GOOD[level].replace(old, new, 1))
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    report = str(caught.value)
    assert why in report
    assert f"breaks a rule of {level} graphs" in report and "made by capture" in report
    assert report.count(">>") == 1 and "= input(" in report


@dataclass(frozen=True)
class Spoil:
    """A pass that breaks a rule."""

    change: Callable[[Op], Op] = lambda op: op.with_attrs(colour=1)
    name: str = "spoil"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        return graph.with_ops(map(self.change, graph.ops))


def test_the_pass_that_breaks_a_rule_is_named() -> None:
    with pytest.raises(VerifyError, match=r"(?s)After pass spoil\(change=.*'colour' is not legal"):
        Pipeline((Spoil(),)).run(graph_of("captured", GOOD["captured"]))


def test_levels_must_meet() -> None:
    with pytest.raises(VerifyError, match=r"'place' gives a placed graph but 'spoil'.*takes a captured"):
        Pipeline((Place((0,)), Spoil()))


def test_the_first_level_must_fit_the_graph() -> None:
    with pytest.raises(VerifyError, match=r"'comm' takes a placed graph, not a captured one"):
        Pipeline((InsertMessages(),)).run(graph_of("captured", GOOD["captured"]))


def test_a_pipeline_tells_what_it_did() -> None:
    seen: list[tuple[str, int]] = []

    def watch(current: Pass, graph: Graph) -> None:
        seen.append((current.name, len(graph)))

    good = Spoil(change=lambda op: op)
    graph, trace = Pipeline((good, good)).run(graph_of("captured", GOOD["captured"]), watch=watch)
    assert seen == [("spoil", 5), ("spoil", 5)] and len(graph) == 5
    assert [step.ops_before for step in trace.steps] == [5, 5] and "spoil" in str(trace)
    assert describe(Place((0, 1))).startswith("place(stage_of_unit=(0, 1)")
