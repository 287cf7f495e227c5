"""What is known of single settings of a pipeline from wider windows in which it is cut.

Windows are divided again and again (`common_cuts`). A pipeline that is cut within a part of some windows
is cut within them, so it takes no less than their best; and where their best happens to be cut within
the part it is the best there.
"""

from dataclasses import dataclass

from graphpar.partition.common_cuts import Windows
from graphpar.partition.search import Found
from graphpar.partition.unit_arrays import Setting


@dataclass(frozen=True)
class Fit:
    """The best pipeline within some windows below a limit on time, if there is any; a bound on all."""

    found: Found | None
    bound_s: float


@dataclass(frozen=True)
class _Settled:
    windows: Windows
    post_limit_s: float
    fit: Fit

    def covers(self, windows: Windows, post_limit_s: float) -> bool:
        """Whether all pipelines of other windows and another limit on post were looked at."""
        return post_limit_s <= self.post_limit_s and all(
            any(low <= first and last <= high for first, last in windows) for low, high in self.windows
        )


class KnownFits:
    """What was found of settings of pipelines on some devices, within windows."""

    def __init__(self) -> None:
        self._settled: dict[tuple[tuple[int, ...], Setting], list[_Settled]] = {}

    def add(
        self,
        group: tuple[int, ...],
        setting: Setting,
        windows: Windows,
        post_limit_s: float,
        fit: Fit,
    ) -> None:
        """Keep what was found."""
        self._settled.setdefault((group, setting), []).append(_Settled(windows, post_limit_s, fit))

    def about(
        self, group: tuple[int, ...], setting: Setting, windows: Windows, post_limit_s: float
    ) -> Fit:
        """The best pipeline, if it is known, and the best bound there is."""
        found, bound_s = None, 0.0
        for known in self._settled.get((group, setting), ()):
            if not known.covers(windows, post_limit_s):
                continue
            bound_s = max(bound_s, known.fit.bound_s)
            if known.fit.found is not None and _is_cut(known.fit.found, windows, post_limit_s):
                found = known.fit.found
        return Fit(found, bound_s)


def _is_cut(found: Found, windows: Windows, post_limit_s: float) -> bool:
    """Whether a pipeline is cut within each of some windows, and keeps a limit on post."""
    cuts = [stage.first for stage in found.answer.stages[1:]]
    within = all(any(low <= cut <= high for cut in cuts) for low, high in windows)
    return within and found.answer.post_s <= post_limit_s
