"""The textbook pipeline programme, to compare with: a fixed number of slots, each with one stage option.

    x[s, o] = 1    slot s is staffed by option o (a mode and a number of replicas)
    n[s, o]        blocks in slot s, at most all of them where x[s, o] = 1, else none
    sum_o x[s, o] <= 1;  sum_{s, o} n[s, o] = blocks;  devices of every kind suffice
    T >= (ceil(m / w_o) - 1) t_o n[s, o]       for every slot and option
    minimise  sum_{s, o} t_o n[s, o] + T

Microbatches are those of the plan it is compared with; weights, gradients and optimiser state must fit,
activations in flight are checked afterwards. Slots are interchangeable and T is a maximum over big-M
products: that is why it does not scale.
"""

from dataclasses import replace

from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError
from graphpar.partition.cells import StageOption, class_cells
from graphpar.partition.counting.options import counting_options
from graphpar.partition.handmade import evaluate
from graphpar.partition.repeats import find_repeats
from graphpar.partition.solver import Program
from graphpar.partition.types import Partition, PipelineChoice, Replica, StageChoice

SLOTS = 12


def slot_programme(table: CostTable, found: Partition, time_limit_s: float) -> Partition:
    """The plan of the programme's answer, priced like any other.

    Raises:
        InfeasibleError: It has no answer, finds none in time, or the answer does not fit into memory.
    """
    repeats = find_repeats(table)
    if repeats is None or len(found.pipelines) != 1:
        raise InfeasibleError("the slot programme is for equal blocks in one pipeline", limit="form")
    count, kind = found.pipelines[0].microbatches, table.units[repeats.start]
    cells = class_cells(table)
    options = [
        o
        for o in counting_options(table, cells, min(table.max_replicas, count))
        if _holds(table, o, kind) > 0
    ]
    program = Program("slots")
    size = table.batch / count
    bottleneck = program.continuous("T")
    chosen, blocks = {}, {}
    for s in range(SLOTS):
        for i, option in enumerate(options):
            most = min(repeats.number, _holds(table, option, kind))
            chosen[s, i] = program.binary(f"x{s}_{i}")
            blocks[s, i] = program.integer(f"n{s}_{i}", 0, most)
            program.constrain([(1, blocks[s, i]), (-most, chosen[s, i])], "<=", 0)
            busy = (-(-count // option.width) - 1) * _seconds(table, option, kind, size)
            program.constrain([(1, bottleneck), (-busy, blocks[s, i])], ">=", 0)
        program.constrain([(1, chosen[s, i]) for i in range(len(options))], "<=", 1)
    program.constrain([(1, n) for n in blocks.values()], "==", repeats.number)
    for cell, number in enumerate(cells.counts):
        terms = [(float(options[i].take[cell]), x) for (_, i), x in chosen.items()]
        program.constrain(terms, "<=", number)
    fill = [(_seconds(table, options[i], kind, size), n) for (_, i), n in blocks.items()]
    program.minimize([*fill, (1.0, bottleneck)])
    outcome = program.solve(time_limit_s=time_limit_s)
    if not outcome.has_point:
        raise InfeasibleError(f"the slot programme is {outcome.status} in time", limit="time")
    lines = [
        (options[i], round(outcome.value(n))) for (_, i), n in blocks.items() if outcome.value(n) > 0.5
    ]
    return _priced(table, found, lines)


def _holds(table: CostTable, option: StageOption, kind: int) -> int:
    """Blocks whose weights, gradients and state fit into each member."""
    mode = table.every_mode[option.staff[0]]
    cost, width = mode.costs[kind], option.width
    memory = min(table.device_classes[k].memory_bytes for k in mode.members) - table.reserved_bytes
    each = max(cost.optimizer_bytes) / (width if mode.zero else 1)
    each += max(cost.gradient_bytes) / (width if mode.zero > 1 else 1)
    each += max(cost.weight_bytes) / (width if mode.zero > 2 else 1)
    return int(memory // each) if each > 0 else 10**6


def _seconds(table: CostTable, option: StageOption, kind: int, size: float) -> float:
    cost = table.every_mode[option.staff[0]].costs[kind]
    return table.at_size(cost.forward_s, size) + table.at_size(cost.backward_s, size)


def _priced(table: CostTable, found: Partition, lines: list[tuple[StageOption, int]]) -> Partition:
    """Name devices in order, put the ends to the first and the last stage, and price."""
    free = {i: list(c.devices) for i, c in enumerate(table.device_classes)}
    stages, unit = [], 0
    for number, (option, count) in enumerate(lines):
        mode = table.every_mode[option.staff[0]]
        replicas = []
        for _ in range(option.width):
            members = [free[k].pop(0) for k in mode.members]
            replicas.append(Replica(members[0], 0, tuple(members[1:]), mode.shares))
        last = unit + count + (1 if number == 0 else 0)
        last = table.num_units if number == len(lines) - 1 else last
        stage = StageChoice(unit, last, tuple(replicas), mode.precision, mode.recompute, mode.zero)
        stages.append(stage)
        unit = last
    pipeline = replace(found.pipelines[0], stages=tuple(stages))
    plan = evaluate(table, [PipelineChoice(pipeline.samples, pipeline.microbatches, pipeline.stages)])
    for device, peak in plan.peak_bytes.items():
        if peak > table.device_classes[table.class_of[device]].memory_bytes:
            raise InfeasibleError(f"the slot programme's plan does not fit into {device}", limit="memory")
    return plan
