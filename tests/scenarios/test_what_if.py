"""Studies of a tiny model: every question planned anew, kept, written, drawn."""

import csv
import dataclasses
import io
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_samples import calibration
from torch import nn
from torch.nn import functional

import graphpar
from graphpar.cost import LinkCost
from graphpar.partition.certificate import BEYOND
from graphpar.partition.types import ScheduleName
from graphpar.planner import price
from graphpar.precision.formats import uniform_formats
from graphpar.preparation import prepare
from graphpar.scenarios.api import baseline_setting
from graphpar.scenarios.asked import as_scenarios
from graphpar.scenarios.cache import AnswerCache
from graphpar.scenarios.changes import apply
from graphpar.scenarios.dominance import covers
from graphpar.scenarios.group_prices import divided, priced_together
from graphpar.scenarios.naming import numbered
from graphpar.scenarios.pricing import PriceBook, training_of
from graphpar.scenarios.report import worth_lines
from graphpar.scenarios.solve import solve_together
from graphpar.scenarios.study import Limits, Solver, _better
from graphpar.scenarios.task import Task
from graphpar.scenarios.types import Answer, KnownPlan, Setting
from graphpar.scenarios.worth import shadow_prices

CLUSTER: dict[str, Any] = {
    "nodes": [
        {"name": "a", "devices": {"kind": "v100-sxm2-16gb", "count": 2}},
        {"name": "b", "devices": {"kind": "t4", "count": 1}},
    ],
    "network": {"bytes_per_s": 1e9, "latency_s": 1e-5},
}


def model() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(64, 64), nn.ReLU())))


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(batch, 64, device="meta"), torch.empty(batch, 64, device="meta")


TRAINING = graphpar.Training(
    optimizer=torch.optim.AdamW, loss=lambda out, target: ((out - target) ** 2).mean()
)


def ask(scenarios: Any = (), **options: Any) -> graphpar.Study:
    chosen = {"cache": False, "processes": 1, "time_limit_s": 1.0, "gap": 0.1, "train": TRAINING}
    return graphpar.what_if(model(), CLUSTER, scenarios, args=inputs(16), **{**chosen, **options})


@pytest.fixture(scope="module")
def study() -> graphpar.Study:
    asked = {
        "no t4": "drop b",
        "faster": ["replace a with h100-sxm-80gb", "set network.bytes_per_s=25e9"],
        "plain": "set optimizer=sgd",
        "wrong": "drop c",
    }
    return ask(asked, sweep={"batch": [16, 48]}, leave_out=True, prices={"a": 4.0, "b": 1.0})


@pytest.mark.parametrize("change", ["add t4 to b", "set b.count=9"])
def test_what_was_priced_before_changes_no_price(change: str) -> None:
    train = dataclasses.replace(TRAINING, zero=1)
    cluster = graphpar.Cluster.from_dict({**CLUSTER, "nodes": CLUSTER["nodes"][1:]})
    base = baseline_setting(cluster, 16, train)
    changed = apply(base, [change])
    with torch.device("meta"):
        narrow = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64))
    used, fresh = (PriceBook(narrow, inputs(16), {}, train) for _ in range(2))
    used.table(base)
    assert used.table(changed) == fresh.table(changed)


FORMS = (
    "set a.slowdown=3",
    "set a/1.slowdown=1.7; set a/0.memory_bytes=9e9",
    "replace a with cpu; replace b with cpu; set batch=24; set precision=float16",
    "set optimizer=sgd; set b.memory_bytes=1e9",
    "replace b with a100-sxm-80gb; set precision=bfloat16; set batch=5",
)


def contrasted(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A loss in which all samples of the batch meet at the end."""
    return functional.cross_entropy(out @ target.t(), torch.arange(len(out)))


def normed() -> nn.Module:
    """Samples meet in the middle of the model."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))


MEETS = {
    "nowhere": (model, TRAINING),
    "at the end": (model, dataclasses.replace(TRAINING, loss=contrasted)),
    "in the middle": (normed, TRAINING),
}


@pytest.fixture(scope="module")
def used_books() -> dict[str, PriceBook]:
    """Prices that whole studies share, of models whose samples meet somewhere or do not."""

    def made(batch: int, _: int) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        return inputs(batch), {}

    return {
        name: PriceBook(make(), inputs(16), {}, train, inputs=made)
        for name, (make, train) in MEETS.items()
    }


@pytest.mark.parametrize("meet", MEETS)
@pytest.mark.parametrize("changes", FORMS)
def test_shared_prices_are_those_of_the_setting_alone(
    used_books: dict[str, PriceBook], changes: str, meet: str
) -> None:
    base = baseline_setting(graphpar.Cluster.from_dict(CLUSTER), 16, TRAINING)
    (scenario,) = as_scenarios([changes])
    setting = apply(base, scenario.changes)
    used_books[meet].table(base)
    shared = used_books[meet].table(setting)
    make, given = MEETS[meet]
    train = training_of(given, setting.optimizer)
    prepared = prepare(make(), inputs(setting.batch), {}, train)
    assert (prepared.tail_reason != "", prepared.in_step_reason != "", prepared.batch_reason) == (
        meet == "at the end", meet == "in the middle", "",
    )  # fmt: skip
    units = len(prepared.chain.units)
    formats = uniform_formats(setting.cluster, setting.precision, units)
    alone = price(prepared, setting.cluster, train=train, calibration=None, formats=formats)
    assert (shared.costs, shared.sizes, shared.units) == (alone.costs, alone.sizes, alone.units)
    for mine, other in zip(shared.device_classes, alone.device_classes, strict=True):
        assert mine.stage_overhead_s == pytest.approx(other.stage_overhead_s)
        plain = {"stage_overhead_s": 0.0}
        assert dataclasses.replace(mine, **plain) == dataclasses.replace(other, **plain)  # type: ignore[arg-type]
    same = {"costs": (), "device_classes": (), "modes": ()}
    rest = (dataclasses.replace(table, **same) for table in (shared, alone))  # type: ignore[arg-type]
    assert next(rest) == next(rest)


def test_tensor_groups_are_priced_once_for_each_shape_and_as_alone() -> None:
    cluster = graphpar.Cluster.from_dict(
        {"nodes": [{"name": "b", "devices": {"kind": "l4", "count": 4}}]}
    )
    base = baseline_setting(cluster, 16, TRAINING, tensor="auto")
    used, fresh = (PriceBook(model(), inputs(16), {}, TRAINING) for _ in range(2))
    for before in ("set batch=16", "set b.count=3", "set batch=48"):
        used.table(apply(base, [before]))
    changed = apply(base, ["set b.count=6", "set batch=48"])
    mine, other = used.table(changed), fresh.table(changed)
    assert {len(mode.members) for mode in mine.modes} > {2, 4}
    assert mine == other
    known = len(used._groups)
    used.table(apply(base, ["set b.count=5", "set batch=48"]))
    assert len(used._groups) == known + 1, "groups of five, which there were none of before"


def test_tensor_groups_have_the_same_prices_from_other_processes() -> None:
    nodes = [{"name": n, "devices": {"kind": "l4", "count": 3}} for n in "ab"]
    cluster = {**CLUSTER, "nodes": nodes}
    base = baseline_setting(graphpar.Cluster.from_dict(cluster), 16, TRAINING, tensor="auto")
    asked = [apply(base, [f"set batch={b}", f"set a.count={n}"]) for b in (16, 48) for n in (3, 4)]
    book, fresh = (PriceBook(model(), inputs(16), {}, TRAINING) for _ in range(2))
    tasks = book.unpriced_groups(asked)
    parts = divided(tasks, 2)
    assert sorted(key for part in parts for key in part) == sorted(tasks) and len(parts) == 2
    for part in parts:
        sent = pickle.loads(pickle.dumps([tasks[key] for key in part]))
        book.learn_groups(list(zip(part, sent, priced_together(sent), strict=True)))
    assert not book.unpriced_groups(asked)
    known = dict(book._groups)
    assert all(book.table(setting) == fresh.table(setting) for setting in asked)
    assert book._groups == known, "nothing was priced again"


def here(link: str | dict[str, float]) -> Setting:
    nodes = [{"name": "a", "devices": {"kind": "cpu", "count": 2}, "link": link}]
    return baseline_setting(graphpar.Cluster.from_dict({"nodes": nodes}), 16, TRAINING)


def test_links_of_this_machine_are_told_from_emulated_ones_of_any_speed() -> None:
    measured = dataclasses.replace(calibration(), late_s=2e-4)
    book = PriceBook(model(), inputs(16), {}, TRAINING, measured)
    real, fast = here("loopback"), here({"bytes_per_s": 1e12, "latency_s": 1e-9})
    late = [shared.late_s for s in (real, fast, real) if (shared := book.table(s).shared)]
    assert late == [0.0, 2e-4, 0.0]
    assert not covers(fast, real) and covers(fast, apply(fast, ["set a.link.bytes_per_s=1e11"]))


def test_more_bandwidth_of_this_machine_is_more_than_was_measured() -> None:
    # Slower than the catalogue has it.
    measured = dataclasses.replace(calibration(), loopback=LinkCost(1e-3, 1e9))
    solver = Solver(
        PriceBook(model(), inputs(16), {}, TRAINING, measured), Limits(0.1, 0.3, 1), AnswerCache(None)
    )
    real = here("loopback")
    (first,) = solver.answers([real])
    shadow_prices(solver, real, first)
    links = [setting.cluster.node("a").link for setting in solver._settings.values()]
    assert {link.cost for link in links} == {real.cluster.node("a").link.cost, LinkCost(1e-3, 1.1e9)}
    faster = next(s for s in solver._settings.values() if s.cluster.node("a").link.kind == "")
    priced = solver.book.with_links_as_priced(real)
    assert covers(faster, priced) and not covers(priced, faster)


def test_a_plan_is_taken_over_where_only_idle_devices_are_missing() -> None:
    book = PriceBook(model(), inputs(16), {}, TRAINING)
    base = baseline_setting(graphpar.Cluster.from_dict(CLUSTER), 16, TRAINING)
    base = apply(base, ["set network.bytes_per_s=1e4"])
    solver = Solver(book, Limits(gap=0.1, time_limit_s=0.3, processes=1), AnswerCache(None))
    (first,) = solver.answers([base])
    assert "b/0" in first.left_out
    smaller = apply(base, ["drop b"])
    (found,) = solver.answers([smaller])
    key = solver.key(numbered(smaller), 0.3)
    # As if a search cut short had found nothing.
    solver._known[key] = dataclasses.replace(found, status="infeasible", step_s=None, plan=None, used=())
    (again,) = solver.answers([smaller])
    assert again.step_s == pytest.approx(first.step_s)
    assert again.step_s is not None
    assert set(again.used) | set(again.left_out) == {d.name for d in smaller.cluster.devices}
    step_s = again.step_s
    # As if it had found a longer one: the bound it proved is of the formula, and so is the gap.
    longer = dataclasses.replace(found, step_s=2 * step_s, bound_s=0.9 * step_s)
    proven = _better(longer, again, smaller, formula_s=1.2 * step_s)
    assert (proven.step_s, proven.bound_s) == (step_s, 0.9 * step_s)
    assert proven.gap == pytest.approx(0.25)
    # As if a search among other plans had proven that none of them is as short.
    solver._known[key] = dataclasses.replace(found, step_s=2 * step_s, bound_s=1.5 * step_s)
    (beyond,) = solver.answers([smaller])
    assert beyond.step_s == again.step_s
    assert beyond.bound_s == beyond.any_bound_s
    assert any(BEYOND in remark for remark in beyond.remarks)


def test_the_plan_of_the_next_batch_is_taken_over_where_it_is_faster() -> None:
    book = PriceBook(model(), inputs(16), {}, TRAINING)
    base = baseline_setting(graphpar.Cluster.from_dict(CLUSTER), 16, TRAINING)
    solver = Solver(book, Limits(gap=0.1, time_limit_s=0.3, processes=1), AnswerCache(None))
    other = apply(base, ["set batch=24"])
    _, found = solver.answers([base, other])
    assert found.step_s is not None
    key = solver.key(numbered(other), 0.3)
    solver._known[key] = dataclasses.replace(found, step_s=10 * found.step_s)
    (better,) = solver.answers([other])
    assert better.batch == 24
    assert better.step_s is not None and better.step_s < 10 * found.step_s


def test_leaving_out_any_of_equal_devices_is_one_question(monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []

    def counted(tasks: list[Task]) -> list[Answer]:
        solved.append(len(tasks))
        return solve_together(tasks)

    monkeypatch.setattr("graphpar.scenarios.workers.solve_together", counted)
    first, second = ask(["drop a/0", "drop a/1"], leave_out=True).answers
    assert first.step_s == second.step_s
    assert ("a/1" in first.headroom_bytes) == ("a/0" in second.headroom_bytes)
    assert "a/0" not in {*first.used, *first.left_out} and "a/1" not in {*second.used, *second.left_out}
    assert sum(solved) == 3, "the baseline, without one of node a, without node b"


def test_what_makes_no_difference_is_answered_by_the_baseline() -> None:
    asked = {
        "set schedule=gpipe": "inference",
        "set recompute=on": "inference",
        "set batch=16": "nothing is changed",
        "set a.usd_per_h=3; set b.usd_per_h=0": "prices alone",
    }
    options: dict[str, Any] = {"cache": False, "processes": 1, "time_limit_s": 0.05}
    study = graphpar.what_if(
        model(), CLUSTER, [*asked], args=inputs(16)[:1], prices={"a": "7", "b": 1.0}, **options
    )
    base = study.baseline
    for answer, words in zip(study.answers, asked.values(), strict=True):
        assert (answer.plan, answer.gap, answer.seconds) == (base.plan, base.gap, base.seconds)
        assert [r for r in answer.remarks if words in r] == list(set(answer.remarks) - set(base.remarks))
    nodes = {name.partition("/")[0] for name in base.used}
    dear, cheap = ({"a": 7.0, "b": 1.0}, {"a": 3.0, "b": 0.0})
    assert [a.usd_per_h for a in (base, study.answers[-1])] == [
        sum(prices[name] for name in nodes) for prices in (dear, cheap)
    ]


def test_every_scenario_is_answered_and_senseless_ones_say_why(study: graphpar.Study) -> None:
    assert [a.title for a in study.answers] == [
        "batch=16",
        "batch=48",
        "no t4",
        "faster",
        "plain",
        "wrong",
    ]
    assert study["wrong"].status == "invalid"
    assert "nearest" in study["wrong"].problem
    assert all(a.status == "ok" for a in study.answers[:-1])


def test_answers_are_plans_of_the_changed_job(study: graphpar.Study) -> None:
    base = study.baseline
    assert base.step_s is not None
    assert study["batch=16"].step_s == base.step_s
    assert study["batch=48"].batch == 48
    assert "b/0" not in study["no t4"].used
    faster, plain = study["faster"].step_s, study["plain"].step_s
    assert faster is not None
    assert plain is not None
    assert faster < base.step_s
    assert plain < base.step_s  # less optimiser work
    assert study["no t4"].usd_per_h == 4.0
    assert any("price of a is not known" in remark for remark in study["faster"].remarks)
    assert base.gap is not None
    assert base.gap <= 1


def test_the_page_the_table_and_the_data_agree(study: graphpar.Study) -> None:
    page = str(study)
    assert "baseline" in page
    assert "invalid" in page
    rows = list(csv.DictReader(io.StringIO(study.to_csv())))
    data = json.loads(study.to_json())
    assert [r["scenario"] for r in rows[1:]] == [s["title"] for s in data["scenarios"]]
    assert float(rows[0]["step_s"]) == study.baseline.step_s == data["baseline"]["step_s"]
    assert set(data["without"]) == {"a/1", "b/0"}
    for answer in (study.baseline, *study.answers[:-1]):
        assert answer.title in page
    nothing_fits = dataclasses.replace(study.baseline, status="infeasible", step_s=None)
    full = dataclasses.replace(study, baseline=nothing_fits)
    assert "earns its place" not in str(full), "where nothing fits, no device does"


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_studies_are_drawn(study: graphpar.Study, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    assert study.plot(tmp_path / f"study.{ending}").stat().st_size > 1000
    with pytest.raises(ValueError, match="must end in"):
        study.plot(tmp_path / "study.doc")


def test_answers_are_kept_by_content_and_not_solved_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ask(["drop b"], cache=tmp_path)

    def fail(task: object) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr("graphpar.scenarios.workers.solve_together", fail)
    again = ask(["drop b"], cache=tmp_path)
    assert again.answers == first.answers
    with pytest.raises(AssertionError):
        ask(["drop a/0"], cache=tmp_path)
    # What is held, what gradients cost and who may divide them are other questions.
    for other in ({"zero": 1}, {"max_grad_norm": 1.0}, {"optimizer": Joined}):
        with pytest.raises(AssertionError):
            ask(["drop b"], cache=tmp_path, train=dataclasses.replace(TRAINING, **other))


class Joined(torch.optim.AdamW):
    """An optimiser with Adam's state that looks at all parameters before it changes one."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter in given:
            parameter.grad /= 1 + sum(p.grad.square().sum() for p in given)
        return super().step(closure)


def test_more_devices_are_never_slower_even_where_the_search_was_cut() -> None:
    study = ask(["drop b", "drop a/1; drop b", "set network.bytes_per_s=2e9"], time_limit_s=0.01)
    base, less, least = study.baseline.step_s, study.answers[0].step_s, study.answers[1].step_s
    assert base is not None
    assert less is not None
    assert least is not None
    assert base <= less <= least


def test_what_is_better_is_never_slower_even_where_the_search_was_cut() -> None:
    better = [
        "set network.bytes_per_s=9e9",
        "set a.memory_bytes=40e9",
        "set optimizer=sgd",
        "add t4 to b",
    ]
    better += ["set batch=32", "set tensor=auto"]
    worse = ["set recompute=on", "set schedule=gpipe", "set microbatches=2", "dp=2", "set a.slowdown=2"]
    study = ask([*better, *worse], time_limit_s=0.02, worth=True, leave_out=True)
    base = study.baseline.samples_per_s
    assert base is not None
    for answer in study.answers:
        rate = answer.samples_per_s
        assert rate is not None, answer
        if answer.title in better:
            assert rate >= base * (1 - 1e-9), answer.title
        else:
            assert rate <= base * (1 + 1e-9), answer.title
    assert all(worth.saved_s >= -1e-12 for worth in study.worths)
    assert {"1 GiB more on a/1", "10 % more speed of a/1"} <= {worth.what for worth in study.worths}
    assert "by solving again" in str(study)
    for name, answer in study.without:
        change = answer.change(study.baseline)
        assert change is None or change <= 1e-9
        assert name in study.baseline.used or change == pytest.approx(0.0, abs=1e-9)


def test_a_budget_is_searched_with_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"instances": ["g5.12xlarge", "g4dn.xlarge"], "cache": tmp_path}
    study = ask(budget_usd_per_h=8.0, **asked)
    found = study.budget
    assert found is not None
    assert found.best is not None
    assert found.usd_per_h <= 8.0
    assert found.considered == found.solved + found.ruled_out + found.unplanned == 2
    told = study.to_dict()["budget"]
    assert told["truncated_by"] == (["time limit"] if found.unplanned else [])
    assert told["bound_s"] <= told["best"]["step_s"]
    assert ("2 clusters use the budget up" in str(study)) and (
        ("the time was up" in str(study)) != found.proven
    )
    last = list(csv.DictReader(io.StringIO(study.to_csv())))[-1]
    assert (last["scenario"], float(last["step_s"])) == (found.best.title, found.best.step_s)
    cheap = ask(budget_usd_per_h=8.0, objective="cost", **{**asked, "time_limit_s": 0.3})
    assert cheap.budget is not None and cheap.budget.best is not None and cheap.budget.considered == 20
    told, least = cheap.to_dict()["budget"], cheap.budget.best.usd_per_million_samples
    assert least is not None
    assert told["bound_usd_per_million_samples"] <= least == told["best"]["usd_per_million_samples"]
    assert least <= (found.best.usd_per_million_samples or 0.0)
    assert ("cheapest per sample within" in str(cheap)) and ("20 clusters are within" in str(cheap))
    monkeypatch.delattr("graphpar.scenarios.mix_search.MixSearch.run")
    assert ask(budget_usd_per_h=8.0, **asked).budget == found, "asked again, it is not searched again"
    with pytest.raises(AttributeError, match="run"):
        ask(budget_usd_per_h=7.0, **asked)
    monkeypatch.delattr("graphpar.scenarios.api.ask")
    with pytest.raises(ValueError, match="below the cheapest"):  # before anything is planned
        ask(budget_usd_per_h=0.01, instances=["g5.12xlarge"])


def test_a_sequence_length_needs_inputs() -> None:
    assert "inputs=" in ask(["set seq_len=7"]).answers[0].problem


@pytest.mark.slow
def test_processes_give_the_same_answers() -> None:
    asked = ["drop b", "drop a/0", "tp=2"]
    alone, together = (
        ask(asked, time_limit_s=20.0, gap=0.3),
        ask(asked, processes=2, time_limit_s=20.0, gap=0.3),
    )
    assert [a.step_s for a in alone.answers] == [a.step_s for a in together.answers]


def test_what_changes_nothing_is_answered_as_the_baseline() -> None:
    study = ask(["set a.count=2", "set precision=float32"], time_limit_s=0.2)
    for answer in study.answers:
        assert (answer.step_s, answer.gap) == (study.baseline.step_s, study.baseline.gap)


def test_a_worth_that_comes_with_another_order_of_work_names_it() -> None:
    def planned(schedule: ScheduleName, step_s: float) -> Answer:
        return Answer("", step_s=step_s, gap=0.0, batch=8, plan=KnownPlan((), schedule, 8))

    setting = baseline_setting(graphpar.Cluster.from_dict({"devices": [{"kind": "t4"}]}), 8, None)
    orders: list[tuple[ScheduleName, ScheduleName]] = [
        ("1f1b", "zero-bubble"),
        ("zero-bubble", "zero-bubble"),
        ("1f1b", "gpipe"),
    ]
    book, told = SimpleNamespace(with_links_as_priced=lambda setting: setting), []
    for before, after in orders:
        answer = planned(after, 0.8)
        solver: Any = SimpleNamespace(book=book, answers=lambda asked, a=answer: [a] * len(asked))
        told.append(" ".join(worth_lines(shadow_prices(solver, setting, planned(before, 1.0)))))
    assert "200 ms less per step with zero-bubble" in told[0] and "schedule=zero-bubble" in told[0]
    assert all("200 ms less per step" in text and " with " not in text for text in told[1:])
