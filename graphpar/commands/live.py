"""What `graphpar run` shows while it runs: a table that is redrawn on a terminal, lines elsewhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from graphpar.plans.plan import Plan
from graphpar.runtime.last_step import LastStep
from graphpar.runtime.program import StepReport
from graphpar.schedule import Action
from graphpar.units import format_bytes, format_percent, format_rate, format_seconds

_MOST_RANKS = 24
_BAR_COLUMNS = 12
_COMPUTE = "FBIWO"


@dataclass(frozen=True)
class RankShare:
    """One rank's part of one step.

    Attributes:
        busy: Share of the step in which it computed; `predicted_busy` is the plan's.
        peak_bytes: Most memory so far; `predicted_bytes` is the plan's.
    """

    rank: int
    device: str
    stage: str
    busy: float
    predicted_busy: float
    peak_bytes: float
    predicted_bytes: float


def shares_of_step(plan: Plan, step: LastStep) -> tuple[RankShare, ...]:
    """How busy each rank was and what memory it held."""
    stages_of = plan.schedule().stages_of
    replicas = plan.replicas
    return tuple(
        RankShare(
            rank=report.rank,
            device=replicas[report.rank].device,
            stage=", ".join(map(str, stages_of[report.rank])),
            busy=_computed_s(report) / step.seconds if step.seconds > 0 else 0.0,
            predicted_busy=replicas[report.rank].busy_share,
            peak_bytes=float(report.peak_bytes),
            predicted_bytes=replicas[report.rank].peak_bytes,
        )
        for report in step.reports
    )


def _computed_s(report: StepReport) -> float:
    return sum(e.end_s - e.start_s for e in report.events if Action.parse(e.token).kind in _COMPUTE)


class Progress:
    """Shows the steps of a run as they end; use it as a context manager.

    Args:
        plan: The plan that runs.
        steps: How many steps there will be.
        console: Where to show them.
    """

    def __init__(self, plan: Plan, steps: int, console: Console) -> None:
        self._plan = plan
        self._steps = steps
        self._console = console
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        if self._console.is_terminal:
            waiting = Text(f"step 0/{self._steps}: running")
            self._live = Live(waiting, console=self._console, auto_refresh=False)
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, number: int, samples: int, step: LastStep, loss: float | None) -> None:
        """Tell of one step that ended."""
        line = step_line(number, self._steps, samples, step, loss)
        if self._live is None:
            self._console.print(Text(line), soft_wrap=True)
        else:
            shares = shares_of_step(self._plan, step)
            self._live.update(Group(Text(line), rank_table(shares)), refresh=True)


def step_line(number: int, steps: int, samples: int, step: LastStep, loss: float | None) -> str:
    """One step in one line: loss, time, speed, and how far the prediction was off."""
    parts = [f"step {number}/{steps}"]
    if loss is not None:
        parts.append(f"loss {loss:.6f}")
    parts.append(format_seconds(step.seconds))
    if step.seconds > 0:
        parts.append(format_rate(samples / step.seconds, "sample"))
        if step.predicted_s is not None:
            off = step.predicted_s / step.seconds - 1
            parts.append(f"predicted {format_seconds(step.predicted_s)} ({100 * off:+.1f} %)")
    return "  ".join(parts)


def rank_table(shares: Sequence[RankShare]) -> Table:
    """How busy the ranks were and their memory, each against the plan."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("rank", "right"),
        ("device", "left"),
        ("stage", "right"),
        ("busy", "left"),
        ("plan", "right"),
        ("memory", "right"),
        ("plan", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for row in _rows(shares):
        table.add_row(*map(Text, row))
    if len(shares) > _MOST_RANKS:
        table.add_row("", Text(f"and {len(shares) - _MOST_RANKS} more"))
    return table


def _rows(shares: Sequence[RankShare]) -> Iterator[tuple[str, ...]]:
    for share in shares[:_MOST_RANKS]:
        full = round(_BAR_COLUMNS * min(1.0, max(0.0, share.busy)))
        yield (
            str(share.rank),
            share.device[-24:],
            share.stage,
            f"{'#' * full}{'.' * (_BAR_COLUMNS - full)} {format_percent(share.busy)}",
            format_percent(share.predicted_busy),
            format_bytes(share.peak_bytes),
            format_bytes(share.predicted_bytes),
        )
