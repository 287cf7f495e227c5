"""What the partitioner answers: pipelines of stages, and how sure it is.

A *pipeline* takes a share of every global batch and cuts it into microbatches. Its *stages* are
contiguous runs of units that together cover the chain. A stage has one or more *replicas*, which take
turns over the pipeline's microbatches. Where stages are *interleaved*, the same replicas hold several
stages of a pipeline that do not follow each other. A replica is one device or a *tensor group*: devices
that share every layer of the stage, each in proportion to its share. Several pipelines, of unlike
composition if need be, run side by side; gradients are summed over all copies of a unit.
"""

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["optimal", "feasible"]
ScheduleName = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
"""GPipe and 1F1B; 1F1B where devices hold several stages that do not follow each other; with backwards
in two halves, of which the second (gradients of weights) fills gaps."""

TensorWidth = int | Literal["auto"] | tuple[int, int]
"""The most members of a tensor group; "auto" for as many as a node has devices, along one axis or two; or
how many stand along each of two axes, where groups of one axis of up to as many compete."""

MOST_LEAN = 3
"""The dearest that memory may be where a tensor group decides how to share a stage (`Replica.lean`)."""

ROUNDING = 1e-9
"""Relative difference of two sums of the same numbers that is rounding."""

SearchedSchedule = Literal["gpipe", "1f1b"]
"""Schedules whose step time is a formula, so that partitions for them are searched for with a bound."""


@dataclass(frozen=True)
class Replica:
    """One device or tensor group that runs a stage, and how many of the pipeline's microbatches it takes.

    Attributes:
        device: The device, or the first member of the group.
        microbatches: Microbatches taken; all members of a group run the same ones.
        others: The further members of a tensor group, in order.
        shares: Each member's share of the dimensions that the group splits; they add up to one.
            Empty: equal shares.
        mesh: Members along each axis of a group of two axes, whose rows follow one another in `devices`:
            neighbours along the second axis stand side by side. Empty for a group of one axis.
        lean: How dear memory was when it was decided how a tensor group shares the stage: 0 as usual,
            up to `MOST_LEAN` for shardings that take longer and hold less.

    >>> Replica("a/0", 4, others=("a/1",), shares=(0.6, 0.4)).devices
    ('a/0', 'a/1')
    """

    device: str
    microbatches: int
    others: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()
    mesh: tuple[int, ...] = ()
    lean: int = 0

    @property
    def devices(self) -> tuple[str, ...]:
        """The members of the group in order; one device where there is no group."""
        return (self.device, *self.others)

    @property
    def member_shares(self) -> tuple[float, ...]:
        """Each member's share, equal ones spelled out."""
        return self.shares or (1 / len(self.devices),) * len(self.devices)

    @property
    def axes(self) -> tuple[int, ...]:
        """Members along each axis; one axis where there is no mesh."""
        return self.mesh or (len(self.devices),)

    @property
    def width(self) -> str:
        """Members as people write them, along each axis.

        >>> Replica("a", 1, ("b", "c", "d")).width, Replica("a", 1, ("b", "c", "d"), mesh=(2, 2)).width
        ('4', '2x2')
        """
        return "x".join(map(str, self.axes))


@dataclass(frozen=True)
class StageChoice:
    """Units `first` to `last - 1` of the chain, run by each replica for its microbatches.

    Attributes:
        first: First unit of the stage.
        last: The unit after its last.
        replicas: Who runs it.
        precision: Name of the number format it computes in.
        recompute: Whether activations are computed again in the backward instead of kept.
        zero: ZeRO level: 0 keeps everything on every replica, 1 splits the optimiser state, 2 the
            gradients too, 3 the weights too.
        unit_formats: The format of each unit where they are not all `precision`; `precision` then
            names the lower format among them.

    >>> StageChoice(0, 2, (), "bfloat16").formats
    ('bfloat16', 'bfloat16')
    """

    first: int
    last: int
    replicas: tuple[Replica, ...]
    precision: str = "float32"
    recompute: bool = False
    zero: int = 0
    unit_formats: tuple[str, ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """The number format of each unit."""
        return self.unit_formats or (self.precision,) * (self.last - self.first)


@dataclass(frozen=True)
class PipelineChoice:
    """A share of the global batch, cut into microbatches of (nearly) equal size."""

    samples: int
    microbatches: int
    stages: tuple[StageChoice, ...]

    def sizes(self) -> tuple[int, ...]:
        """The size of each microbatch; sizes differ by at most one, larger ones first.

        >>> PipelineChoice(samples=10, microbatches=4, stages=()).sizes()
        (3, 3, 2, 2)
        """
        if not self.microbatches:  # idle, for a batch of few samples
            return ()
        small, larger = divmod(self.samples, self.microbatches)
        return (small + 1,) * larger + (small,) * (self.microbatches - larger)


@dataclass(frozen=True)
class StagePace:
    """What an order of work is found with: seconds of one microbatch in one stage.

    Attributes:
        forward_s: Its forward.
        backward_s: Its backward, without what `weight_s` counts.
        weight_s: Gradients of weights, where they may come later; 0 where they may not.
        transfer_s: What the stage's results are under way for.
        ahead: How many microbatches, over all its stages, a device may have between forward and backward;
            0 for the usual number.
        held: How many of them may lack any of their gradients; 0 for as many as the first device of the
            pipeline may have between forward and backward.
    """

    forward_s: float
    backward_s: float
    weight_s: float = 0.0
    transfer_s: float = 0.0
    ahead: int = 0
    held: int = 0


@dataclass(frozen=True)
class GroupStrategy:
    """One way in which a tensor group computes ops (`ir.strategies.Strategy`), layouts as text."""

    operands: tuple[str, ...]
    results: tuple[str, ...]
    special: str = ""
    first_only: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class WholeOp:
    """Ops of one kind that every member of a tensor group computes whole.

    Attributes:
        target: What is computed, such as `aten.cumsum.default`.
        module: Path of the module that calls it; of the first of several.
        source: File and line there.
        count: How many there are, in modules whose paths differ in numbers only.
        reason: Why they are not divided.
        seconds: What they take in a microbatch, in both directions, together.
    """

    target: str
    module: str
    source: str
    count: int
    reason: str
    seconds: float

    def __str__(self) -> str:
        place = f" in {self.module}" if self.module else ""
        line = f" ({self.source})" if self.source else ""
        more = f" and {self.count - 1} like it" if self.count > 1 else ""
        return f"{self.target}{place}{line}{more}: {self.reason}"


@dataclass(frozen=True)
class GroupSharding:
    """How the members of a tensor group share a stage, so that every process rewrites the same graph.

    Attributes:
        leader: The group's first device.
        stage: Number of the stage in its pipeline.
        strategies: All ways that occur.
        chosen: For each op the number of its way.
        forms: For a value that is read several times the layout it is brought into first.
        weights: For each parameter and buffer the slice that members hold, or "whole".
        whole: What every member computes whole, the most expensive first.
        inner: The same along the second axis of a group of two: layouts of what the first one leaves.
    """

    leader: str
    stage: int
    strategies: tuple[GroupStrategy, ...]
    chosen: dict[str, int]
    forms: dict[str, str]
    weights: dict[str, str]
    whole: tuple[WholeOp, ...] = ()
    inner: "GroupSharding | None" = None


@dataclass(frozen=True)
class Partition:
    """The chosen partition with its certificate.

    `objective_s` is the step time the programme minimised and `bound_s` a proven lower bound on it
    within the programme's family (`family` says in words what that family is). `gap` is
    `(objective_s - bound_s) / objective_s`. `physical_bound_s` is a lower bound for any plan of any
    kind under the same table. `truncated_by` names every limit that cut the search short.
    `peak_bytes` maps each used device to its predicted peak. `num_programs` programmes were built,
    the largest with `num_variables` variables (possible stages). `paces` has one entry per stage over
    all pipelines where the order of work depends on times; it is empty for GPipe and 1F1B.
    `shardings` has one entry for each stage of a tensor group, where that was settled already.
    """

    pipelines: tuple[PipelineChoice, ...]
    schedule: ScheduleName
    status: Status
    objective_s: float
    parts: dict[str, float]
    bound_s: float
    gap: float
    physical_bound_s: float
    seconds: float
    truncated_by: tuple[str, ...]
    family: str
    peak_bytes: dict[str, float]
    notes: tuple[str, ...] = ()
    runners_up: tuple["Partition", ...] = field(default=(), repr=False)
    num_programs: int = 0
    num_variables: int = 0
    paces: tuple[StagePace, ...] = ()
    shardings: tuple[GroupSharding, ...] = field(default=(), repr=False)

    @property
    def used_devices(self) -> tuple[str, ...]:
        """Names of the devices that have work, in order of pipelines, stages, replicas, members.

        A device's place here is its rank; one with several stages stands where its first is.
        """
        every = (d for p in self.pipelines for s in p.stages for r in s.replicas for d in r.devices)
        return tuple(dict.fromkeys(every))
