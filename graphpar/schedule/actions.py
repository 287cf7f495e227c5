"""Actions, schedules, and their text form.

Ranks are the used devices of a partition in order, each with one stage or several; stages and
microbatches are numbered over all pipelines (pipeline 0's first). An `Action` prints as a token such as
`1F3` (stage 1, forward, microbatch 3), a `Schedule` as a grid of tokens with one row per rank; both parse
back.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast, get_args

from graphpar.partition.types import ScheduleName

ActionKind = Literal["F", "B", "R", "S", "G", "D", "A", "O", "I", "W"]
KINDS: tuple[ActionKind, ...] = get_args(ActionKind)
"""Forward, backward; receive and send activations; receive (G) and send (D) gradients; all-reduce
of the gradients, optimiser step; the halves of a backward: gradients of inputs (I) and of weights (W)."""

_TOKEN = re.compile(r"(\d+)(?:([FBRSGDIW])(\d+)|([AO]))", re.ASCII)


class Action(NamedTuple):
    """One thing a rank does: `kind` for `stage` and, but for A and O, for `microbatch`.

    R receives all activations the stage needs for the microbatch, S sends all the stage's
    activations to later stages; G receives all gradients from later stages, D sends all gradients
    to earlier ones.

    >>> str(Action("F", 1, 3)), str(Action("A", 0))
    ('1F3', '0A')
    >>> Action.parse("1F3") == Action("F", 1, 3)
    True
    """

    kind: ActionKind
    stage: int
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @classmethod
    def parse(cls, token: str) -> "Action":
        """The action a token stands for; ValueError if it is none."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(
                f"{token!r} is not an action: expected a stage number, one of "
                f"{' '.join(KINDS)}, and a microbatch number (none for A and O), "
                "such as 1F3 or 0A"
            )
        stage, kind, microbatch, last_kind = match.groups()
        if last_kind:
            return cls(cast(ActionKind, last_kind), int(stage))
        return cls(cast(ActionKind, kind), int(stage), int(microbatch))


@dataclass(frozen=True)
class StageLink:
    """Data that stage `source` sends to the later stage `target` for every microbatch.

    A microbatch of n samples moves `forward_bytes_per_sample * n + forward_fixed_bytes` forward,
    and likewise backward. A link without backward bytes (integers, masks) carries no gradient.
    """

    source: int
    target: int
    forward_bytes_per_sample: float
    backward_bytes_per_sample: float = 0.0
    forward_fixed_bytes: float = 0.0
    backward_fixed_bytes: float = 0.0

    @property
    def has_gradient(self) -> bool:
        """Whether gradients travel back over this link."""
        return self.backward_bytes_per_sample > 0 or self.backward_fixed_bytes > 0

    def forward_bytes(self, size: int) -> float:
        """Bytes of one microbatch of `size` samples from source to target."""
        return self.forward_bytes_per_sample * size + self.forward_fixed_bytes

    def backward_bytes(self, size: int) -> float:
        """Bytes of one microbatch of `size` samples from target back to source."""
        return self.backward_bytes_per_sample * size + self.backward_fixed_bytes


@dataclass(frozen=True)
class PipelineSpan:
    """Stages `first_stage` to `last_stage - 1` form a pipeline; its microbatches likewise."""

    first_stage: int
    last_stage: int
    first_microbatch: int
    last_microbatch: int


@dataclass(frozen=True, repr=False)
class Schedule:
    """What every rank does in one step.

    Attributes:
        name: The order the schedule follows.
        training: Whether there are backwards, all-reduces and optimiser steps.
        pipelines: Which stages and microbatches belong together.
        links: Which pairs of stages exchange data.
        stages_of: For each rank the stages it runs, in their order.
        microbatch_sizes: Samples of each microbatch.
        routes: For each microbatch the rank that runs it, for each stage of its pipeline; of a tensor
            group its first rank.
        actions: For each rank its actions in order.
        teams: The ranks of each tensor group of several.
    """

    name: ScheduleName
    training: bool
    pipelines: tuple[PipelineSpan, ...]
    links: tuple[StageLink, ...]
    stages_of: tuple[tuple[int, ...], ...]
    microbatch_sizes: tuple[int, ...]
    routes: tuple[tuple[int, ...], ...]
    actions: tuple[tuple[Action, ...], ...]
    teams: tuple[tuple[int, ...], ...] = ()

    @property
    def num_ranks(self) -> int:
        """Ranks that take part."""
        return len(self.stages_of)

    @property
    def num_stages(self) -> int:
        """Stages over all pipelines."""
        return self.pipelines[-1].last_stage

    @property
    def num_microbatches(self) -> int:
        """Microbatches over all pipelines."""
        return len(self.microbatch_sizes)

    @cached_property
    def ranks_of(self) -> tuple[tuple[int, ...], ...]:
        """For each stage the ranks of its replicas."""
        ranks: list[list[int]] = [[] for _ in range(self.num_stages)]
        for rank, stages in enumerate(self.stages_of):
            for stage in stages:
                ranks[stage].append(rank)
        return tuple(tuple(r) for r in ranks)

    @cached_property
    def incoming(self) -> tuple[tuple[StageLink, ...], ...]:
        """For each stage its links from earlier stages, by source."""
        table: list[list[StageLink]] = [[] for _ in range(self.num_stages)]
        for link in sorted(self.links, key=lambda link: link.source):
            table[link.target].append(link)
        return tuple(tuple(row) for row in table)

    @cached_property
    def outgoing(self) -> tuple[tuple[StageLink, ...], ...]:
        """For each stage its links to later stages, by target."""
        table: list[list[StageLink]] = [[] for _ in range(self.num_stages)]
        for link in sorted(self.links, key=lambda link: link.target):
            table[link.source].append(link)
        return tuple(tuple(row) for row in table)

    @cached_property
    def _first_stages(self) -> tuple[int, ...]:
        return tuple(
            span.first_stage
            for span in self.pipelines
            for _ in range(span.first_microbatch, span.last_microbatch)
        )

    @cached_property
    def team_of(self) -> tuple[tuple[int, ...], ...]:
        """For each rank the ranks of its tensor group, itself included."""
        groups = {rank: team for team in self.teams for rank in team}
        return tuple(groups.get(rank, (rank,)) for rank in range(self.num_ranks))

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that runs `stage` for `microbatch`, which must be of the same pipeline.

        Of a tensor group it is the first.
        """
        return self.routes[microbatch][stage - self._first_stages[microbatch]]

    def microbatches_of(self, rank: int, stage: int | None = None) -> tuple[int, ...]:
        """The microbatches a rank runs at one of its stages (the first if none is named), in order."""
        leader = self.team_of[rank][0]
        stage = self.stages_of[rank][0] if stage is None else stage
        span = next(p for p in self.pipelines if p.first_stage <= stage < p.last_stage)
        candidates = range(span.first_microbatch, span.last_microbatch)
        return tuple(m for m in candidates if self.routes[m][stage - span.first_stage] == leader)

    def __repr__(self) -> str:
        mode = "training" if self.training else "inference"
        return (
            f"Schedule({self.name}, {mode}, {self.num_ranks} ranks, {self.num_stages} stages, "
            f"{self.num_microbatches} microbatches)"
        )

    def __str__(self) -> str:
        return _format(self)

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """The schedule that prints as `text`; ValueError names the line that cannot be read."""
        return _parse(text)


def _format(schedule: Schedule) -> str:
    lines = [f"schedule {schedule.name} {'training' if schedule.training else 'inference'}"]
    lines += [
        f"pipeline stages {p.first_stage}:{p.last_stage} "
        f"microbatches {p.first_microbatch}:{p.last_microbatch}"
        for p in schedule.pipelines
    ]
    lines += [
        f"link {link.source}>{link.target} forward {link.forward_bytes_per_sample!r}n"
        f"+{link.forward_fixed_bytes!r} backward {link.backward_bytes_per_sample!r}n"
        f"+{link.backward_fixed_bytes!r}"
        for link in schedule.links
    ]
    lines.append("sizes " + " ".join(map(str, schedule.microbatch_sizes)))
    lines.append("routes " + " ".join("-".join(map(str, route)) for route in schedule.routes))
    lines += ["team " + " ".join(map(str, team)) for team in schedule.teams]
    lines += _grid(schedule)
    return "\n".join(lines)


def _grid(schedule: Schedule) -> Iterator[str]:
    width = max((len(str(a)) for row in schedule.actions for a in row), default=0)
    for rank, row in enumerate(schedule.actions):
        cells = " ".join(f"{a!s:<{width}}" for a in row)
        stages = ",".join(map(str, schedule.stages_of[rank]))
        yield f"rank {rank} stage {stages} | {cells}".rstrip()


_NUMBER = r"([0-9.e+-]+)"
_HEAD = re.compile(rf"schedule ({'|'.join(get_args(ScheduleName))}) (training|inference)")
_PIPELINE = re.compile(r"pipeline stages (\d+):(\d+) microbatches (\d+):(\d+)", re.ASCII)
_LINK = re.compile(
    rf"link (\d+)>(\d+) forward {_NUMBER}n\+{_NUMBER} backward {_NUMBER}n\+{_NUMBER}", re.ASCII
)
_RANK = re.compile(r"rank (\d+) stage (\d+(?:,\d+)*) \|(.*)", re.ASCII)


def _parse(text: str) -> Schedule:
    head: re.Match[str] | None = None
    pipelines: list[PipelineSpan] = []
    links: list[StageLink] = []
    sizes: tuple[int, ...] = ()
    routes: tuple[tuple[int, ...], ...] = ()
    stages: list[tuple[int, ...]] = []
    teams: list[tuple[int, ...]] = []
    rows: list[tuple[Action, ...]] = []
    for number, line in enumerate(text.strip().splitlines(), 1):
        try:
            if match := _HEAD.fullmatch(line):
                head = match
            elif match := _PIPELINE.fullmatch(line):
                pipelines.append(PipelineSpan(*map(int, match.groups())))
            elif match := _LINK.fullmatch(line):
                source, target, *amounts = match.groups()
                per_sample, fixed, back_per_sample, back_fixed = map(_parse_number, amounts)
                links.append(
                    StageLink(int(source), int(target), per_sample, back_per_sample, fixed, back_fixed)
                )
            elif line.startswith("sizes "):
                sizes = tuple(map(int, line.split()[1:]))
            elif line.startswith("routes "):
                routes = tuple(tuple(map(int, r.split("-"))) for r in line.split()[1:])
            elif line.startswith("team "):
                teams.append(tuple(map(int, line.split()[1:])))
            elif match := _RANK.fullmatch(line):
                if int(match[1]) != len(rows):
                    raise ValueError(f"expected the row of rank {len(rows)}")
                stages.append(tuple(map(int, match[2].split(","))))
                rows.append(tuple(map(Action.parse, match[3].split())))
            else:
                raise ValueError("expected schedule, pipeline, link, sizes, routes, team or rank")
        except ValueError as error:
            raise ValueError(f"schedule text, line {number}: {error}: {line!r}") from None
    if head is None:
        raise ValueError("schedule text: no line such as 'schedule 1f1b training'")
    return Schedule(
        name=cast(ScheduleName, head[1]),
        training=head[2] == "training",
        pipelines=tuple(pipelines),
        links=tuple(links),
        stages_of=tuple(stages),
        microbatch_sizes=sizes,
        routes=routes,
        actions=tuple(rows),
        teams=tuple(teams),
    )


def _parse_number(text: str) -> float:
    """An integer stays an integer, so that text and value agree in both directions."""
    return int(text) if text.lstrip("-").isdigit() else float(text)
