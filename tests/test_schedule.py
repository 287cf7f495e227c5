"""Schedules: text form, orders, and the proof that they are sound."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plan_samples import (
    SAMPLE_LINKS,
    chain,
    chain_links,
    partition_of,
    partitions,
    sample_partition,
    stage_links,
)

from graphpar.cost import LinkCost
from graphpar.errors import VerifyError
from graphpar.partition.types import (
    Partition,
    PipelineChoice,
    Replica,
    ScheduleName,
    StageChoice,
    StagePace,
)
from graphpar.schedule import (
    Action,
    ActionKind,
    Schedule,
    StageLink,
    build_schedule,
    in_flight_limit,
    route_microbatches,
    validate,
)
from graphpar.schedule.simulate import Timeline, simulate
from graphpar.schedule.timing import RankTiming, SizeTiming, Timing


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    partition = draw(partitions())
    return build_schedule(partition, draw(stage_links(partition)), draw(st.booleans()))


@given(st.sampled_from("FBIWRSGD"), st.integers(0, 2000), st.integers(0, 2000))
def test_tokens_parse_back(kind: ActionKind, stage: int, microbatch: int) -> None:
    action = Action(kind, stage, microbatch)
    assert Action.parse(str(action)) == action


@pytest.mark.parametrize("token", ["", "F1", "1F", "1A2", "1X3", "-1F2", "1F2 ", "1f2", "٣F1"])
def test_what_is_no_token_is_refused(token: str) -> None:
    with pytest.raises(ValueError, match="is not an action"):
        Action.parse(token)


def test_the_text_of_a_schedule() -> None:
    schedule = build_schedule(sample_partition(), SAMPLE_LINKS, training=True)
    assert str(schedule) == (
        "schedule 1f1b training\n"
        "pipeline stages 0:3 microbatches 0:8\n"
        "link 0>1 forward 4096.0n+0.0 backward 4096.0n+0.0\n"
        "link 0>2 forward 64.0n+512.0 backward 0.0n+0.0\n"
        "link 1>2 forward 4096.0n+0.0 backward 4096.0n+0.0\n"
        "sizes 2 2 2 2 2 2 2 2\n"
        "routes 0-2-3 0-1-3 0-2-3 0-1-3 0-2-3 0-2-3 0-1-3 0-2-3\n"
        "rank 0 stage 0 | 0F0 0S0 0F1 0S1 0F2 0S2 0F3 0S3 0G0 0B0 0F4 0S4 0G1 0B1 0G2 0B2 0F5"
        " 0S5 0F6 0S6 0G3 0B3 0F7 0S7 0G4 0B4 0G5 0B5 0G6 0B6 0G7 0B7 0A  0O\n"
        "rank 1 stage 1 | 1R1 1F1 1S1 1R3 1F3 1S3 1G1 1B1 1D1 1G3 1B3 1D3 1R6 1F6 1S6 1G6 1B6"
        " 1D6 1A  1O\n"
        "rank 2 stage 1 | 1R0 1F0 1S0 1R2 1F2 1S2 1G0 1B0 1D0 1G2 1B2 1D2 1R4 1F4 1S4 1R5 1F5"
        " 1S5 1G4 1B4 1D4 1G5 1B5 1D5 1R7 1F7 1S7 1G7 1B7 1D7 1A  1O\n"
        "rank 3 stage 2 | 2R0 2F0 2B0 2D0 2R1 2F1 2B1 2D1 2R2 2F2 2B2 2D2 2R3 2F3 2B3 2D3 2R4"
        " 2F4 2B4 2D4 2R5 2F5 2B5 2D5 2R6 2F6 2B6 2D6 2R7 2F7 2B7 2D7 2A  2O"
    )


@given(schedules())
def test_schedules_parse_back(schedule: Schedule) -> None:
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rank 7 stage 0 | 0F0", "expected the row of rank 0"),
        ("rank 0 stage 0 | 0F0 0Z1", "'0Z1' is not an action"),
        ("nonsense", "expected schedule, pipeline, link"),
    ],
)
def test_unreadable_text_names_its_line(line: str, told: str) -> None:
    with pytest.raises(ValueError, match=f"line 2: .*{told}"):
        Schedule.parse(f"schedule gpipe training\n{line}")


def test_text_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="no line such as"):
        Schedule.parse("sizes 1 1")


@given(schedules())
def test_every_built_schedule_is_proven_sound(schedule: Schedule) -> None:
    validate(schedule)


@given(partitions())
def test_replicas_get_exactly_their_microbatches(partition: Partition) -> None:
    schedule = build_schedule(partition, (), training=True)
    replicas = (r for p in partition.pipelines for s in p.stages for r in s.replicas)
    shares = list({r.device: r.microbatches for r in replicas}.values())
    assert [len(schedule.microbatches_of(r)) for r in range(schedule.num_ranks)] == shares


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_routes_never_stray_far_from_the_shares(shares: list[int]) -> None:
    route = route_microbatches(shares)
    total = sum(shares)
    for turn in range(1, total + 1):
        for replica, share in enumerate(shares):
            dealt = route[:turn].count(replica)
            assert abs(dealt - share * turn / total) < len(shares)


def most_held(schedule: Schedule, rank: int) -> int:
    held = most = 0
    for action in schedule.actions[rank]:
        held += (action.kind == "F") - (action.kind == "B")
        most = max(most, held)
    return most


def one_stage_each(partition: Partition) -> bool:
    devices = [r.device for p in partition.pipelines for s in p.stages for r in s.replicas]
    return len(devices) == len(set(devices))


@given(partitions().filter(one_stage_each))
def test_1f1b_holds_no_more_than_memory_was_planned_for(partition: Partition) -> None:
    schedule = build_schedule(replace(partition, schedule="1f1b"), (), training=True)
    rank = 0
    for pipeline in partition.pipelines:
        widths = [len(s.replicas) for s in pipeline.stages]
        for index, stage in enumerate(pipeline.stages):
            for replica in stage.replicas:
                limit = min(replica.microbatches, in_flight_limit(widths, index))
                assert 1 <= most_held(schedule, rank) <= limit
                rank += 1


def play(
    num_stages: int, microbatches: int, schedule: ScheduleName, chunks: int = 1
) -> tuple[Schedule, Timeline]:
    """Like devices whose forward, and either half of a backward, take a second per microbatch."""
    number, each = num_stages * chunks, 1 / chunks
    stages = tuple(
        StageChoice(s, s + 1, (Replica(f"d{s % num_stages}", microbatches),)) for s in range(number)
    )
    partition = partition_of((PipelineChoice(microbatches, microbatches, stages),), schedule)
    partition = replace(partition, paces=(StagePace(each, each, each),) * number)
    built = build_schedule(partition, chain_links(number), training=True)
    row = SizeTiming(1, each, 2 * each, saved_bytes=each, weight_s=each, deferred_bytes=each / 2)
    ranks = tuple(RankTiming(device, "n", (row,)) for device in partition.used_devices)
    return built, simulate(built, Timing(ranks, (), LinkCost(0.0, 1e30)))


@given(st.integers(2, 6), st.integers(0, 7), st.integers(2, 3))
def test_bubbles_of_like_devices_are_those_of_the_papers(devices: int, more: int, chunks: int) -> None:
    """Narayanan et al., 2021, section 2.2; Qi et al., 2023, table 2 (ZB-H1)."""
    microbatches = devices + more
    work = 3 * microbatches
    assert play(devices, microbatches, "1f1b")[1].step_s == pytest.approx(work + 3 * (devices - 1))
    split, halves = play(devices, microbatches, "zero-bubble")
    assert halves.step_s == pytest.approx(work + devices - 1)
    assert max(halves.peak_bytes) <= devices  # no more than 1F1B's first device
    _, chunked = play(devices, microbatches, "interleaved", chunks)
    assert chunked.step_s == pytest.approx(work + 3 * (devices - 1) / chunks)
    sent = [action for row in split.actions for action in row if action.kind in "SD"]
    assert len(sent) == 2 * (devices - 1) * microbatches


def test_the_text_of_a_zero_bubble_schedule() -> None:
    schedule, _ = play(3, 4, "zero-bubble")
    work = [" ".join(str(a) for a in row if a.kind in "FBIW") for row in schedule.actions]
    assert work == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3",
        "2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3",
    ]


def test_the_text_of_an_interleaved_schedule() -> None:
    schedule, _ = play(2, 2, "interleaved", chunks=2)
    assert str(schedule).splitlines()[-2:] == [
        "rank 0 stage 0,2 | 0F0 0S0 0F1 0S1 2R0 2F0 2S0 2R1 2F1 2S1 2G0 2B0 2D0 2G1 2B1 2D1 0G0 0B0"
        " 0G1 0B1 0A  0O",
        "rank 1 stage 1,3 | 1R0 1F0 1S0 1R1 1F1 1S1 3R0 3F0 3B0 3D0 3R1 3F1 3B1 3D1 1G0 1B0 1D0 1G1"
        " 1B1 1D1 1A  1O",
    ]


def test_1f1b_without_replicas_is_the_usual_order() -> None:
    schedule = build_schedule(chain(3, 4), (), training=True)
    work = [" ".join(str(a) for a in row if a.kind in "FB") for row in schedule.actions]
    assert work == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


@given(partitions().filter(one_stage_each))
def test_gpipe_runs_all_forwards_first(partition: Partition) -> None:
    schedule = build_schedule(replace(partition, schedule="gpipe"), (), training=True)
    for row in schedule.actions:
        kinds = "".join(a.kind for a in row)
        assert kinds == "F" * kinds.count("F") + "B" * kinds.count("F") + "AO"


def test_inference_has_forwards_only() -> None:
    schedule = build_schedule(chain(2, 3), chain_links(2), training=False)
    assert {a.kind for row in schedule.actions for a in row} == {"R", "F", "S"}


def test_links_without_gradient_exchange_none() -> None:
    schedule = build_schedule(chain(2, 2), (StageLink(0, 1, 8.0),), training=True)
    assert {a.kind for row in schedule.actions for a in row} == {"R", "F", "S", "B", "A", "O"}


@given(schedules(), st.randoms(use_true_random=False))
def test_a_missing_action_is_found(schedule: Schedule, random: Random) -> None:
    rank = random.randrange(schedule.num_ranks)
    row = list(schedule.actions[rank])
    lost = row.pop(random.randrange(len(row)))
    with pytest.raises(VerifyError, match=f"{lost} is missing"):
        validate(with_row(schedule, rank, row))


@given(schedules(), st.randoms(use_true_random=False))
def test_a_doubled_action_is_found(schedule: Schedule, random: Random) -> None:
    rank = random.randrange(schedule.num_ranks)
    row = list(schedule.actions[rank])
    row.insert(random.randrange(len(row)), random.choice(row))
    with pytest.raises(VerifyError, match="occurs 2 times"):
        validate(with_row(schedule, rank, row))


@given(schedules(), st.randoms(use_true_random=False))
def test_the_verdict_on_shuffled_rows_is_that_of_a_naive_run(schedule: Schedule, random: Random) -> None:
    rows = []
    for row in schedule.actions:
        shuffled = list(row)
        for _ in range(random.randrange(3)):
            at = random.randrange(len(row))
            to = random.randrange(len(row))
            shuffled.insert(to, shuffled.pop(at))
        rows.append(tuple(shuffled))
    changed = replace(schedule, actions=tuple(rows))
    try:
        validate(changed)
        accepted = True
    except VerifyError:
        accepted = False
    assert accepted == (keeps_local_order(changed) and finishes(changed))


def keeps_local_order(schedule: Schedule) -> bool:
    for row in schedule.actions:
        if schedule.training and [a.kind for a in row[-2:]] != ["A", "O"]:
            return False
        for stage, m in {(a.stage, a.microbatch) for a in row if a.microbatch is not None}:
            kinds = [a.kind for a in row if (a.stage, a.microbatch) == (stage, m)]
            chain = [kind for kind in kinds if kind != "W"]
            if chain != sorted(chain, key="RFSGBID".index):
                return False
            if "W" in kinds and kinds.index("W") < kinds.index("I"):
                return False
    return True


def finishes(schedule: Schedule) -> bool:
    """Run without thought for speed: step any rank that can, until none can."""
    done: set[Action] = set()
    position = [0] * schedule.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.actions):
            if position[rank] < len(row) and can_run(schedule, row[position[rank]], done):
                done.add(row[position[rank]])
                position[rank] += 1
                moved = True
    return all(at == len(row) for at, row in zip(position, schedule.actions, strict=True))


def can_run(schedule: Schedule, action: Action, done: set[Action]) -> bool:
    if action.kind == "R":
        needs = [
            Action("S", link.source, action.microbatch)
            for link in schedule.links
            if link.target == action.stage
        ]
    elif action.kind == "G":
        needs = [
            Action("D", link.target, action.microbatch)
            for link in schedule.links
            if link.source == action.stage and link.has_gradient
        ]
    else:
        return True
    return all(need in done for need in needs)


def with_row(schedule: Schedule, rank: int, row: list[Action]) -> Schedule:
    rows = list(schedule.actions)
    rows[rank] = tuple(row)
    return replace(schedule, actions=tuple(rows))


def actions(text: str) -> list[Action]:
    return [Action.parse(token) for token in text.split()]


def test_ranks_that_wait_for_each_other_are_a_deadlock() -> None:
    schedule = build_schedule(chain(2, 2), chain_links(2), training=True)
    crossed = with_row(schedule, 0, actions("0F0 0S0 0G0 0B0 0F1 0S1 0G1 0B1 0A 0O"))
    crossed = with_row(crossed, 1, actions("1R0 1F0 1R1 1F1 1B0 1D0 1B1 1D1 1A 1O"))
    with pytest.raises(VerifyError, match="deadlock: rank 0 waits at 0G0, rank 1 waits at 1R1"):
        validate(crossed)


def test_an_action_of_another_stage_is_found() -> None:
    schedule = build_schedule(chain(2, 1), chain_links(2), training=False)
    with pytest.raises(VerifyError, match="1F0 does not belong to this rank"):
        validate(with_row(schedule, 0, actions("0F0 0S0 1F0")))


def test_the_optimiser_stands_last() -> None:
    schedule = build_schedule(chain(1, 1), (), training=True)
    with pytest.raises(VerifyError, match="must stand at the end"):
        validate(with_row(schedule, 0, actions("0F0 0B0 0O 0A")))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"routes": ((1, 0),)}, r"visits stages \[1 0\]"),
        ({"microbatch_sizes": (1, 1)}, "2 sizes"),
        ({"stages_of": ((0,), (1,), (1,))}, "rows and of ranks differ"),
        ({"links": (StageLink(1, 0, 1.0),)}, "does not lead to a later stage"),
    ],
)
def test_a_misshapen_schedule_is_found(change: dict[str, object], told: str) -> None:
    schedule = build_schedule(chain(2, 1), chain_links(2), training=True)
    with pytest.raises(VerifyError, match=told):
        validate(replace(schedule, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        (
            PipelineChoice(
                2, 2, (StageChoice(0, 1, (Replica("a", 2),)), StageChoice(1, 2, (Replica("a", 2),)))
            ),
            "device a runs two stages",
        ),
        (PipelineChoice(2, 2, (StageChoice(0, 1, (Replica("a", 1),)),)), "replicas take"),
        (PipelineChoice(2, 2, (StageChoice(0, 1, ()),)), "replicas take"),
        (PipelineChoice(1, 2, (StageChoice(0, 1, (Replica("a", 2),)),)), "needs a sample"),
        (PipelineChoice(2, 2, ()), "over 0 stages"),
    ],
)
def test_an_impossible_partition_is_refused(pipeline: PipelineChoice, told: str) -> None:
    partition = replace(chain(1, 1), pipelines=(pipeline,))
    with pytest.raises(VerifyError, match=told):
        build_schedule(partition, (), training=True)
