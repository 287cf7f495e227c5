"""Formats chosen under an error budget: the programme, what is measured, and the plans that come out."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_samples import calibration
from torch import nn

import graphpar
from graphpar import cli, planner
from graphpar.calibration import Calibration, Grid, fingerprint
from graphpar.explanation.page import format_explanation
from graphpar.partition.formats import (
    FormatProblem,
    StageRun,
    choose_formats,
    errors_of,
    looser,
    step_of,
    tighter,
)
from graphpar.precision import sensitivity
from graphpar.precision.sensitivity import Sensitivities, measure_sensitivities
from graphpar.preparation import prepare, trial_of
from graphpar.runtime.true_error import TrueError
from graphpar.training import Training
from graphpar.verify import verify


class Net(nn.Module):
    """Layers with a narrow place between each two, so that each is a unit."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(layers))
        self.head = nn.Linear(64, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        return nn.functional.mse_loss(self.head(x), y)


torch.manual_seed(0)
MODEL = Net()
BATCH = (torch.randn(64, 64), torch.randn(64, 2))
TRAINING = Training(optimizer=lambda p: torch.optim.SGD(p, lr=0.05))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def slow_cluster(count: int = 1, **more: float) -> dict[str, object]:
    """Devices so slow in float32 that even tiny products gain from a lower format."""
    kind = {
        "name": "slow",
        "peak_flops_per_s": {"float32": 1e8, "bfloat16": 1e10, "float16": 1e10, **more},
        "memory_bytes": 1e10,
        "memory_bytes_per_s": 1e11,
        "family": "cpu",
    }
    return {"devices": [{"kind": kind, "count": count}]}


def plan(budget: float, count: int = 1) -> graphpar.Plan:
    return graphpar.plan(
        MODEL, slow_cluster(count), BATCH, train=TRAINING, precision="auto", precision_budget=budget
    )


# --- the programme ---

SECONDS = st.floats(0.1, 10.0)
ERRORS = st.just(0.0) | st.floats(1e-6, 1.0)
KNOWN = ("float32", "bfloat16", "float16", "float8_e4m3fn")


@st.composite
def problems(draw: st.DrawFn) -> FormatProblem:
    units = draw(st.integers(1, 4))
    cut = draw(st.integers(0, units - 1))
    microbatches = draw(st.integers(1, 3))
    bounds = [(0, cut), (cut, units)] if cut else [(0, units)]
    stages = tuple(
        StageRun(
            0, first, last, microbatches,
            tuple({f: draw(SECONDS) for f in KNOWN} for _ in range(first, last)),
            tuple(draw(st.floats(0.0, 1.0)) for _ in range(first, last)),
        )
        for first, last in bounds
    )  # fmt: skip
    errors = tuple({f: (draw(ERRORS), draw(ERRORS)) for f in KNOWN[1:]} for _ in range(units))
    return FormatProblem(stages, (microbatches,), errors)


@given(problems(), st.just(0.0) | st.floats(1e-6, 2.0))
@settings(max_examples=25, deadline=None)
def test_the_choice_is_the_best_of_all(problem: FormatProblem, budget: float) -> None:
    picks = [list(itertools.product(KNOWN, repeat=len(run.seconds))) for run in problem.stages]
    allowed = [c for c in itertools.product(*picks) if max(errors_of(problem, c)) <= budget]
    best = min(step_of(problem, c) for c in allowed)
    found = choose_formats(problem, budget)
    assert max(found.errors) <= budget * (1 + 1e-6)
    assert found.step_s <= best * (1 + 1e-6)
    more = looser(problem, found)
    faster = [c for c in itertools.product(*picks) if step_of(problem, c) < found.step_s * (1 - 2e-3)]
    assert (more is not None) or not faster
    if more is not None:
        assert more[0] > budget * (1 - 1e-6) and more[1].step_s < found.step_s
    less = tighter(problem, found)
    assert (less is None) == (max(found.errors) == 0)
    if less is not None:
        assert less[0] < max(found.errors) and less[1].step_s >= found.step_s * (1 - 1e-6)


# --- what is measured ---


def test_errors_are_those_of_rounding_and_kept_for_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = trial_of(MODEL, prepare(MODEL, BATCH, {}, TRAINING), TRAINING)
    found = measure_sensitivities(trial, BATCH, {}, ("bfloat16", "float16"))
    assert set(found.sources["bfloat16"]) == {"measured"}
    for f, roundoff in (("bfloat16", 2**-8), ("float16", 2**-11)):
        gradient = [e[1] for e in found.errors[f]]
        assert 0 < max(gradient) < 4 * roundoff
    monkeypatch.setattr(sensitivity, "_Runs", None)
    assert measure_sensitivities(trial, BATCH, {}, ("bfloat16", "float16")) == found


def test_what_time_does_not_allow_is_said() -> None:
    trial = trial_of(MODEL, prepare(MODEL, BATCH, {}, TRAINING), TRAINING)
    found = measure_sensitivities(trial, BATCH, {}, ("bfloat16",), budget_s=0.0)
    assert set(found.sources["bfloat16"]) == {"estimated"}
    assert "did not fit into 0 s" in found.note


# --- plans ---


def test_budgets_are_kept_and_looser_ones_are_never_slower() -> None:
    steps = []
    for budget in (0.0, 5e-4, 1e-2, 1.0):
        made = plan(budget)
        report = made.error_budget
        assert report is not None and report.budget == budget
        assert report.measured_output_error is not None and report.measured_gradient_error is not None
        assert max(report.measured_output_error, report.measured_gradient_error) <= budget
        assert report.looser is None or report.looser.budget >= budget
        spent = max(report.measured_output_error, report.measured_gradient_error)
        assert report.tighter is None or report.tighter.budget < spent
        assert made.bound_s <= made.partition.objective_s
        steps.append(made.partition.objective_s)
        formats = {f for p in made.partition.pipelines for s in p.stages for f in s.formats}
        if budget == 0:
            assert formats == {"float32"} and any("all stay in float32" in n for n in made.notes)
        if budget == 1.0:
            assert "float32" not in formats
            assert made.status == "optimal" or made.gap < 0.2
    assert steps == sorted(steps, reverse=True) and steps[-1] < steps[0] / 3


def test_8_bits_are_chosen_where_the_budget_allows_them() -> None:
    """On devices that multiply in 8 bits ten times as fast; errors are those of the emulation."""
    cluster = slow_cluster(bfloat16=1e9, float16=1e9, float8_e4m3fn=1e10)
    chosen, steps = [], []
    for budget in (1e-2, 0.1):
        made = graphpar.plan(
            MODEL, cluster, BATCH, train=TRAINING, precision="auto", precision_budget=budget
        )
        report = made.error_budget
        assert report is not None and report.measured_gradient_error is not None
        assert report.measured_gradient_error <= budget
        units = [row for row in report.units if row.format == "float8_e4m3fn"]
        assert all(row.source == "measured" and row.gradient_error > 2.0**-7 for row in units)
        chosen.append(len(units))
        steps.append(made.partition.objective_s)
    assert chosen[0] == 0 < chosen[1] and steps[1] < steps[0]


@pytest.mark.parametrize("factor", [0.25, 2.0])
def test_what_is_measured_corrects_what_was_estimated(
    factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimates are wrong by a factor; still the errors of the whole keep the budget, and fill it."""
    true = measure_sensitivities

    def wrong(*args: Any, **kwargs: Any) -> Sensitivities:
        found = true(*args, **kwargs)
        errors = {f: tuple((o * factor, g * factor) for o, g in rows) for f, rows in found.errors.items()}
        return Sensitivities(errors, found.sources, found.samples, found.note)

    monkeypatch.setattr(planner, "measure_sensitivities", wrong)
    report = plan(6e-4).error_budget
    assert report is not None and report.measured_gradient_error is not None
    assert 3e-4 < report.measured_gradient_error <= 6e-4


def test_a_plan_tells_its_budget_and_survives_its_file(tmp_path: Path) -> None:
    made = plan(5e-3, count=2)
    assert made == graphpar.Plan.load(made.save(tmp_path / "plan.json"))
    page = " ".join(str(made).split())
    assert "error budget 0.005" in page and "the next tighter budget" in page and "(measured)" in page
    assert made.options["precision_budget"] == 5e-3
    why = " ".join(format_explanation(made).split())
    assert "number formats" in why and "the next tighter budget" in why


def test_without_weights_errors_are_estimated() -> None:
    with torch.device("meta"):
        model, batch = Net(), (torch.empty(64, 64), torch.empty(64, 2))
    made = graphpar.plan(model, slow_cluster(), batch, train=TRAINING, precision="auto")
    assert made.error_budget is not None
    assert made.error_budget.measured_output_error is None
    assert "no weights" in made.error_budget.note


def test_an_unmeasured_cpu_says_so() -> None:
    made = graphpar.plan(MODEL, {"devices": [{"kind": "cpu"}]}, BATCH, train=TRAINING, precision="auto")
    assert any("graphpar calibrate" in note for note in made.notes)


@pytest.mark.parametrize("budget", [-1.0, math.nan, math.inf, True, "0.01"])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(ValueError, match="precision_budget is"):
        plan(budget)


def test_a_batch_that_nothing_can_be_measured_on() -> None:
    spoilt = (BATCH[0].clone(), BATCH[1])
    spoilt[0][2, 3] = math.nan
    with pytest.raises(ValueError, match=r"Input 'args_0' of the example batch holds 1 NaN"):
        graphpar.plan(MODEL, slow_cluster(), spoilt, train=TRAINING, precision="auto")
    spoilt[0][2, 3] = math.inf
    with pytest.raises(ValueError, match=r"not finite in float32"):
        graphpar.plan(MODEL, slow_cluster(), spoilt, train=TRAINING, precision="auto")


def fast_lower_cpu() -> Calibration:
    """A made-up measurement: bfloat16 products a hundred times as fast as float32's."""
    rate, fast = (Grid((1.0, 64.0), (8.0, 64.0), ((r, r), (r, r))) for r in (1e6, 1e8))
    return calibration(float32=rate, bfloat16=fast)


@pytest.mark.distributed
def test_the_first_step_tells_the_true_error() -> None:
    cpus = {"devices": [{"kind": "cpu", "count": 2}]}
    with graphpar.compile(
        MODEL, cpus, BATCH, train=TRAINING, precision="auto", calibration=fast_lower_cpu()
    ) as job:
        formats = {f for p in job.plan.partition.pipelines for s in p.stages for f in s.formats}
        assert "bfloat16" in formats
        before = job.true_error
        assert before is None
        job.step(*BATCH)
        told = job.true_error
        assert told is not None and told.kept and told.gradient_norm is not None
        assert 0 < told.output <= told.budget == 1e-2
        job.step(*BATCH)
        assert job.true_error is told
        report = verify(MODEL, cpus, BATCH, train=TRAINING, plan=job.plan)
    assert report.equal and report.rounding > 1e-2


NET = """
from test_auto_precision import BATCH, Net

def build():
    return Net()

def example_inputs(batch_size, seq_len):
    return BATCH
"""


@pytest.mark.distributed
def test_run_prints_the_true_error_beside_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace(fast_lower_cpu(), fingerprint=fingerprint()).save()
    (tmp_path / "the_net.py").write_text(NET)
    (tmp_path / "cluster.yaml").write_text("devices: [{kind: cpu}]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    asked = "run the_net:build --cluster cluster.yaml --batch-size 64 --train --steps 1 --precision auto"
    told = []
    for budget in ("1e-2", "1e-9"):
        arguments = (*asked.split(), "--precision-budget", budget, "--view", f"{budget}.html")
        assert cli.run(arguments, cli.Settings()) == 0
        told.append(capsys.readouterr().out)
        assert '"first_step_kept":true' in (tmp_path / f"{budget}.html").read_text(encoding="utf-8")
    assert re.search(r"error budget 0\.01: the first step was off by 0\.\d+ in its result", told[0])
    assert re.search(r"error budget 1e-09: the first step was off by .* \(0 estimated\)", told[1])


def test_an_error_that_is_no_number_breaks_the_budget() -> None:
    for broken in (TrueError(1.0, (0.0, 0.0), 0.1, math.nan), TrueError(1.0, (0.0, 0.0), math.nan, 0.1)):
        assert not broken.kept


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.0, 3e-4, 5e-4, 2e-3])
def test_the_next_budgets_buy_what_they_say(budget: float) -> None:
    """Planned anew at each of them; between what was measured and the budget nothing changes."""
    made = plan(budget)
    report = made.error_budget
    assert report is not None and report.measured_gradient_error is not None
    assert report.measured_output_error is not None
    spent = max(report.measured_output_error, report.measured_gradient_error)
    if spent > 0:
        assert plan(spent * 1.001).partition.pipelines == made.partition.pipelines
    if report.looser is not None:
        assert report.looser.budget > budget
        more = plan(report.looser.budget * 1.2).error_budget
        assert more is not None and more.step_s <= report.looser.step_s * 1.01
    if report.tighter is not None:
        assert report.tighter.budget < spent
        less = plan(min(report.tighter.budget * 1.1, spent * 0.999)).error_budget
        assert less is not None and report.step_s < less.step_s


class Wide(nn.Module):
    """A residual perceptron: one sample leaves a second device only a part of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(x + self.down(self.up(self.norm(x)).relu()), y)


@pytest.mark.slow
@pytest.mark.distributed
def test_formats_are_chosen_for_a_tensor_group_and_run_in_it() -> None:
    torch.manual_seed(0)
    model, batch = Wide(), (torch.randn(1, 16, 64), torch.randn(1, 16, 64))
    cpus = {"devices": [{"kind": "cpu", "count": 2}]}
    with graphpar.compile(
        model, cpus, batch, train=TRAINING, precision="auto", precision_budget=3e-2, tensor="auto",
        calibration=fast_lower_cpu(),
    ) as job:  # fmt: skip
        (pipeline,) = job.plan.partition.pipelines
        assert any(replica.others for stage in pipeline.stages for replica in stage.replicas)
        assert "bfloat16" in {f for stage in pipeline.stages for f in stage.formats}
        report = job.plan.error_budget
        assert report is not None and report.measured_gradient_error is not None
        assert 0 < report.measured_gradient_error <= 3e-2
        assert any(p.slices for p in job._trained_on.placements), "nothing is divided"
        loss = float(job.step(*batch).detach())
        told = job.true_error
        assert told is not None and told.kept
    assert loss == pytest.approx(float(model(*batch).detach()), rel=1e-2) and told.output > 0


def test_a_group_saves_what_its_members_save() -> None:
    """Each computes half, so that a lower format saves less time than alone, of as many bytes."""
    batch = (torch.randn(1, 16, 64), torch.randn(1, 16, 64))
    saved = []
    for count in (1, 2):
        made = graphpar.plan(
            Wide(), {"devices": [{"kind": "cpu", "count": count}]}, batch, train=TRAINING, tensor="auto",
            precision="auto", precision_budget=3e-2, calibration=fast_lower_cpu(), measure_s=0,
        )  # fmt: skip
        report = made.error_budget
        assert report is not None and report.units
        saved.append([sum(getattr(u, n) for u in report.units) for n in ("saved_s", "saved_bytes")])
    (alone_s, alone_bytes), (group_s, group_bytes) = saved
    assert made.partition.pipelines[0].stages[0].replicas[0].others
    assert 0.2 * alone_s < group_s < 0.8 * alone_s
    assert group_bytes == pytest.approx(alone_bytes, rel=0.3) and group_bytes != alone_bytes


def test_groups_are_chosen_where_the_measured_loopback_is_slower_than_the_catalogues() -> None:
    batch = (torch.randn(1, 16, 64), torch.randn(1, 16, 64))
    cpus = {"devices": [{"kind": "cpu", "count": 2}]}
    made = graphpar.plan(
        Wide(), cpus, batch, train=TRAINING, tensor="auto", calibration=fast_lower_cpu(), measure_s=0
    )
    (stage,) = made.partition.pipelines[0].stages
    assert stage.replicas[0].devices == ("local/0", "local/1")
