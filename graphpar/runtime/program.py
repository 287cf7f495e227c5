"""What a worker is told: its part of a plan as plain data, and what it reports about a step."""

from typing import Any, Literal

import msgspec

from graphpar.runtime.plain import Plain
from graphpar.schedule import Action

WHOLE = "whole"
"""Stands for the number of a microbatch in the label of an input of the whole batch."""


class EmulatedLink(msgspec.Struct, frozen=True):
    """A link to another rank that is made slower: latency and rate of one direction."""

    rank: int
    latency_s: float
    bytes_per_s: float


class Slice(msgspec.Struct, frozen=True):
    """The slice of a tensor that a rank holds or steps (see `slices.take`).

    Attributes:
        dim: The dimension that is cut.
        counts: Units of each member.
        inner: Size of a unit.
        member: Whose slice this is.
        rows: The part of the slice that is meant, where the second axis of a tensor group cuts it again,
            or replicas divide it.

    >>> Slice(0, (2, 1), 1, 0).share
    0.6666666666666666
    """

    dim: int
    counts: tuple[int, ...]
    inner: int
    member: int
    rows: "Slice | None" = None

    @property
    def share(self) -> float:
        """The member's part of the whole."""
        return self.counts[self.member] / sum(self.counts)

    def divided(self, rows: "Slice") -> "Slice":
        """The same with a part of what it is a slice of.

        >>> Slice(0, (2, 1), 1, 0, rows=Slice(1, (4, 4), 1, 1)).divided(Slice(0, (1, 1), 1, 0)).rows.rows
        Slice(dim=0, counts=(1, 1), inner=1, member=0, rows=None)
        """
        return msgspec.structs.replace(self, rows=self.rows.divided(rows) if self.rows else rows)


class Meeting(msgspec.Struct, frozen=True):
    """An op in which parts of the batch meet: its number among all, and the ranks that hold it."""

    number: int
    ranks: tuple[int, ...]


class Scatter(msgspec.Struct, frozen=True):
    """How replicas of a stage give each other rows of their gradients in every backward (ZeRO level 2).

    Attributes:
        ranks: The replicas; of tensor groups the members in equal places.
        own: This rank's place among them.
        order: The stage's microbatches in the order in which their gradients are added up.
        owners: For each of these the place of the replica that has it.
        units: For each unit of the model, last ones first, parcels of parameters that are sent together.
    """

    ranks: tuple[int, ...]
    own: int
    order: tuple[int, ...]
    owners: tuple[int, ...]
    units: tuple[tuple[tuple[str, ...], ...], ...]


class RankProgram(msgspec.Struct, frozen=True):
    """One rank's part of one schedule (training or inference).

    Attributes:
        graph: Text of the lowered graph of the rank's pipeline.
        stages: The rank's stages in that pipeline, numbered within it.
        training: Whether there is a backward and an optimiser.
        actions: Tokens of what to do in one step.
        routes: For each microbatch the rank of each stage of its pipeline.
        sizes: Samples of each microbatch.
        first_samples: Place of each microbatch's first sample in the global batch.
        batch: Samples in the global batch.
        shared: For each parameter that several ranks hold the number of their group.
        owned: Parameters that this rank counts in the global gradient norm.
        silent: Parameters of `shared` whose gradient another rank adds already.
        spread: Parameters of `shared` that ranks hold in unlike slices: whole tensors are summed.
        slices: Parameters of which the rank holds a slice.
        teams: Ranks of every tensor group of several.
        team: Number of the rank's tensor group among the groups; -1 where it works alone.
        lines: Of a group of two axes the numbers of the lines that the rank stands in, one along each.
        imports: Modules that define operators the stage calls.
        operators: Operators that no module defines, as pickled by the driver; empty for none.
        recompute: Ops of the units whose values are computed again for the backward.
        first_stage: Number of the pipeline's first stage among those of all pipelines, which actions
            name.
        rank: The rank's own number.
        meetings: Ops of the stage in which the parts of several pipelines meet.
        scatter: How gradients are divided among replicas; None where each keeps its own whole.
    """

    graph: str
    stages: tuple[int, ...]
    training: bool
    actions: tuple[str, ...]
    routes: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    first_samples: tuple[int, ...]
    batch: int
    shared: dict[str, int]
    owned: tuple[str, ...]
    silent: tuple[str, ...] = ()
    spread: tuple[str, ...] = ()
    slices: dict[str, Slice] = {}
    teams: tuple[tuple[int, ...], ...] = ()
    team: int = -1
    lines: tuple[int, ...] = ()
    imports: tuple[str, ...] = ()
    operators: bytes = b""
    recompute: tuple[tuple[str, ...], ...] = ()
    first_stage: int = 0
    rank: int = 0
    meetings: dict[str, Meeting] = {}
    scatter: Scatter | None = None


Part = Literal["", "gradients", "optimizer"]
"""All of a step, what comes before the optimiser, or the optimiser alone."""


def in_part(program: RankProgram, part: Part) -> RankProgram:
    """The program of a part of a step.

    >>> whole = RankProgram("", (0,), True, ("0F0", "0B0", "0O"), (), (), (), 1, {}, ())
    >>> in_part(whole, "gradients").actions, in_part(whole, "optimizer").actions
    (('0F0', '0B0'), ('0O',))
    """
    if not part:
        return program
    actions = tuple(
        token for token in program.actions if (Action.parse(token).kind == "O") == (part == "optimizer")
    )
    return msgspec.structs.replace(program, actions=actions)


class WorkerSetup(msgspec.Struct, frozen=True):
    """What a worker needs once, whatever it runs.

    Attributes:
        rank: Its rank among the workers.
        world_size: Number of workers.
        device: Torch device such as `cpu` or `cuda:0`.
        threads: Threads for computing on the CPU.
        slowdown: Emulation: how many times slower than it is the device should be.
        links: Emulated links from this rank.
        groups: Ranks that share parameters; every rank creates all groups in this order.
        timed_groups: Those of the groups, by number, some of whose links are emulated, on one machine.
        seed: Seed of the keyed random streams.
        max_grad_norm: Global norm that gradients are clipped to; None for no clipping.
        scales_loss: Whether some stage computes in float16, so that the loss has to be scaled.
        measures_norm: Whether the first step reports the norm of all gradients.
        shards: Parameters of which the rank steps some rows alone, with these rows.
        shard_groups: The group of replicas that divides them.
        own_settings: Settings of the optimiser that the user gave by a parameter's name.
        settings: For the rank's parameters all settings that an optimiser of the whole model has.
        store: Path of the rendezvous file of a local job.
        path: The driver's `sys.path`, so that the optimiser factory finds the user's modules.
    """

    rank: int
    world_size: int
    device: str
    threads: int
    slowdown: float
    links: tuple[EmulatedLink, ...]
    groups: tuple[tuple[int, ...], ...]
    seed: int
    max_grad_norm: float | None
    scales_loss: bool = False
    measures_norm: bool = False
    timed_groups: tuple[int, ...] = ()
    shards: dict[str, Slice] = {}
    shard_groups: dict[str, int] = {}
    own_settings: dict[str, dict[str, Plain]] = {}
    settings: dict[str, str] = {}
    store: str = ""
    path: tuple[str, ...] = ()


class Event(msgspec.Struct, frozen=True):
    """One action of a step as it ran; times in seconds of the machine's monotonic clock."""

    token: str
    start_s: float
    end_s: float


class Kernel(msgspec.Struct, frozen=True):
    """An operation that torch.profiler saw; `track` names the thread or stream it ran on."""

    name: str
    track: str
    start_s: float
    end_s: float


class StepReport(msgspec.Struct, frozen=True):
    """What a rank reports about one step.

    Attributes:
        rank: Who reports.
        start_s: When the step began, on the machine's monotonic clock.
        end_s: When it ended.
        events: What was done when.
        peak_bytes: Largest memory the rank held: of the process on a CPU, of a GPU the allocator's
            and a context's.
        grad_norm: Norm of all gradients over all ranks, before clipping; None where nobody asked.
        loss_scale: What the loss was multiplied with; None where it was not scaled.
        skipped: Whether gradients overflowed and the step was left out, on all ranks.
        kernels: What torch.profiler saw, where it was asked for.
    """

    rank: int
    start_s: float
    end_s: float
    events: tuple[Event, ...]
    peak_bytes: int
    grad_norm: float | None = None
    loss_scale: float | None = None
    skipped: bool = False
    kernels: tuple[Kernel, ...] = ()


class Scene(msgspec.Struct, frozen=True):
    """An action of a rehearsal.

    Attributes:
        token: The action.
        seconds: What to wait in place of computing.
        messages: Peers, tags and seconds of what it receives or sends.
        sums: Groups that meet in it, and what to wait after each.
        waits: Whether the rank stands still while it sends.
    """

    token: str
    seconds: float
    messages: tuple[tuple[int, int, float], ...] = ()
    sums: tuple[tuple[int, float], ...] = ()
    waits: bool = False


def encode(value: msgspec.Struct) -> dict[str, Any]:
    """Plain data for a message header."""
    data: dict[str, Any] = msgspec.to_builtins(value, builtin_types=(bytes,))
    return data
