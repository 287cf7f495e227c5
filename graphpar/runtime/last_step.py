"""The step a job made last: what each rank did when, and the page of text that says so."""

from dataclasses import dataclass

from graphpar.runtime.program import StepReport
from graphpar.units import format_bytes, format_seconds
from graphpar.view.notebook import preformatted


@dataclass(frozen=True)
class LastStep:
    """The last step as it was measured.

    Attributes:
        seconds: From the first rank's start to the last rank's end.
        predicted_s: What the plan predicted, None for another batch size than planned.
        reports: What each rank did when, and its peak memory; of a step that failed, what the ranks
            that still answered had done by then.
        failure: Why the step did not end; empty for one that did.
    """

    seconds: float
    predicted_s: float | None
    reports: tuple[StepReport, ...]
    failure: str = ""

    @property
    def skipped(self) -> bool:
        """Whether gradients overflowed float16, so that no parameter was changed."""
        return any(report.skipped for report in self.reports)

    @property
    def loss_scale(self) -> float | None:
        """What the loss was multiplied with against underflow in float16; None where it was not."""
        return self.reports[0].loss_scale if self.reports else None

    def __str__(self) -> str:
        predicted = "" if self.predicted_s is None else f", predicted {format_seconds(self.predicted_s)}"
        head = f"step of {format_seconds(self.seconds)}{predicted}"
        lines = [f"{head}; it failed: {self.failure.splitlines()[0]}" if self.failure else head]
        lines.append(f"{'rank':>4} {'from':>9} {'to':>9} {'actions':>8} {'peak memory':>12}")
        origin_s = min((report.start_s for report in self.reports), default=0.0)
        for report in self.reports:
            first, last = (format_seconds(t - origin_s) for t in (report.start_s, report.end_s))
            peak = format_bytes(report.peak_bytes)
            lines.append(f"{report.rank:>4} {first:>9} {last:>9} {len(report.events):>8} {peak:>12}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return preformatted(str(self))
