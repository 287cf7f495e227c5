"""`graphpar.what_if`: questions about a job, each answered by planning anew."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphpar.calibration import Calibration
from graphpar.cluster import Cluster
from graphpar.compiler import ClusterLike, as_cluster
from graphpar.partition.types import TensorWidth
from graphpar.scenarios.asked import (
    Asked,
    as_scenarios,
    check_limits,
    check_names,
    instance_types,
    price_list,
)
from graphpar.scenarios.budget import BudgetAnswer, affordable_mixes, best_within
from graphpar.scenarios.budget_report import budget_lines, budget_plain
from graphpar.scenarios.cache import AnswerCache, default_folder, key_of
from graphpar.scenarios.captures import Inputs
from graphpar.scenarios.changes import check_format
from graphpar.scenarios.mixes import Objective
from graphpar.scenarios.parts import fair_limit_s
from graphpar.scenarios.plots import plot, plot_svg
from graphpar.scenarios.prices import price_dates
from graphpar.scenarios.pricing import PriceBook
from graphpar.scenarios.report import as_plain, remark_lines, table_lines, to_csv, worth_lines
from graphpar.scenarios.study import (
    Limits,
    Progress,
    Solver,
    ask,
    changed,
)
from graphpar.scenarios.sweeps import KNEE, Sweep, as_sweeps, knee, scenarios_of
from graphpar.scenarios.types import Answer, Scenario, Setting, Worth
from graphpar.scenarios.workers import LEAST_AHEAD, ahead
from graphpar.scenarios.worth import leave_one_out, shadow_prices, useless
from graphpar.training import Training
from graphpar.view.notebook import preformatted


@dataclass(frozen=True, repr=False)
class Study:
    """The answers to what-if questions.

    Attributes:
        model: The model's class name.
        baseline: The job as it is.
        answers: One per scenario, in order; a sweep's points first.
        sweeps: What was swept.
        worths: Shadow prices, where asked for.
        without: The job without each device, where asked for.
        budget: The best cluster within a budget, where asked for.

    >>> import torch, graphpar
    >>> study = graphpar.what_if(
    ...     torch.nn.Linear(4, 2), {"devices": [{"kind": "cpu", "count": 2}]}, {"one": "drop local/1"},
    ...     args=(torch.randn(6, 4),), cache=False,
    ... )
    >>> study["one"].status, study.to_csv().count("\\n")
    ('ok', 3)
    """

    model: str
    baseline: Answer
    answers: tuple[Answer, ...]
    sweeps: tuple[Sweep, ...] = ()
    worths: tuple[Worth, ...] = ()
    without: tuple[tuple[str, Answer], ...] = field(default=())
    budget: BudgetAnswer | None = None

    def __getitem__(self, title: str) -> Answer:
        """The answer to the scenario of that name; KeyError lists the names there are."""
        found = {a.title: a for a in (self.baseline, *self.answers)}
        if title not in found:
            raise KeyError(f"there is no scenario {title!r}; there are {', '.join(found)}")
        return found[title]

    @property
    def knee(self) -> str | None:
        """After which value of the first sweep more brings little; None where nothing says so."""
        if len(self.sweeps) != 1:
            return None
        values = self.sweeps[0].values
        try:
            numbers = [float(v) for v in values]
        except ValueError:
            return None
        found = knee(numbers, self.answers[: len(values)])
        return None if found is None else values[numbers.index(found)]

    def __repr__(self) -> str:
        return f"Study({self.model}: {len(self.answers)} scenarios)"

    def __str__(self) -> str:
        lines = [f"what if, for {self.model}", *table_lines(self.baseline, self.answers)]
        remarks = remark_lines(self.baseline, self.answers)
        if self.knee is not None:
            remarks.append(
                f"the knee is at {self.sweeps[0].path}={self.knee}: past it, 1 % more of it brings less "
                f"than {KNEE:g} % more samples/s"
            )
        if any(a.usd_per_million_samples is not None for a in (self.baseline, *self.answers)):
            remarks.append(f"prices are indicative on-demand ones of {price_dates()} unless given")
        remarks += self._without_lines()
        lines += ["", *remarks] if remarks else []
        if self.worths:
            lines += ["", *worth_lines(self.worths)]
        if self.budget is not None:
            lines += ["", *budget_lines(self.budget)]
        return "\n".join(lines)

    def _without_lines(self) -> list[str]:
        lines = []
        for name, gain in useless(self.baseline, self.without):
            told = f"{100 * gain:.0f} % faster" if gain > 0.005 else "nothing is lost"
            lines.append(f"leave {name}{',' * (',' in name)} out: {told}")
        if self.without and not lines and self.baseline.step_s is not None:
            worst = min(self.without, key=lambda item: -(item[1].change(self.baseline) or -1.0))
            change, title = worst[1].change(self.baseline), worst[1].title
            told = "leaves nothing that fits" if change is None else f"costs {-100 * change:.0f} %"
            lines.append(
                f"every device earns its place; leaving out {title}{',' * (',' in title)} {told}"
            )
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain data, numbers in SI units."""
        return {
            "model": self.model,
            "baseline": as_plain(self.baseline, self.baseline),
            "scenarios": [as_plain(a, self.baseline) for a in self.answers],
            "knee": self.knee,
            "shadow_prices": [vars(w) for w in self.worths],
            "without": {name: as_plain(a, self.baseline) for name, a in self.without},
            "budget": budget_plain(self.budget, self.baseline),
        }

    def to_json(self) -> bytes:
        """`to_dict` as JSON."""
        return msgspec.json.format(msgspec.json.encode(self.to_dict()), indent=2) + b"\n"

    def to_csv(self) -> str:
        """One line per scenario, the baseline first, and at last the best within the budget."""
        bought = self._bought
        return to_csv(self.baseline, (*self.answers, *(() if bought is None else (bought,))))

    @property
    def _bought(self) -> Answer | None:
        """The best within the budget, by the name of its instances."""
        return None if self.budget is None else self.budget.best

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw into a PNG or SVG file; needs the extra `viz`."""
        return plot(path, self.baseline, self.answers, self.sweeps, self._bought)

    def _repr_svg_(self) -> str | None:
        try:
            return plot_svg(self.baseline, self.answers, self.sweeps, self._bought)
        except ValueError:
            return None  # without matplotlib a notebook shows the text

    def _repr_html_(self) -> str:
        return preformatted(str(self)) + (self._repr_svg_() or "")


def what_if(
    model: nn.Module,
    cluster: ClusterLike,
    scenarios: Asked = (),
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    train: Training | None = None,
    sweep: Mapping[str, Sequence[object]] | Sequence[str] = (),
    precision: str = "float32",
    tensor: TensorWidth = 1,
    budget_usd_per_h: float | None = None,
    instances: str | Sequence[str] = (),
    objective: Objective = "time",
    worth: bool = False,
    leave_out: bool = False,
    prices: Mapping[str, float | str] | None = None,
    inputs: Inputs | None = None,
    calibration: Calibration | None = None,
    gap: float = 0.01,
    time_limit_s: float | None = None,
    processes: int | None = None,
    cache: bool | str | os.PathLike[str] = True,
    progress: Progress | None = None,
) -> Study:
    """Plan a job, and again under every scenario; nothing is run and no weights are needed.

    Args:
        model: Any `nn.Module`; on the meta device is enough.
        cluster: The baseline's devices.
        scenarios: Changes in words (`graphpar.scenarios.changes`): a dict of names to a change or
            several, a sequence of them, or one.
        args: Positional arguments of an example batch, the global batch in size.
        kwargs: Keyword arguments of it.
        train: Plan training steps; without it, inference.
        sweep: One or two paths with values; every combination is a scenario.
        precision: Number format of the baseline.
        tensor: Most devices of a node that may share every layer; `auto` for as many as there are.
        budget_usd_per_h: Look for the best cluster that costs no more, made of `instances`.
        instances: Cloud instance types for the budget.
        objective: What the cluster within the budget is best in: `time` for the fastest, `cost` for the
            cheapest per sample.
        worth: Also find shadow prices.
        leave_out: Also plan without each device.
        prices: Dollars per hour by node name, before the catalogue's.
        inputs: `inputs(batch, seq_len)` gives arguments of other sizes; needed to change `seq_len`.
        calibration: Measured curves of this machine's processor; the cached ones by default.
        gap: How close to the best of its family each plan has to be proven.
        time_limit_s: When to stop searching for one scenario's plan; by default so that all take about
            20 seconds, but no less than 0.3 and no more than ten each. All clusters of a budget together
            take no longer; by default 30 seconds.
        processes: How many solve at once; by default one per core.
        cache: Whether, or in which folder, answers are kept.
        progress: Called with how many answers are there, of how many.

    Raises:
        CaptureError: The model cannot be captured.
        ClusterError: The baseline's cluster makes no sense.
        ValueError: The baseline, a sweep or a budget makes no sense. A senseless scenario is answered
            `invalid`.

    >>> import torch, graphpar
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> study = graphpar.what_if(
    ...     model, {"devices": [{"kind": "cpu", "count": 2}]}, ["drop local/1", "set batch=12"],
    ...     args=(torch.randn(6, 4),), cache=False,
    ... )
    >>> [answer.status for answer in study.answers]
    ['ok', 'ok']
    """
    check_limits(
        gap=gap,
        time_limit_s=time_limit_s,
        processes=processes,
        budget_usd_per_h=budget_usd_per_h,
        calibration=calibration,
        inputs=inputs,
        progress=progress,
    )
    sweeps, where, instances = as_sweeps(sweep), as_cluster(cluster), instance_types(instances)
    asked = (*scenarios_of(sweeps), *as_scenarios(scenarios))
    check_names(asked)
    kept = _cache(cache)
    if budget_usd_per_h is not None:
        affordable_mixes(budget_usd_per_h, instances, objective)  # refused before anything is planned
    elif objective != "time":
        raise ValueError(f"objective={objective!r} is for a budget; give budget_usd_per_h=, too")
    if calibration is None and any(device.is_local_cpu for device in where.devices):
        calibration = Calibration.cached()
    many = 1 + len(asked) + (LEAST_AHEAD if budget_usd_per_h is not None else 0)
    likely = _likely_key(
        model,
        (args, kwargs),
        asked,
        where,
        (precision, tensor, prices, gap, time_limit_s, worth, leave_out, train is None),
        (budget_usd_per_h, instances, objective),
    )
    answered = kept.get_as(bool, likely)
    with ahead(processes, 0 if answered else many):
        book = PriceBook(model, args, {} if kwargs is None else kwargs, train, calibration, inputs)
        batch, money = book.baseline().graph.batch, {} if prices is None else prices
        baseline = baseline_setting(where, batch, train, precision=precision, tensor=tensor, prices=money)
        limit_s = time_limit_s if time_limit_s is not None else fair_limit_s(1 + len(asked), processes)
        solver = Solver(book, Limits(gap, limit_s, processes), kept, progress)
        first, answers = ask(solver, baseline, asked)
        if worth or leave_out:
            # All is solved first, and told afterwards: what one question finds may answer another.
            if worth:
                shadow_prices(solver, baseline, first)
            if leave_out:
                leave_one_out(solver, baseline, first)
            first, answers = ask(solver, baseline, asked)
        study = Study(
            model=book.baseline().graph.name,
            baseline=first,
            answers=answers,
            sweeps=sweeps,
            worths=shadow_prices(solver, baseline, first) if worth else (),
            without=tuple(leave_one_out(solver, baseline, first)) if leave_out else (),
            budget=None
            if budget_usd_per_h is None
            else best_within(solver, baseline, budget_usd_per_h, instances, time_limit_s, objective),
        )
        kept.put(likely, True)
        return study


def _likely_key(
    model: nn.Module, inputs: object, asked: Sequence[Scenario], where: Cluster, *options: object
) -> str:
    """A hash of a study that is there before the model is captured.

    No answer hangs on it: where two studies share it, or one has two, processes start late
    or in vain. So it takes what makes no sense as well, which is told where it is looked at.
    """
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    return key_of(
        {
            "model": [str(type(model)), *map(_outline, weights)],
            "inputs": _outline(inputs),
            "asked": [(scenario.title, scenario.changes) for scenario in asked],
            "cluster": where.to_dict(),
            "options": [repr(option) for option in options],
        }
    )


def _outline(value: object) -> str:
    """What inputs and weights look like, whatever they are."""
    if isinstance(value, torch.Tensor):
        return str(type(value)) if is_lazy(value) else f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return str({str(key): _outline(each) for key, each in value.items()})
    if isinstance(value, list | tuple):
        return str([_outline(each) for each in value])
    return repr(value) if isinstance(value, bool | int | float | str | None) else str(type(value))


def baseline_setting(
    cluster: Cluster,
    batch: int,
    train: Training | None,
    *,
    precision: str = "float32",
    tensor: TensorWidth = 1,
    prices: Mapping[str, float | str] = MappingProxyType({}),
) -> Setting:
    """The job as it is; ClusterError if a price is of no node, ValueError if there is no such format."""
    check_format(precision)
    return Setting(
        cluster=cluster,
        batch=batch,
        training=train is not None,
        precision=precision,
        schedule=train.schedule if train else "auto",
        microbatches=train.microbatches if train else "auto",
        tensor=tensor,
        usd_per_h=price_list(cluster, prices),
    )


def check_scenarios(baseline: Setting, scenarios: Sequence[Scenario]) -> None:
    """Refuse scenarios that make no sense, before anything is planned.

    Raises:
        ValueError: Names every one of them and says what is wrong with it.
    """
    check_names(scenarios)
    made = [(scenario.title, changed(baseline, scenario)) for scenario in scenarios]
    wrong = [(title, why) for title, why in made if isinstance(why, str)]
    if len(wrong) == 1:
        raise ValueError(f"scenario {wrong[0][0]!r}: {wrong[0][1]}")
    if wrong:
        lines = "".join(f"\n  {title}: {why}" for title, why in wrong)
        raise ValueError(f"{len(wrong)} of {len(made)} scenarios make no sense:{lines}")


def _cache(cache: bool | str | os.PathLike[str]) -> AnswerCache:
    if isinstance(cache, bool):
        return AnswerCache(default_folder() if cache else None)
    if not isinstance(cache, (str, os.PathLike)):
        raise ValueError(f"cache= takes True, False or a folder, not {cache!r}")
    return AnswerCache(Path(cache))
