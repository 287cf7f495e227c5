"""The simulator against sums done by hand, known formulas, and laws that must hold."""

from dataclasses import replace
from itertools import pairwise
from typing import get_args

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
    table_for,
)

from graphpar.cores import CoreUse, SharedCores
from graphpar.cost import LinkCost
from graphpar.cost_models.modes import with_modes
from graphpar.cost_options import StageOptions
from graphpar.partition.pipeline_price import price
from graphpar.partition.types import (
    Partition,
    PipelineChoice,
    Replica,
    ScheduleName,
    SearchedSchedule,
    StageChoice,
)
from graphpar.schedule import Action, Schedule, StageLink, build_schedule, in_flight_limit
from graphpar.schedule.simulate import Event, Timeline, simulate
from graphpar.schedule.timing import GradientGroup, NodeLink, RankTiming, SizeTiming, Timing, timing_of

FREE = LinkCost(0.0, 1e30)


def equal_ranks(num_ranks: int, forward_s: float, backward_s: float, network: LinkCost = FREE) -> Timing:
    sizes = (SizeTiming(1, forward_s, backward_s, saved_bytes=1.0, working_bytes=0.5),)
    ranks = tuple(RankTiming(f"d{r}", f"n{r}", sizes) for r in range(num_ranks))
    return Timing(ranks, (), network)


def told(timeline: Timeline, rank: int) -> dict[str, tuple[float, float]]:
    return {str(e.action): (e.start_s, e.end_s) for e in timeline.events(rank)}


def test_two_stages_two_microbatches_by_hand() -> None:
    """Forward 2 s, backward 3 s, a message takes 1 s and does not stop its sender."""
    schedule = build_schedule(chain(2, 2, "gpipe"), (StageLink(0, 1, 10.0, 10.0),), training=True)
    timeline = simulate(schedule, equal_ranks(2, 2.0, 3.0, LinkCost(0.0, 10.0)))
    assert told(timeline, 0) == {
        "0F0": (0, 2),
        "0S0": (2, 3),
        "0F1": (2, 4),
        "0S1": (4, 5),
        "0G0": (4, 11),
        "0B0": (11, 14),
        "0G1": (14, 14),
        "0B1": (14, 17),
        "0A": (17, 17),
        "0O": (17, 17),
    }
    assert told(timeline, 1) == {
        "1R0": (0, 3),
        "1F0": (3, 5),
        "1R1": (5, 5),
        "1F1": (5, 7),
        "1B0": (7, 10),
        "1D0": (10, 11),
        "1B1": (10, 13),
        "1D1": (13, 14),
        "1A": (14, 14),
        "1O": (14, 14),
    }
    assert timeline.step_s == 17
    assert list(timeline.compute_s) == [10, 10]
    assert list(timeline.send_s) == [2, 2]
    assert list(timeline.busy_share) == [10 / 17, 10 / 17]
    assert timeline.bubble_share == pytest.approx(1 - 20 / 34)


def test_without_overlap_a_sender_stands_still() -> None:
    schedule = build_schedule(chain(2, 2, "gpipe"), (StageLink(0, 1, 10.0),), training=False)
    timing = equal_ranks(2, 2.0, 0.0, LinkCost(0.0, 10.0))
    assert told(simulate(schedule, timing), 0)["0F1"] == (2, 4)
    standing = simulate(schedule, replace(timing, overlap=False))
    assert told(standing, 0)["0F1"] == (3, 5)


def test_a_rank_sends_one_message_at_a_time() -> None:
    """Stage 0 sends 1 s to stage 1 and then 2 s to stage 2."""
    links = (StageLink(0, 1, 10.0), StageLink(0, 2, 20.0))
    schedule = build_schedule(chain(3, 1), links, training=False)
    timeline = simulate(schedule, equal_ranks(3, 5.0, 0.0, LinkCost(0.0, 10.0)))
    assert told(timeline, 0)["0S0"] == (5, 8)
    assert told(timeline, 1)["1F0"] == (6, 11)
    assert told(timeline, 2)["2F0"] == (8, 13)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@given(num_stages=st.integers(1, 6), microbatches=st.integers(1, 12))
def test_equal_stages_take_the_known_time(name: ScheduleName, num_stages: int, microbatches: int) -> None:
    """(m + p - 1) (t_f + t_b): Narayanan et al., 2021, section 2.2, arxiv.org/abs/2104.04473."""
    schedule = build_schedule(
        chain(num_stages, microbatches, name), chain_links(num_stages), training=True
    )
    timeline = simulate(schedule, equal_ranks(num_stages, 1.0, 2.0))
    assert timeline.step_s == pytest.approx((microbatches + num_stages - 1) * 3.0)
    ideal = microbatches / (microbatches + num_stages - 1)
    assert timeline.bubble_share == pytest.approx(1 - ideal)


@given(num_stages=st.integers(1, 6), microbatches=st.integers(1, 12))
def test_memory_held_by_position(num_stages: int, microbatches: int) -> None:
    links = chain_links(num_stages)
    timing = equal_ranks(num_stages, 1.0, 2.0)
    few = simulate(build_schedule(chain(num_stages, microbatches), links, True), timing)
    all_of_them = simulate(build_schedule(chain(num_stages, microbatches, "gpipe"), links, True), timing)
    none = simulate(build_schedule(chain(num_stages, microbatches), links, False), timing)
    for stage in range(num_stages):
        held = min(microbatches, num_stages - stage)
        assert few.peak_bytes[stage] == held + 0.5
        assert all_of_them.peak_bytes[stage] == microbatches + 0.5
        assert none.peak_bytes[stage] == microbatches - 1 + 0.5


@st.composite
def priced(draw: st.DrawFn) -> tuple[Partition, Schedule, Timing]:
    partition = draw(partitions())
    training = draw(st.booleans())
    schedule = build_schedule(partition, draw(stage_links(partition)), training)
    return partition, schedule, timing_of(table_for(partition, training=training), partition)


@given(priced())
def test_laws_of_every_timeline(case: tuple[Partition, Schedule, Timing]) -> None:
    _, schedule, timing = case
    timeline = simulate(schedule, timing)
    sent: dict[Action, Event] = {}
    for rank in range(schedule.num_ranks):
        events = list(timeline.events(rank))
        assert [e.action for e in events] == list(schedule.actions[rank])
        assert all(0 <= e.start_s <= e.end_s <= timeline.step_s for e in events)
        own = [e for e in events if e.action.kind not in "SD"]
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(own))
        sent |= {e.action: e for e in events if e.action.kind in "SD"}
        assert timeline.compute_s[rank] <= timeline.step_s + 1e-12
    for rank in range(schedule.num_ranks):
        for event in timeline.events(rank):
            stage, m = event.action.stage, event.action.microbatch
            if event.action.kind == "R":
                sources = [("S", link.source) for link in schedule.incoming[stage]]
            elif event.action.kind == "G":
                sources = [("D", link.target) for link in schedule.outgoing[stage] if link.has_gradient]
            else:
                continue
            for kind, source in sources:
                begun = next(
                    e for a, e in sent.items() if (a.kind, a.stage, a.microbatch) == (kind, source, m)
                )
                # What stays on a rank takes no time.
                assert begun.start_s < event.end_s or begun.rank == rank


@given(priced(), st.data())
def test_a_slower_rank_never_shortens_the_step(
    case: tuple[Partition, Schedule, Timing], data: st.DataObject
) -> None:
    _, schedule, timing = case
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    slower = replace(
        timing.ranks[rank],
        sizes=tuple(
            replace(row, forward_s=2 * row.forward_s, backward_s=2 * row.backward_s)
            for row in timing.ranks[rank].sizes
        ),
    )
    ranks = tuple(slower if r == rank else old for r, old in enumerate(timing.ranks))
    before = simulate(schedule, timing).step_s
    assert simulate(schedule, replace(timing, ranks=ranks)).step_s >= before - 1e-12


def test_a_group_reduces_when_its_last_rank_is_there() -> None:
    """Replicas of unequal load: 3 and 1 microbatches of 1 + 2 s, then 4 s of all-reduce."""
    stage = StageChoice(0, 1, (Replica("a", 3), Replica("b", 1)))
    partition = partition_of((PipelineChoice(4, 4, (stage,)),))
    timing = replace(equal_ranks(2, 1.0, 2.0), gradient_groups=(GradientGroup((0, 1), 100.0, 4.0),))
    timeline = simulate(build_schedule(partition, (), training=True), timing)
    assert told(timeline, 0)["0A"] == (9, 13)
    assert told(timeline, 1)["0A"] == (3, 13)
    assert list(timeline.reduce_s) == [4, 4]
    assert timeline.step_s == 13
    assert timeline.bubble_share == pytest.approx(1 - (12 + 8) / 26)


def test_the_optimiser_follows_the_gradients() -> None:
    timing = equal_ranks(1, 1.0, 2.0)
    timing = replace(timing, ranks=(replace(timing.ranks[0], optimizer_s=0.25),))
    timeline = simulate(build_schedule(chain(1, 2), (), training=True), timing)
    assert told(timeline, 0)["0O"] == (6, 6.25)
    assert list(timeline.compute_s) == [6.25]


def test_timing_sums_the_units_of_the_table() -> None:
    partition = sample_partition()
    table = table_for(partition)
    timing = timing_of(table, partition)
    assert [r.device for r in timing.ranks] == list(partition.used_devices)
    fast, slow = timing.ranks[0], timing.ranks[1]
    assert fast.sizes == (
        SizeTiming(
            2,
            pytest.approx(3 * 2e-3 + 1e-5),  # type: ignore[arg-type]
            pytest.approx(3 * 4e-3 + 1e-5),  # type: ignore[arg-type]
            pytest.approx(3 * 2e5),  # type: ignore[arg-type]
            pytest.approx(1e5),  # type: ignore[arg-type]
            gradient_bytes=3 * 2**20,
            # Less by far: the first unit's backward has all gradients, and what it saved itself is left.
            spared_bytes=pytest.approx(2 * 2e5),  # type: ignore[arg-type]
        ),
    )
    assert slow.at_size(2).forward_s == pytest.approx(2 * 6e-3 + 1e-5)
    assert fast.optimizer_s == pytest.approx(3e-3)
    assert fast.resident_bytes == 2**19 + 2 * 2**20 + 3 * (2**20 + 2**21)


@pytest.mark.parametrize(
    ("microbatches", "schedule", "peak"),
    [
        (1, "1f1b", 1000 + 200 + 50 - 30),
        (2, "1f1b", 1000 + 200 + 50),
        (2, "gpipe", 1000 + 400 + 50 - 30),
        (2, "zero-bubble", 1000 + 200 + 50),
    ],
)
def test_gradients_come_with_a_stages_first_backward(
    microbatches: int, schedule: ScheduleName, peak: float
) -> None:
    sizes = SizeTiming(
        1, 1.0, 2.0, saved_bytes=200.0, working_bytes=50.0, gradient_bytes=100.0, spared_bytes=30.0
    )
    timing = Timing((RankTiming("d", "n", (sizes,), resident_bytes=1000.0),), (), FREE)
    chosen = build_schedule(chain(1, microbatches, schedule), (), training=True)
    assert simulate(chosen, timing).peak_bytes == (peak,)


@pytest.mark.parametrize("microbatches", [1, 3])
def test_results_stay_until_the_end_of_a_step_without_backwards(microbatches: int) -> None:
    """The last ones are among what is worked on while they are made."""
    sizes = SizeTiming(1, 1.0, saved_bytes=200.0, working_bytes=250.0)
    timing = Timing((RankTiming("d", "n", (sizes,), resident_bytes=1000.0),), (), FREE)
    schedule = build_schedule(chain(1, microbatches), (), training=False)
    assert simulate(schedule, timing).peak_bytes == (1000 + 200 * (microbatches - 1) + 250,)


def test_a_first_half_of_a_backward_has_gradients_too() -> None:
    sizes = SizeTiming(1, 1.0, 2.0, 200.0, 50.0, 1.0, gradient_bytes=100.0, spared_bytes=30.0)
    timing = Timing(
        tuple(RankTiming(d, d, (sizes,), resident_bytes=1000.0) for d in ("d0", "d1")), (), FREE
    )
    schedule = build_schedule(chain(2, 2, "zero-bubble"), chain_links(2), training=True)
    assert "".join(kind for kind, _, _ in schedule.actions[1] if kind in "FIW") == "FIFIWW"
    # Tables, norms and biases have theirs while the second microbatch goes forward.
    assert simulate(schedule, timing).peak_bytes[1] == 1000 + 200 + 50


def test_a_first_backward_makes_gradients_from_the_last_unit_on() -> None:
    """A head with large gradients has them beside all that was saved, a first unit beside its own."""
    partition = sample_partition()
    table = table_for(partition)
    end, block = table.costs
    costs = replace(end, gradient_bytes=1e9), replace(block, gradient_bytes=1e4)
    spared = []
    for units in ((0, 1, 1, 1, 1, 0), (1, 0, 1, 1, 1, 0), (1, 1, 0, 1, 1, 0)):
        large = replace(table, costs=costs, units=units)
        spared.append(timing_of(large, partition).ranks[0].sizes[0].spared_bytes)
    assert spared == pytest.approx([2 * 2e5, 2e5 + 1e4, 2e4])
    classes = tuple(replace(c, refills=False) for c in table.device_classes)
    (kept,) = timing_of(replace(table, device_classes=classes), partition).ranks[0].sizes
    assert (kept.gradient_bytes, kept.spared_bytes) == (0.0, 0.0)


def test_replicas_reduce_their_gradients_in_a_ring() -> None:
    partition = sample_partition()
    timing = timing_of(table_for(partition), partition)
    seconds = 2 * (2 - 1) * (1e-6 + 2 * 2**20 / 2 / 1e10)
    (group,) = timing.gradient_groups
    assert (group.ranks, group.num_bytes, group.by_rows) == ((1, 2), 2 * 2**20, False)
    assert group.seconds == pytest.approx(seconds)
    (pipeline,) = partition.pipelines
    stages = tuple(replace(stage, zero=1) for stage in pipeline.stages)
    divided = replace(partition, pipelines=(replace(pipeline, stages=stages),))
    modes = with_modes(table_for(divided), StageOptions(zero=(1,)))
    assert [g.by_rows for g in timing_of(modes, divided).gradient_groups] == [True]


def test_pipelines_side_by_side_share_gradients_unit_by_unit() -> None:
    """The first pipeline cuts after unit 2, the second after unit 4."""
    partition = partition_of(
        tuple(
            PipelineChoice(
                2,
                1,
                (
                    StageChoice(0, cut, (Replica(f"p{p}s0/0", 1),)),
                    StageChoice(cut, 6, (Replica(f"p{p}s1/0", 1),)),
                ),
            )
            for p, cut in enumerate((2, 4))
        )
    )
    timing = timing_of(table_for(partition), partition)
    assert {g.ranks: g.num_bytes / 2**20 for g in timing.gradient_groups} == {
        (0, 2): 2,
        (1, 2): 2,
        (1, 3): 2,
    }


def test_links_within_and_between_nodes() -> None:
    inside = NodeLink("a", "a", LinkCost(1e-6, 1e10))
    near = NodeLink("a", "b", LinkCost(1e-5, 1e9))
    rest = LinkCost(1e-4, 1e8)
    ranks = tuple(RankTiming(f"{n}/{i}", n, ()) for i, n in enumerate("aabc"))
    timing = Timing(ranks, (inside, near), rest)
    assert timing.link(0, 1) == inside.cost
    assert timing.link(0, 2) == timing.link(2, 0) == near.cost
    assert timing.link(2, 3) == rest


def test_a_timing_of_another_partition_is_refused() -> None:
    schedule = build_schedule(chain(2, 2), (), training=True)
    with pytest.raises(ValueError, match="3 ranks and the schedule 2"):
        simulate(schedule, equal_ranks(3, 1.0, 1.0))
    bigger = build_schedule(chain(2, 2, size=4), (), training=True)
    with pytest.raises(ValueError, match="d0 has microbatch sizes 1, not 4"):
        simulate(bigger, equal_ranks(2, 1.0, 1.0))


def test_many_ranks() -> None:
    """64 stages of 4 replicas: as long as 4 independent pipelines of a quarter of the work."""
    stages = tuple(
        StageChoice(s, s + 1, tuple(Replica(f"{s}/{r}", 32) for r in range(4))) for s in range(64)
    )
    partition = partition_of((PipelineChoice(128, 128, stages),))
    schedule = build_schedule(partition, chain_links(64), training=True)
    timeline = simulate(schedule, equal_ranks(256, 1.0, 2.0))
    assert timeline.step_s == pytest.approx((32 + 64 - 1) * 3.0)
    widths = [4] * 64
    held = [min(32, in_flight_limit(widths, schedule.stages_of[r][0])) + 0.5 for r in range(256)]
    assert list(timeline.peak_bytes) == held


@given(partitions().filter(lambda p: p.schedule in get_args(SearchedSchedule)), st.booleans())
def test_memory_is_never_more_than_the_partitioner_allowed_for(
    partition: Partition, training: bool
) -> None:
    table = table_for(partition, training=training)
    allowed = price(table, partition.pipelines, partition.schedule).peak_bytes
    schedule = build_schedule(partition, (), training)
    peaks = simulate(schedule, timing_of(table, partition)).peak_bytes
    for device, peak in zip(partition.used_devices, peaks, strict=True):
        assert peak <= allowed[device] * (1 + 1e-12)


def test_the_sample_fits_between_its_bounds() -> None:
    partition = sample_partition()
    timing = timing_of(table_for(partition), partition)
    timeline = simulate(build_schedule(partition, SAMPLE_LINKS, training=True), timing)
    busiest = max(timeline.compute_s)
    assert busiest < timeline.step_s < sum(timeline.compute_s)


def side_by_side(slowdown: float, slowing: float, cores: int, workers: int = 2) -> float:
    """Seconds of a step of workers that each compute 2 s forward and 3 s backward, all at once."""
    pipelines = tuple(
        PipelineChoice(1, 1, (StageChoice(0, 1, (Replica(f"d{r}", 1),)),)) for r in range(workers)
    )
    timing = equal_ranks(workers, 2.0, 3.0)
    shared = SharedCores(
        cores,
        (1.0, slowing),
        {f"d{r}": CoreUse(slowdown=slowdown) for r in range(workers)},
    )
    partition = replace(chain(1, 1), pipelines=pipelines)
    schedule = build_schedule(partition, (), training=True)
    return simulate(schedule, replace(timing, shared=shared)).step_s


def test_workers_on_the_same_cores_take_longer() -> None:
    assert side_by_side(1.0, 1.0, cores=2) == pytest.approx(5.0)
    assert side_by_side(1.0, 1.2, cores=2) == pytest.approx(6.0)
    # Four workers on two cores get half a core each.
    assert side_by_side(1.0, 1.0, cores=2, workers=4) == pytest.approx(10.0)
    # Workers four times slower than a core leave room for each other; caches are shared all the same.
    assert side_by_side(4.0, 1.0, cores=1, workers=4) == pytest.approx(5.0)
    assert 5.0 < side_by_side(4.0, 1.2, cores=2) < 5.5


def test_messages_of_emulated_links_come_later_than_described() -> None:
    partition = sample_partition()
    timing = timing_of(table_for(partition), partition)
    schedule = build_schedule(partition, SAMPLE_LINKS, training=True)
    workers = {rank.device: CoreUse() for rank in timing.ranks}
    alone = simulate(schedule, replace(timing, shared=SharedCores(8, (1.0,), workers)))
    late = simulate(schedule, replace(timing, shared=SharedCores(8, (1.0,), workers, late_s=0.5)))
    # Nothing was measured of messages of devices that are no workers here.
    others = SharedCores(8, (1.0,), {}, send_s=0.1, receive_s=0.2, late_s=0.5)
    assert simulate(schedule, replace(timing, shared=others)).ends_s == simulate(schedule, timing).ends_s
    first = next(at for at, action in enumerate(schedule.actions[1]) if action.kind == "R")
    assert late.ends_s[1][first] == pytest.approx(alone.ends_s[1][first] + 0.5)
    assert late.step_s > alone.step_s and late.send_s == pytest.approx(alone.send_s)


def test_a_worker_alone_has_the_cores_to_itself() -> None:
    assert side_by_side(1.0, 1.5, cores=2, workers=1) == pytest.approx(5.0)
