"""What units take of a heap on a processor: best fit, and the holes that it leaves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphpar.cost_models.layout import find_layout
from graphpar.cost_models.memory import saved_roots
from graphpar.cost_models.opcost import work_of
from graphpar.cost_models.unit_heap import Heap, unit_bytes
from graphpar.ir.text import parse_graph


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 99)), max_size=60))
def test_places_never_overlap_and_the_smallest_free_one_is_taken(
    asked: list[tuple[bool, int, int]],
) -> None:
    heap, there = Heap(), dict[float, int]()
    for gives_back, size, which in asked:
        if gives_back and there:
            place = list(there)[which % len(there)]
            heap.give_back(place)
            del there[place]
            continue
        edges = sorted((at, at + held) for at, held in there.items())
        ends, starts = [0.0, *(end for _, end in edges)], [start for start, _ in edges]
        gaps = [start - end for end, start in zip(ends, starts, strict=False) if start - end >= size]
        place = heap.take(size)
        following = [start for start in starts if start >= place]
        if gaps:
            assert following and min(following) - max(e for e in ends if e <= place) == min(gaps)
        else:
            assert place == ends[-1]
        assert all(place + size <= start or place >= end for start, end in edges)
        there[place] = size
    assert heap.top_bytes >= heap.most_bytes >= sum(there.values())


@given(st.permutations(range(12)))
def test_thirds_of_bytes_leave_no_holes_behind(order: list[int]) -> None:
    """A microbatch's part of what the whole batch takes need not be whole."""
    heap = Heap()
    places = [heap.take((7 * k + 1) / 3) for k in range(12)]
    end = heap.top_bytes
    for k in order:
        heap.give_back(places[k])
    assert heap.alive_bytes == 0
    assert heap.take(end) == 0 and heap.top_bytes == end


HEAD = """graph captured "N" batch=4
%x = input("x") : {wire}[B,1]
%t = input("t") : int64[B]
%w = parameter("w") : {wire}[65536,1] {{grad=true}}
%y = aten.linear.default(%x, %w) : {wire}[B,65536] {{grad=true}}
{cast}%l = aten.cross_entropy_loss.default({logits}, %t) : float32[] {{grad=true}}
%output = output((%l,))
"""
CAST = "%z = aten._to_copy.default(%y, dtype=dtype:float32) : float32[B,65536] {grad=true}\n"


def _bytes(text: str, *, again: bool = False) -> tuple[float, float]:
    graph = parse_graph(text)
    layout = find_layout(graph)
    ops = [op for op in graph.ops if op.target.startswith("aten")]
    works = {op.name: work_of(op, graph, layout, 4) for op in ops}
    sizes = {op.name: float(sum(kind.bytes(4) for kind in op.types if kind)) for op in graph.ops}
    kept = saved_roots(graph, layout, works)
    return unit_bytes(graph, layout, works, sizes, kept, again=again)


def test_logits_in_16_bits_leave_their_place_below_those_in_32() -> None:
    """Log-probabilities, their gradient and that of the logits are twice as large: none fits there."""
    plain, _ = _bytes(HEAD.format(wire="float32", cast="", logits="%y"))
    lower, _ = _bytes(HEAD.format(wire="bfloat16", cast=CAST, logits="%z"))
    one = 4.0 * 4 * 65536
    assert plain == pytest.approx(2 * one, rel=1e-4)  # beside the log-probabilities
    assert lower == pytest.approx(2 * one + one / 2, rel=1e-4)


WIDE = """graph captured "N" batch=4
%x = input("x") : float32[B,65536]
%w = parameter("w") : float32[1,65536] {grad=true}
%y = aten.linear.default(%x, %w) : float32[B,1] {grad=true}
%output = output((%y,))
"""


def test_a_gradient_that_is_added_to_an_earlier_one_is_there_beside_it() -> None:
    """What is as small as this unit's result has places of its own."""
    one = 4.0 * 65536
    assert _bytes(WIDE) == (0.0, one)
    assert _bytes(WIDE, again=True) == (one, one)


def test_a_gradient_takes_the_place_of_what_the_loss_has_given_back() -> None:
    """Logits' gradient and the one beside it are gone or there before that of the head's weight comes."""
    working, growing = _bytes(HEAD.format(wire="float32", cast="", logits="%y"))
    assert growing == pytest.approx(working, rel=1e-4)
