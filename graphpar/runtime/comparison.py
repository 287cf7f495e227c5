"""Predicted against measured, device by device, with the likely reason where they differ."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphpar.plans.plan import Plan
from graphpar.runtime.program import StepReport
from graphpar.schedule import Action
from graphpar.units import format_bytes, format_seconds

TOLERANCE = 0.15
"""A step or a device that differs by more than this from its prediction is worth a word."""
NOTABLE_S = 0.005
"""Shorter steps are made of messages and of waiting for a core; nothing is decided by them."""

_COMPUTE, _WAIT, _REDUCE = "FBIW", "RG", "A"


@dataclass(frozen=True)
class MachineNow:
    """This machine between two steps.

    Attributes:
        drift: How many times longer a reference takes on its processor than when times were measured.
        others: How many of its cores other work keeps busy.
        num_cores: How many it has.
    """

    drift: float | None = None
    others: float | None = None
    num_cores: int = 0


@dataclass(frozen=True)
class DeviceComparison:
    """One rank: seconds of compute, of waiting for messages, of gradient sums; peak bytes."""

    device: str
    predicted_compute_s: float
    compute_s: float
    predicted_wait_s: float
    wait_s: float
    predicted_reduce_s: float
    reduce_s: float
    predicted_peak_bytes: float
    peak_bytes: float

    @property
    def compute_error(self) -> float:
        """Measured over predicted compute, minus one."""
        return _over(self.compute_s, self.predicted_compute_s)

    @property
    def memory_error(self) -> float:
        """Measured over predicted peak memory, minus one."""
        return _over(self.peak_bytes, self.predicted_peak_bytes)


@dataclass(frozen=True)
class StepComparison:
    """A measured step beside its prediction.

    `reasons` are the likely ones where anything differs by more than `tolerance`; empty otherwise.
    """

    predicted_s: float
    measured_s: float
    devices: tuple[DeviceComparison, ...]
    reasons: tuple[str, ...]
    tolerance: float = TOLERANCE

    @property
    def off(self) -> bool:
        """Whether the step, or what a device does in it, is worth a word."""
        return bool(self.reasons) or abs(self.error) > self.tolerance

    @property
    def error(self) -> float:
        """Measured over predicted step, minus one."""
        return _over(self.measured_s, self.predicted_s)

    def __str__(self) -> str:
        lines = [
            f"measured step {format_seconds(self.measured_s)}, predicted "
            f"{format_seconds(self.predicted_s)} ({100 * self.error:+.0f} %)"
        ]
        head = (
            "device",
            "compute",
            "predicted",
            "",
            "waits",
            "predicted",
            "peak memory",
            "predicted",
            "",
        )
        rows = [head, *(_cells(d) for d in self.devices)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([*lines, *(f"likely: {reason}" for reason in self.reasons)])


def _over(measured: float, predicted: float) -> float:
    return measured / predicted - 1 if predicted > 0 else 0.0


def _cells(d: DeviceComparison) -> tuple[str, ...]:
    return (
        d.device,
        format_seconds(d.compute_s),
        format_seconds(d.predicted_compute_s),
        f"{100 * d.compute_error:+.0f} %",
        format_seconds(d.wait_s),
        format_seconds(d.predicted_wait_s),
        format_bytes(d.peak_bytes),
        format_bytes(d.predicted_peak_bytes),
        f"{100 * d.memory_error:+.0f} %",
    )


def compare_step(
    plan: Plan, reports: Sequence[StepReport], seconds: float, machine: MachineNow | None = None
) -> StepComparison:
    """The step that these reports tell of, beside the plan's prediction.

    Args:
        plan: What was predicted.
        reports: What each rank did when.
        seconds: How long the step took.
        machine: How this machine is now; None where nobody knows.
    """
    timeline = plan.timeline()
    by_rank = {report.rank: report for report in reports}
    devices = tuple(
        _device(
            plan, name, [(e.action, e.end_s - e.start_s) for e in timeline.events(rank)], by_rank[rank]
        )
        for rank, name in enumerate(plan.devices)
        if rank in by_rank
    )
    found = StepComparison(plan.predicted_step_s, seconds, devices, ())
    return StepComparison(
        found.predicted_s, seconds, devices, _reasons(found, plan, machine or MachineNow())
    )


def _device(
    plan: Plan, name: str, predicted: Sequence[tuple[Action, float]], report: StepReport
) -> DeviceComparison:
    measured = [(Action.parse(e.token), e.end_s - e.start_s) for e in report.events]

    def total(events: Sequence[tuple[Action, float]], kinds: str) -> float:
        return sum(seconds for action, seconds in events if action.kind in kinds)

    return DeviceComparison(
        name,
        total(predicted, _COMPUTE),
        total(measured, _COMPUTE),
        total(predicted, _WAIT),
        total(measured, _WAIT),
        total(predicted, _REDUCE),
        total(measured, _REDUCE),
        plan.predicted_peak_bytes[name],
        report.peak_bytes,
    )


def _reasons(found: StepComparison, plan: Plan, machine: MachineNow) -> tuple[str, ...]:
    reasons = []
    for d in found.devices:
        if abs(d.memory_error) > TOLERANCE:
            more = "more" if d.memory_error > 0 else "less"
            reasons.append(
                f"{d.device} holds {100 * abs(d.memory_error):.0f} % {more} memory than predicted: "
                "buffers that the cost model does not know, or temporaries it takes for kept"
            )
    if not found.devices:
        return tuple(reasons)
    worst = max(found.devices, key=lambda d: abs(d.compute_s - d.predicted_compute_s))
    if abs(found.error) <= TOLERANCE:
        weighs = abs(worst.compute_s - worst.predicted_compute_s) > TOLERANCE / 2 * found.measured_s
        if abs(worst.compute_error) > TOLERANCE and weighs:
            reasons.append(_compute_reason(worst, found.devices, plan, machine))
        return tuple(reasons)
    off_s = found.measured_s - found.predicted_s
    compute_off_s = worst.compute_s - worst.predicted_compute_s
    if abs(compute_off_s) > 0.5 * abs(off_s) and compute_off_s * off_s > 0:
        reasons.append(_compute_reason(worst, found.devices, plan, machine))
    elif _sums_off_s(found.devices, plan) > 0.5 * off_s > 0:
        reasons.append("sums of gradients take longer than predicted: links among replicas are slower")
    elif off_s > 0:
        late = max(found.devices, key=lambda d: d.wait_s - d.predicted_wait_s)
        reasons.append(
            f"{late.device} waits longer for messages than predicted: a link is slower than described, "
            "or the machine hands processes the core late"
        )
    else:
        reasons.append("the links are faster than described")
    return tuple(reasons)


def _sums_off_s(devices: Sequence[DeviceComparison], plan: Plan) -> float:
    """How much longer sums of gradients take: by the member that comes last, whom the others wait for."""
    off_s = {d.device: d.reduce_s - d.predicted_reduce_s for d in devices}
    return max(
        (
            min(off_s.get(plan.devices[r], 0.0) for r in group.ranks)
            for group in plan.timing.gradient_groups
        ),
        default=0.0,
    )


_DRIFTED = 0.05
"""A reference that takes this much longer or shorter tells that the machine's speed has moved."""
_EXPLAINS = 0.5
"""A reference that is off by less than this share of what a device is off explains it in part only."""
_BUSY_CORES = 0.5
"""Other work on more cores than this is in the way of workers."""


def _compute_reason(
    worst: DeviceComparison, devices: Sequence[DeviceComparison], plan: Plan, machine: MachineNow
) -> str:
    kinds = {r.device: r.kind for r in plan.replicas}
    kind = kinds.get(worst.device, "")
    slower = worst.compute_error > 0
    word = "longer" if slower else "shorter"
    told = f"{worst.device} computes {100 * abs(worst.compute_error):.0f} % {word}"
    if not kind.startswith("cpu"):
        return (
            f"{told} than predicted: other clocks, a busy device, a host that issues kernels at another "
            f"pace, or, unless its units were timed there, kernels that {kind}'s curves do not know"
        )
    beside = [d for d in devices if d is not worst and kinds.get(d.device, "").startswith("cpu")]
    return f"{told} than predicted: {_processor_reason(worst, beside, slower, machine)}"


def _processor_reason(
    worst: DeviceComparison, beside: Sequence[DeviceComparison], slower: bool, machine: MachineNow
) -> str:
    """What speaks for itself first: other work, then the reference, then what the other workers did."""
    moved = 0.0 if machine.drift is None else machine.drift - 1
    if slower and machine.others is not None and machine.others > _BUSY_CORES:
        return (
            f"other work keeps {machine.others:.1f} of this machine's {machine.num_cores} cores busy; "
            "stop it, or describe fewer or slower workers"
        )
    explains = (moved > 0) == slower and abs(moved) > _EXPLAINS * abs(worst.compute_error)
    if abs(moved) > _DRIFTED and explains:
        return (
            f"a reference takes {1 + moved:.2f} times what it took when this machine was measured, so "
            "its speed has moved; `graphpar calibrate` measures anew"
        )
    if beside and all(abs(d.compute_error) < abs(worst.compute_error) / 2 for d in beside):
        word = "slower" if slower else "faster"
        return (
            f"the other workers of this machine are not off like that, so this one is {word} than the "
            "cluster describes it (`slowdown`), or has its core under other conditions than they do"
        )
    if machine.drift is not None and machine.others is not None and machine.others <= _BUSY_CORES:
        return (
            f"nothing else is at work, and a reference takes {1 + moved:.2f} times what it took when "
            "this machine was measured, so the times it was planned with are wrong: `graphpar calibrate` "
            "measures anew, and a larger `measure_s` tries more of the plan"
        )
    why = (
        "its core was shared with other work, or the machine slowed down since it was measured"
        if slower
        else "the machine was busier when it was measured, or is not calibrated"
    )
    return f"{why}; `graphpar calibrate` measures anew"
