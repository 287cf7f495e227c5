"""Strategies that no best answer needs, dropped on the file's numbers before there is a graph.

What `reduce` says of unsupported, oversized and dominated strategies asks only which strategies are left,
so compiled loops over the file's arrays can do it. Large problems lose most of their strategies here, and
the reductions that rewrite the graph begin with few of them and know where to look.
"""

from typing import NamedTuple

import numpy as np

from graphpar.partition.clock import OutOfTimeError, ShouldStop, never
from graphpar.partition.jit import compiled_exactly
from graphpar.partition.sharding.flat import Int64Array
from graphpar.partition.sharding.graph import BoolArray, FloatArray
from graphpar.partition.sharding.memory import add_up
from graphpar.partition.sharding.moves import excess_tree, filled, max_range
from graphpar.partition.sharding.raw import RawProblem

_NODES_PER_LOOK = 256
"""Nodes visited between two looks at the clock."""


class Trimmed(NamedTuple):
    """What is left of a problem.

    Attributes:
        alive: Which strategies may still be taken, those of all nodes one after the other.
        matters: Which nodes' choices make a difference to memory.
        unsettled: Which nodes the reductions of the graph may change at once.
    """

    alive: BoolArray
    matters: BoolArray
    unsettled: BoolArray


def trim(raw: RawProblem, should_stop: ShouldStop = never) -> Trimmed:
    """Drop strategies until nothing changes; where nothing is possible some node is left with none.

    Raises:
        OutOfTimeError: It was time to stop.
    """
    alive, dirty = np.isfinite(raw.cost), np.ones(raw.num_nodes, dtype=np.bool_)
    matters = dirty.copy()
    longest = int(np.diff(raw.start).max(initial=1))
    worse, table = np.empty((longest, longest)), np.empty(longest * longest)
    possible = bool(np.logical_or.reduceat(alive, raw.start[:-1]).all())
    while possible:
        possible = _look_at_memory(raw, alive, matters, dirty)
        if not dirty.any():
            break
        for begin in range(0, raw.num_nodes, _NODES_PER_LOOK):
            if should_stop():
                raise OutOfTimeError
            end = min(begin + _NODES_PER_LOOK, raw.num_nodes)
            possible = possible and trim_nodes(raw, alive, matters, dirty, begin, end, worse, table)
    unsettled = np.zeros(raw.num_nodes, dtype=np.bool_)
    if possible:
        find_unsettled(raw, alive, matters, unsettled)
    return Trimmed(alive, matters, unsettled)


def _look_at_memory(raw: RawProblem, alive: BoolArray, matters: BoolArray, dirty: BoolArray) -> bool:
    """Drop what is too large with everybody else at their least, and see whose choice makes a difference.

    Nodes that one of both changed become dirty. Returns whether every node has a strategy left.
    """
    least = np.minimum.reduceat(np.where(alive, raw.usage, np.inf), raw.start[:-1])
    spread = np.maximum.reduceat(np.where(alive, raw.usage, -np.inf), raw.start[:-1]) - least
    num_rows = len(raw.limit)
    room = raw.limit - add_up(raw.row_first, raw.row_last, least, num_rows)
    binding = add_up(raw.row_first, raw.row_last, spread, num_rows) > room
    position = np.concatenate([[0], np.cumsum(binding)])
    now = (position[raw.row_first] < position[raw.row_last]) & (spread > 0)
    dirty |= now != matters
    matters[:] = now
    top, lazy = excess_tree(-room)
    return drop_oversized_of(raw, alive, dirty, least, top, lazy)


@compiled_exactly
def drop_oversized_of(
    raw: RawProblem,
    alive: BoolArray,
    dirty: BoolArray,
    least: FloatArray,
    top: FloatArray,
    lazy: FloatArray,
) -> bool:
    """Drop strategies that pass the room left at some row, of which `top` holds the negative."""
    for v in range(len(least)):
        if raw.row_first[v] == raw.row_last[v]:
            continue
        room = -max_range(top, lazy, raw.row_first[v], raw.row_last[v])
        before, left = 0, 0
        for i in range(raw.start[v], raw.start[v + 1]):
            if alive[i]:
                before += 1
                alive[i] = raw.usage[i] - least[v] <= room
                left += alive[i]
        if left == 0:
            return False
        if left < before:
            mark_around(raw, dirty, v)
    return True


@compiled_exactly
def mark_around(raw: RawProblem, marks: BoolArray, v: int) -> None:
    """Mark a node and its neighbours."""
    marks[v] = True
    for e in range(raw.end_start[v], raw.end_start[v + 1]):
        marks[raw.end_to[e]] = True


@compiled_exactly
def trim_nodes(
    raw: RawProblem,
    alive: BoolArray,
    matters: BoolArray,
    dirty: BoolArray,
    begin: int,
    end: int,
    worse: FloatArray,
    table: FloatArray,
) -> bool:
    """Drop unsupported and dominated strategies of the dirty nodes from `begin` to `end - 1`.

    What changed leaves its neighbours dirty. Returns whether every node has a strategy left. `worse` and
    `table` are room to work in.
    """
    own, theirs = filled(len(worse), 0), filled(len(worse), 0)
    for v in range(begin, end):
        if not dirty[v]:
            continue
        dirty[v] = False
        before = list_alive(raw, alive, v, own)
        drop_unsupported_of(raw, alive, v)
        count = list_alive(raw, alive, v, own)
        if count > 1:
            drop_dominated_of(raw, alive, matters[v], v, own, theirs, count, worse, table)
        if count == 0:
            return False
        if list_alive(raw, alive, v, own) < before:
            mark_around(raw, dirty, v)
            dirty[v] = False
    return True


@compiled_exactly
def list_alive(raw: RawProblem, alive: BoolArray, v: int, into: Int64Array) -> int:
    """The numbers of the strategies that a node still has, and how many they are."""
    count, begin = 0, raw.start[v]
    for i in range(raw.start[v + 1] - begin):
        if alive[begin + i]:
            into[count] = i
            count += 1
    return count


@compiled_exactly
def drop_unsupported_of(raw: RawProblem, alive: BoolArray, v: int) -> None:
    """Drop the strategies of a node that leave some neighbour no possible one."""
    begin = raw.start[v]
    for e in range(raw.end_start[v], raw.end_start[v + 1]):
        if not raw.end_hard[e]:
            continue
        first, last = raw.start[raw.end_to[e]], raw.start[raw.end_to[e] + 1]
        for i in range(begin, raw.start[v + 1]):
            if not alive[i]:
                continue
            at = raw.end_table[e] + (i - begin) * raw.end_step[e]
            supported = False
            for j in range(first, last):
                if alive[j] and raw.pairs[at + (j - first) * raw.end_other[e]] < np.inf:
                    supported = True
                    break
            alive[i] = supported


@compiled_exactly
def drop_dominated_of(
    raw: RawProblem,
    alive: BoolArray,
    matters: bool,
    v: int,
    own: Int64Array,
    theirs: Int64Array,
    count: int,
    worse: FloatArray,
    table: FloatArray,
) -> None:
    """Drop the strategies of a node that another one can always replace; `own` lists the `count` left.

    `worse[a, b]` is the most that b in place of a can add to the objective, infinite if b may not fit.
    """
    begin, hope = raw.start[v], False
    for a in range(count):
        for b in range(count):
            i, j = begin + own[a], begin + own[b]
            worse[a, b] = raw.cost[j] - raw.cost[i]
            if a == b or (matters and raw.usage[j] > raw.usage[i]):
                worse[a, b] = np.inf
            hope |= worse[a, b] < np.inf
    for e in range(raw.end_start[v], raw.end_start[v + 1]):
        if not hope:
            return
        width = list_alive(raw, alive, raw.end_to[e], theirs)
        for a in range(count):
            at = raw.end_table[e] + own[a] * raw.end_step[e]
            for k in range(width):
                table[a * width + k] = raw.pairs[at + theirs[k] * raw.end_other[e]]
        hope = add_increases(worse, table, count, width)
    for a in range(count):
        for b in range(count):
            if worse[a, b] <= 0.0 and (a > b or worse[b, a] > 0.0):
                alive[begin + own[a]] = False
                break


@compiled_exactly
def add_increases(worse: FloatArray, table: FloatArray, count: int, width: int) -> bool:
    """Add the most that a table of `count` rows lets b cost more than a; whether any is left finite."""
    hope = False
    for a in range(count):
        for b in range(count):
            if worse[a, b] == np.inf:
                continue
            most = -np.inf
            for k in range(width):
                present = table[a * width + k]
                if present < np.inf:
                    most = max(most, table[b * width + k] - present)
                    if most == np.inf:
                        break
            worse[a, b] += most
            hope |= worse[a, b] < np.inf
    return hope


@compiled_exactly
def find_unsettled(raw: RawProblem, alive: BoolArray, matters: BoolArray, unsettled: BoolArray) -> None:
    """Mark the nodes at which a reduction of the graph may find something to do.

    That is where an edge is separable or one end determines the other, where several edges join the same
    two nodes, and where at most two edges end at a node whose choice makes no difference to memory.
    """
    num_nodes = len(matters)
    longest = 1
    for v in range(num_nodes):
        longest = max(longest, raw.start[v + 1] - raw.start[v])
    own, theirs, columns = filled(longest, 0), filled(longest, 0), filled(longest, 0)
    seen = filled(num_nodes, -1)
    for v in range(num_nodes):
        count = list_alive(raw, alive, v, own)
        degree = 0
        for e in range(raw.end_start[v], raw.end_start[v + 1]):
            u = raw.end_to[e]
            if seen[u] == v:
                unsettled[u] = unsettled[v] = True
                continue
            seen[u] = v
            degree += 1
            if u < v:
                continue
            width = list_alive(raw, alive, u, theirs)
            if is_reducible(raw, e, own, theirs, count, width, columns):
                unsettled[u] = unsettled[v] = True
        if degree <= 2 and not matters[v]:
            unsettled[v] = True


@compiled_exactly
def is_reducible(
    raw: RawProblem,
    e: int,
    own: Int64Array,
    theirs: Int64Array,
    count: int,
    width: int,
    columns: Int64Array,
) -> bool:
    """Whether an edge's table is separable, or one end's strategy determines the other's."""
    for k in range(width):
        columns[k] = 0
    separable = by_rows = by_columns = True
    at, step, other = raw.end_table[e], raw.end_step[e], raw.end_other[e]
    corner = raw.pairs[at + own[0] * step + theirs[0] * other]
    for a in range(count):
        in_row, row = 0, at + own[a] * step
        head = raw.pairs[row + theirs[0] * other]
        for k in range(width):
            here = raw.pairs[row + theirs[k] * other]
            if here < np.inf:
                in_row += 1
                columns[k] += 1
            top = raw.pairs[at + own[0] * step + theirs[k] * other]
            separable = separable and here < np.inf and here == head + (top - corner)
        by_rows = by_rows and in_row == 1
    for k in range(width):
        by_columns = by_columns and columns[k] == 1
    return separable or by_rows or by_columns
