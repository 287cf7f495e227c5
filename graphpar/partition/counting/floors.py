"""What pipelines of the counting programme cost at least: by limits, and by the columns they use."""

from dataclasses import dataclass

import numpy as np

from graphpar.partition.unit_arrays import FloatArray, IntArray


@dataclass(frozen=True)
class Least:
    """Pipelines of interest have this much extra and post, or more.

    The largest extra of a pipeline's stages is at least its mean over the blocks, and so is the larger of
    that and of a constant: `max(X, max extra) >= X + sum_j blocks_j / L max(extra_j - X, 0)`. Hence what
    a pipeline costs beyond the least is at least a sum over its columns.
    """

    extra_s: float
    post_s: float
    post_weight: float

    @property
    def step_s(self) -> float:
        """What the least alone comes to."""
        return self.extra_s + self.post_weight * self.post_s


@dataclass(frozen=True)
class Spread:
    """The largest extra and post that a relaxation uses, and what its means fall short of these."""

    extra_s: float
    extra_short_s: float
    post_s: float
    post_short_s: float


@dataclass(frozen=True, eq=False)
class Floors:
    """Columns, and the least step of pipelines that use each of them."""

    index: IntArray
    step_s: FloatArray
    least_s: float
    """What any pipeline takes at least; one with several of the columns what each adds to that."""

    def below(self, target_s: float) -> "Floors":
        """Only the columns that a pipeline with a shorter step may use."""
        kept = self.step_s < target_s
        return self if kept.all() else Floors(self.index[kept], self.step_s[kept], self.least_s)

    def rise_s(self, index: IntArray) -> FloatArray:
        """What some of the columns add to the least."""
        found: FloatArray = self.step_s[np.searchsorted(self.index, index)] - self.least_s
        return found
