"""Stages of a plan are tried as they will run; what was measured takes the place of what was priced."""

import time
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn

import graphpar
from graphpar.cluster import Cluster
from graphpar.cores import CoreUse, SharedCores
from graphpar.cost_models.measured import StageSeconds, StageTiming
from graphpar.local.kept import NotTimedError
from graphpar.local.stage_timing import retimed, time_stages, timed_stages
from graphpar.local.timing import Example, Timings
from graphpar.local.trial_worker import TrialModel
from graphpar.partition.types import Partition, Replica, ScheduleName
from graphpar.planner import plan_of, price
from graphpar.preparation import Prepared, lower, prepare
from graphpar.runtime.passes import Passes
from graphpar.schedule.timing import RankTiming, SizeTiming, Timing

TRAINING = graphpar.Training(optimizer=torch.optim.AdamW, loss=nn.functional.mse_loss)
SLOWDOWNS = {"local/0": 1.0, "local/1": 2.0}
CLUSTER = {"devices": [{"kind": "cpu", "threads": 1}, {"kind": "cpu", "threads": 1, "slowdown": 2.0}]}


@cache
def model_and_batch() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    layers = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(16, 4)), (torch.randn(8, 16), torch.randn(8, 4))


@cache
def planned() -> graphpar.Plan:
    model, batch = model_and_batch()
    return graphpar.plan(model, CLUSTER, batch, train=TRAINING, measure_s=0)


@cache
def prepared() -> Prepared:
    return prepare(*model_and_batch(), {}, TRAINING)


def two_stages(plan: graphpar.Plan, precision: str = "float32") -> Partition:
    """The model cut in the middle, a stage for each device."""
    (pipeline, *_), last = plan.partition.pipelines, len(plan.units)
    stage, cut = pipeline.stages[0], last // 2
    stages = (
        replace(stage, first=0, last=cut, replicas=(Replica("local/0", 2),), precision=precision),
        replace(stage, first=cut, last=last, replicas=(Replica("local/1", 2),), precision=precision),
    )
    one = replace(pipeline, samples=8, microbatches=2, stages=stages)
    return replace(plan.partition, pipelines=(one,))


def timing_of_two(found: Partition) -> Timing:
    row = SizeTiming(4, forward_s=1e-4, backward_s=2e-4)
    ranks = tuple(RankTiming(device, "local", (row,), optimizer_s=1e-4) for device in SLOWDOWNS)
    return Timing(ranks, (), graphpar.plan(*_tiny()).timing.network)


def _tiny() -> tuple[nn.Module, dict[str, object], tuple[torch.Tensor]]:
    return nn.Linear(2, 2), {"devices": [{"kind": "cpu"}]}, (torch.randn(2, 2),)


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_stage_is_timed_in_its_format_and_the_model_is_left_alone(precision: str) -> None:
    model, batch = model_and_batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = planned()
    found = two_stages(plan, precision)
    trial = TrialModel(model, prepared(), batch, {}, TRAINING)
    measured = time_stages(trial, found, timing_of_two(found), SLOWDOWNS, 5.0)
    assert measured.update >= 1
    assert [(r.stage, r.slowdown, r.size) for r in measured.rows] == [(0, 1.0, 4), (1, 2.0, 4)]
    assert all(r.forward_s > 0 and r.backward_s > 0 for r in measured.rows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.distributed
def test_stages_that_do_more_than_pass_through_keep_their_prices() -> None:
    model, batch = model_and_batch()
    found = two_stages(planned())
    (pipeline,) = found.pipelines
    first, second = pipeline.stages
    again = replace(pipeline, stages=(replace(first, recompute=True), second))
    found = replace(found, pipelines=(again,))
    trial = TrialModel(model, prepared(), batch, {}, TRAINING)
    measured = time_stages(trial, found, timing_of_two(found), SLOWDOWNS, 5.0)
    assert [r.stage for r in measured.rows] == [1]


def test_nothing_is_tried_that_takes_too_long_or_runs_elsewhere() -> None:
    model, batch = model_and_batch()
    found = two_stages(planned())
    trial = TrialModel(model, prepared(), batch, {}, TRAINING)
    with pytest.raises(NotTimedError, match="longer than the 1e-09 s"):
        time_stages(trial, found, timing_of_two(found), SLOWDOWNS, 1e-9)
    with pytest.raises(NotTimedError, match="run elsewhere"):
        time_stages(trial, found, timing_of_two(found), {"local/0": 1.0}, 5.0)


def test_measured_seconds_take_the_place_of_priced_ones_in_proportion() -> None:
    found = two_stages(planned())
    sizes = (
        SizeTiming(3, 3.0, 6.0, saved_bytes=5.0, weight_s=2.0, split_s=0.5),
        SizeTiming(4, 4.0, 8.0, saved_bytes=7.0, weight_s=3.0, split_s=0.5),
    )
    ranks = tuple(RankTiming(device, "local", sizes, optimizer_s=1.0) for device in SLOWDOWNS)
    timing = replace(timing_of_two(found), ranks=ranks)
    measured = StageTiming((StageSeconds(1, 2.0, 4, 2.5, 6.0),), 1.25, 1.0)
    first, second = retimed(timing, found, measured, SLOWDOWNS).ranks
    assert first == replace(ranks[0], optimizer_s=1.25)
    at_four, at_three = second.at_size(4), second.at_size(3)
    assert (at_four.forward_s, at_four.backward_s) == (5.0, 12.0)
    assert (at_three.forward_s, at_three.backward_s) == (3.75, 9.0)
    assert (at_four.weight_s, at_four.split_s, at_four.saved_bytes) == (4.5, 0.75, 7.0)


def test_what_neighbours_cost_is_not_counted_twice() -> None:
    """The simulator adds it: what was measured beside as much work as there will be stays what it was."""
    rows = (StageSeconds(0, 1.0, 4, 1.2, 2.4),)
    measured = StageTiming(rows, 1.5, 1.0, beside=0.5, update_beside=1.0)
    alone = measured.as_alone(SharedCores(3, (1.0, 1.4, 1.6), {}))
    assert (alone.rows[0].forward_s, alone.rows[0].backward_s) == pytest.approx((1.0, 2.0))
    assert alone.update == pytest.approx(1.5 / 1.4)
    assert measured.as_alone(SharedCores(1, (1.0,), {})).rows == rows == measured.as_alone(None).rows


def test_times_of_one_way_to_train_are_not_used_for_another() -> None:
    model, batch = model_and_batch()
    captured = prepared()
    ways = [
        TRAINING,
        replace(TRAINING, optimizer=torch.optim.SGD),
        replace(TRAINING, max_grad_norm=1.0),
        replace(TRAINING, optimizer=torch.optim.AdamW),
    ]
    first, *others, again = [TrialModel(model, captured, batch, {}, way).key("m") for way in ways]
    assert first == again and first not in others


def test_times_that_had_less_to_spend_are_not_used_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    monkeypatch.setattr(
        "graphpar.local.stage_timing.kept_or_fresh", lambda _, key, *more: keys.append(key)
    )
    model, batch = model_and_batch()
    found = two_stages(planned())
    trial = TrialModel(model, prepared(), batch, {}, TRAINING)
    for budget_s in (0.1, 3.0, 0.1):
        timed_stages(trial, "m", found, timing_of_two(found), SLOWDOWNS, budget_s)
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize(("memory_copies", "tried"), [(3.9, False), (4.1, True)])
def test_stages_are_tried_where_half_of_the_memory_holds_all_copies(
    monkeypatch: pytest.MonkeyPatch, memory_copies: float, tried: bool
) -> None:
    model, batch = model_and_batch()
    plan = planned()
    here = Cluster.from_dict(CLUSTER)
    held_bytes = (2 + 2) * sum(p.nbytes for p in model.parameters())  # gradients, and Adam's two
    asked: list[object] = []
    monkeypatch.setattr("graphpar.local.timing.system_memory_bytes", lambda _: memory_copies * held_bytes)
    monkeypatch.setattr("graphpar.local.timing._workers_here", lambda *_: here.devices)

    def time_nothing(*how: object) -> StageTiming:
        asked.append(how)
        raise NotTimedError("of this test")

    monkeypatch.setattr("graphpar.local.timing.timed_stages", time_nothing)
    captured, example = prepared(), Example(model, batch, {})
    priced = partial(price, captured, train=TRAINING, calibration=None)
    wanted = Timings(captured, example, TRAINING, "float32", 3.0, 2.0, lambda c, f: priced(c, formats=f))
    timing, why_not = wanted.retimed(here, None, plan.partition, plan.timing)
    assert timing is plan.timing
    assert bool(asked) is tried
    assert why_not == (
        "of this test" if tried else "2 copies of it would take more than half of the memory"
    )


@pytest.mark.parametrize("longer", [1.0, 2.0])
def test_a_plan_says_that_its_stages_were_tried(longer: float) -> None:
    plan = planned()
    captured, cluster = prepared(), Cluster.from_dict(CLUSTER)
    table = price(captured, cluster, train=TRAINING, calibration=None)

    def retime(_: Partition, timing: Timing) -> tuple[Timing, str]:
        ranks = (replace(rank, optimizer_s=rank.optimizer_s * longer) for rank in timing.ranks)
        return replace(timing, ranks=tuple(ranks)), "" if longer > 1 else "too long"

    again = plan_of(captured, cluster, table, plan.partition, train=TRAINING, retime=retime)
    assert any("when they were tried" in text for text in again.assumptions) is (longer > 1)
    assert any("were not tried (too long)" in text for text in again.assumptions) is (longer == 1)


@pytest.mark.parametrize(("times", "told"), [(1.0, ""), (0.5, "longer"), (2.0, "50 % shorter")])
def test_a_plan_says_that_its_formula_is_not_the_played_step(times: float, told: str) -> None:
    model, batch = model_and_batch()
    found = graphpar.plan(model, CLUSTER, batch, train=TRAINING, measure_s=0)
    prepared, cluster = prepare(model, batch, {}, TRAINING), Cluster.from_dict(CLUSTER)
    table = price(prepared, cluster, train=TRAINING, calibration=None)
    partition = replace(found.partition, objective_s=found.predicted_step_s * times)
    again = plan_of(prepared, cluster, table, partition, train=TRAINING)
    said = [text for text in again.assumptions if "programme's formula" in text]
    assert len(said) == bool(told) and told in "".join(said)


def test_a_plan_says_what_its_step_was_when_it_was_chosen() -> None:
    model, batch = model_and_batch()
    found = two_stages(graphpar.plan(model, CLUSTER, batch, train=TRAINING, measure_s=0))
    prepared, cluster = prepare(model, batch, {}, TRAINING), Cluster.from_dict(CLUSTER)
    table = price(prepared, cluster, train=TRAINING, calibration=None)
    schedules: dict[ScheduleName, str] = {
        "1f1b": "shorter than by the programme's formula; the gap and the bound are about the formula",
        "zero-bubble": "shorter than when the plan was chosen",
    }
    for schedule, told in schedules.items():
        partition = replace(found, schedule=schedule, objective_s=1e3)
        said = plan_of(prepared, cluster, table, partition, train=TRAINING).assumptions
        assert [told in text for text in said if "played through action by action" in text] == [True]


@pytest.mark.parametrize("tried", [("local/0",), ("local/0", "local/1")])
def test_a_plan_names_the_workers_whose_stages_were_not_tried(tried: tuple[str, ...]) -> None:
    found = two_stages(planned())
    captured, cluster = prepared(), Cluster.from_dict(CLUSTER)
    table = price(captured, cluster, train=TRAINING, calibration=None)
    workers = {device: CoreUse(slowdown=slowdown) for device, slowdown in SLOWDOWNS.items()}
    table = replace(table, shared=SharedCores(2, (1.0, 1.0), workers))
    rows = tuple(
        StageSeconds(k, SLOWDOWNS[d], 4, 9.0, 9.0) for k, d in enumerate(SLOWDOWNS) if d in tried
    )

    def retime(partition: Partition, timing: Timing) -> tuple[Timing, str]:
        return retimed(timing, partition, StageTiming(rows, 1.0, 1.0), SLOWDOWNS), ""

    plan = plan_of(captured, cluster, table, found, train=TRAINING, retime=retime)
    said = [text for text in plan.assumptions if "were not tried" in text]
    assert bool(said) is (len(tried) == 1)
    assert all("local/1" in text and "local/0" not in text for text in said)


def test_a_step_casts_its_weights_anew() -> None:
    model, batch = model_and_batch()
    found = two_stages(planned(), "bfloat16")
    captured = prepared()
    (pipeline,) = found.pipelines
    stages = tuple(
        replace(stage, replicas=(Replica(f"local/{k}", 1),)) for k, stage in enumerate(pipeline.stages)
    )
    pipeline = replace(pipeline, microbatches=1, stages=stages)
    alone = replace(found, pipelines=(pipeline,), schedule="gpipe")
    lowered = lower(captured.graph, alone, training=True)
    (program, *_) = lowered.programs(lowered.schedule(1), 1)
    trial = TrialModel(model, captured, batch, {}, TRAINING)
    weights = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    passes = Passes(program, 2, weights, torch.device("cpu"), time.thread_time)
    gradients = []
    for _ in range(2):
        passes.run(trial.inputs(8), 8, [1.0, 1.0], whole_step=True)
        gradients.append([weight.grad for weight in weights.values() if weight.grad is not None])
        for weight in weights.values():
            weight.data.mul_(2.0)  # as some optimisers write, which leaves no trace
    pairs = list(zip(*gradients, strict=True))
    assert len(pairs) == len(weights) and not any(torch.equal(*pair) for pair in pairs)
