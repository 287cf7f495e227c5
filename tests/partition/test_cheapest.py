"""The table that is nowhere dearer than several others."""

from dataclasses import replace

from cost_tables import drawn_modes, small_tables, unit_costs
from hypothesis import given
from hypothesis import strategies as st

from graphpar.cost import CostTable, Mode
from graphpar.precision.cheapest import cheapest


@st.composite
def tables_of_the_same_chain(draw: st.DrawFn) -> list[CostTable]:
    """As number formats give them: equal units may become unlike and unlike ones equal, modes may go."""
    first = draw(small_tables(modes=True))
    tables = [first]
    for _ in range(draw(st.integers(1, 2))):
        kinds = draw(st.integers(1, first.num_units))
        classes, sizes = len(first.device_classes), len(first.sizes)
        other = replace(
            first,
            costs=tuple(draw(unit_costs(classes, sizes, first.training)) for _ in range(kinds)),
            units=tuple(draw(st.integers(0, kinds - 1)) for _ in range(first.num_units)),
            modes=(),
        )
        tables.append(replace(other, modes=draw(drawn_modes(other))) if draw(st.booleans()) else other)
    return tables


@given(tables_of_the_same_chain())
def test_it_is_nowhere_dearer(tables: list[CostTable]) -> None:
    best = cheapest(tables)
    for table in tables:
        modes = {mode.key: mode for mode in best.every_mode}
        for mode in table.every_mode:
            for unit in range(table.num_units):
                assert not dearer(modes[mode.key], best.units[unit], mode, table.units[unit])


def dearer(mode: Mode, kind: int, other: Mode, other_kind: int) -> bool:
    one, two = mode.costs[kind], other.costs[other_kind]
    times = [(one.optimizer_s, two.optimizer_s)]
    times += [*zip(one.forward_s, two.forward_s, strict=True)]
    times += [*zip(one.backward_s, two.backward_s, strict=True)]
    held = [*zip(one.weight_bytes, two.weight_bytes, strict=True)]
    for mine, theirs in zip(one.saved_bytes, two.saved_bytes, strict=True):
        held += zip(mine, theirs, strict=True)
    return any(a > b for a, b in times + held)
