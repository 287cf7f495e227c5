"""A study: a baseline and scenarios, each planned anew, in parallel and from the cache where known."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field, replace
from functools import cached_property

from graphpar.choice.comparison import step_of
from graphpar.choice.orders import LEAST_GAIN, judged_s
from graphpar.cluster_build import num_cores
from graphpar.errors import GraphparError, RunError
from graphpar.optimizer_probe import refuse_unrepeatable
from graphpar.partition.certificate import BEYOND, gap_of
from graphpar.partition.one_unit import as_one_unit
from graphpar.partition.physical_bound import physical_bound_s
from graphpar.scenarios.answering import answer_of
from graphpar.scenarios.cache import AnswerCache, key_of
from graphpar.scenarios.changes import apply, idle
from graphpar.scenarios.dominance import GivenOptimizer, could_cover, places, with_these_alone
from graphpar.scenarios.group_prices import priced_by_several
from graphpar.scenarios.naming import essential, numbered, with_names
from graphpar.scenarios.parts import alike, next_batches, shared_out
from graphpar.scenarios.prices import with_price
from graphpar.scenarios.pricing import PriceBook
from graphpar.scenarios.report import CUT_SHORT
from graphpar.scenarios.solve import brought
from graphpar.scenarios.task import Task
from graphpar.scenarios.transfer import placed
from graphpar.scenarios.trust import trust
from graphpar.scenarios.types import BASELINE, Answer, KnownPlan, Scenario, Setting, renamed
from graphpar.scenarios.workers import going_alone, solving, starting_again
from graphpar.schedule.simulated import has_formula
from graphpar.units import format_seconds
from graphpar.wishes import gpipe_reason, may_repeat, uncut_note, whole_reason

Places = Mapping[str, str]
"""By device of a plan the one that takes its place elsewhere."""

Progress = Callable[[int, int], None]
"""Told how many answers are there, of how many."""


MOST_HINTS = 3
"""Plans of other scenarios that a search starts from."""

BASELINE_SHARE = 3.0
"""The baseline is searched for so many times as long as a scenario: the others start from its plan."""

SAME = "nothing is changed: this is the baseline"
SAME_PLAN = "prices alone are changed: this is the baseline's plan"

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Limits:
    """How hard each scenario is searched, and by how many processes."""

    gap: float = 0.01
    time_limit_s: float = 10.0
    processes: int | None = None


@dataclass
class Solver:
    """Answers settings: from the cache, else priced here and solved in other processes."""

    book: PriceBook
    limits: Limits
    kept: AnswerCache
    progress: Progress | None = None
    _known: dict[str, Answer] = field(default_factory=dict)
    _settings: dict[str, Setting] = field(default_factory=dict)
    _compared: dict[tuple[str, str, tuple[str, ...]], Places | None] = field(default_factory=dict)
    _next: Mapping[str, Collection[str]] = field(default_factory=dict)
    _offered: set[tuple[str, KnownPlan | None]] = field(default_factory=set)
    _alone: dict[tuple[str, tuple[str, ...]], Setting] = field(default_factory=dict)

    def answers(self, settings: Sequence[Setting], time_limit_s: float | None = None) -> list[Answer]:
        """One answer per setting; settings that differ in names of devices alone are solved once.

        No answer is worse than what any other setting that was asked for gives as well (`places`).
        """
        named, settings = settings, [numbered(setting) for setting in settings]
        limit_s = time_limit_s if time_limit_s is not None else self.limits.time_limit_s
        keys = [self.key(setting, limit_s) for setting in settings]
        missing = {
            key: setting
            for key, setting in zip(keys, settings, strict=True)
            if key not in self._known and not self._from_cache(key, setting)
        }
        self.book.captures.expect({s.seq_len for s in missing.values() if s.seq_len is not None})
        done = len(set(keys)) - len(missing)
        total = len(set(keys))
        self.tell(done, total)
        for key, answer in self._solved(missing, limit_s):
            self._known[key], self._settings[key] = answer, missing[key]
            if answer.status != "invalid":
                self.kept.put(key, answer)
            done += 1
            self.tell(done, total)
        self._settle(tuple(dict.fromkeys(keys)))
        return [
            with_price(with_names(self._known[key], own.cluster, setting.cluster), setting)
            for key, own, setting in zip(keys, settings, named, strict=True)
        ]

    def price_groups(self, asked: Sequence[tuple[Setting, float]]) -> None:
        """Price the tensor groups of settings, each with its limit, in several processes.

        It changes no answer: what is not priced here is priced when it is wanted.
        """
        processes = self.limits.processes or num_cores()
        if processes == 1 or all(setting.tensor == 1 for setting, _ in asked):
            return
        missing = [
            setting
            for setting, limit_s in ((numbered(setting), limit_s) for setting, limit_s in asked)
            if (key := self.key(setting, limit_s)) not in self._known
            and not self._from_cache(key, setting)
        ]
        self.book.captures.expect({s.seq_len for s in missing if s.seq_len is not None})
        # Each length has a graph of its own, captured while others are priced; first the example's.
        by_length: dict[int | None, list[Setting]] = {}
        for setting in missing:
            by_length.setdefault(setting.seq_len, []).append(setting)
        own = self.book.captures.own_length
        lengths = sorted(by_length, key=lambda length: length not in (None, own))
        parts = -(-processes // max(len(by_length), 1))
        for go_on in (starting_again, going_alone):
            bundles = map(self.book.unpriced_groups, (by_length[length] for length in lengths))
            try:
                self.book.learn_groups(priced_by_several(bundles, processes, parts))
                return
            except RunError as error:
                go_on(error)

    def _settle(self, keys: Sequence[str]) -> None:
        """Exchange answers for better ones that other plans give, until none is: each may help others."""
        waiting, self._next = True, next_batches(self._settings)
        while waiting:
            waiting = False
            for key in keys:
                better = self._settled(key)
                if better is not self._known[key]:
                    self._known[key], waiting = better, True
                    self.kept.put(key, better)

    def _settled(self, key: str) -> Answer:
        """The answer, or a better one that the plan of another setting gives."""
        setting, best = self._settings[key], self._known[key]
        if best.status == "invalid":
            return best
        others = [
            (other.step_s * setting.batch / other.batch, name)
            for name, other in self._known.items()
            if name != key and other.status == "ok" and other.step_s is not None
        ]
        for step_s, name in sorted(others):
            if (
                best.status == "ok"
                and best.step_s is not None
                and step_s >= best.step_s * (1 - _ROUNDING)
            ):
                break
            there = self._places(key, name) or self._as_they_are(key, name)
            if there is not None:
                better = self._taken_over(setting, best, self._known[name], there)
                if better is not None and _shorter(better, best):
                    return better
        return best

    def _taken_over(self, setting: Setting, mine: Answer, other: Answer, there: Places) -> Answer | None:
        """The other's plan as an answer to this setting, if that is better."""
        task = self.task(setting)
        found = brought(task, placed(other.plan, there)) if other.plan is not None else None
        if found is not None and other.batch != mine.batch and mine.step_s is not None:
            found = found if step_of(task.searched_table, found) < mine.step_s else None
        if found is not None:
            made = self._valued(answer_of(task, found), setting)
            if made.step_s is not None and (
                other.batch != mine.batch or made.step_s <= (other.step_s or 0)
            ):
                return _better(mine, made, setting, found.objective_s)
        if other.batch != mine.batch or any(name != place for name, place in there.items()):
            return None
        # Played under faster links an order of work may come out longer; it need not be changed.
        held = replace(other, any_bound_s=physical_bound_s(task.searched_table))
        formula_s = found.objective_s if found is not None else math.inf
        return _better(mine, self._valued(held, setting), setting, formula_s)

    def _as_they_are(self, key: str, other: str) -> Places | None:
        """The same devices where another batch is the next one of a sweep; told once for each plan.

        The other's plan may well be good here, if need be with microbatches of a slightly different size.
        """
        if other not in self._next.get(key, ()):
            return None
        plan = self._known[other].plan
        if (key, plan) in self._offered:
            return None
        self._offered.add((key, plan))
        return {name: name for name in self._known[other].used}

    def _places(self, large: str, small: str) -> Places | None:
        """Where the plan found for one setting is no slower in another; found once for each pair."""
        used = self._known[small].used
        if (large, small, used) not in self._compared:
            self._compared[large, small, used] = self._moved(self._settings[large], small)
        return self._compared[large, small, used]

    def _moved(self, large: Setting, small: str) -> Places | None:
        """Where the plan found for a setting is no slower in another one."""
        given = GivenOptimizer(self._given_state, *(update.share for update in self.book.updates))
        if not could_cover(large, self._settings[small], given):
            return None
        used = self._known[small].used
        if (small, used) not in self._alone:
            alone = with_these_alone(self._settings[small], used)
            self._alone[small, used] = self.book.with_links_as_priced(alone)
        return places(self.book.with_links_as_priced(large), self._alone[small, used], given)

    @cached_property
    def _given_state(self) -> float:
        """The state of the caller's own optimiser, where others may stand beside it."""
        traits = self.book.traits("given")
        return self.book.state_bytes if traits is not None and traits.elementwise else math.inf

    def tell(self, done: int, total: int) -> None:
        """Say how many answers are there, of how many."""
        if self.progress is not None:
            self.progress(done, total)

    def learn(self, setting: Setting, answer: Answer) -> Answer:
        """Take an answer found elsewhere as known, which others begin with and are no worse than."""
        own = numbered(setting)
        key = self.key(own, answer.seconds)
        self._known[key], self._settings[key] = self._valued(answer, own), own
        return with_price(self._known[key], setting)

    def _from_cache(self, key: str, setting: Setting) -> bool:
        found = self.kept.get(key)
        if found is not None:
            self._known[key], self._settings[key] = found, setting
        return found is not None

    def key(self, setting: Setting, time_limit_s: float, **others: object) -> str:
        """A hash of all that an answer depends on, `others` among it."""
        calibration = self.book.calibration
        devices = setting.cluster.devices
        fingerprint = repr(calibration) if calibration and any(d.is_local_cpu for d in devices) else ""
        train = self.book.train
        return key_of(
            {
                "model": self.book.baseline().model_hash,
                "state": self.book.state_bytes,
                "update": repr(self.book.updates),
                "optimizer": repr(self.book.traits(setting.optimizer)),
                "clips": train is not None and train.max_grad_norm is not None,
                "zero": 0 if train is None else train.zero,
                "setting": setting.to_dict(),
                "calibration": fingerprint,
                "gap": self.limits.gap,
                "time_limit_s": time_limit_s,
                **others,
            }
        )

    def _solved(
        self, missing: Mapping[str, Setting], time_limit_s: float
    ) -> Iterator[tuple[str, Answer]]:
        """Answers as they come; where devices would share a stage but no format, in float32 instead.

        Where a process is killed others do what is left; where one of them is, this one does.
        """
        left, processes, go_on = dict(missing), self.limits.processes, starting_again
        while left:
            try:
                for key, answer in self._tried(dict(left), time_limit_s, processes):
                    if answer.quarrels:
                        self.book.settle(left[key], answer.quarrels)
                    else:
                        del left[key]
                        yield key, answer
            except RunError as error:
                if processes == 1:
                    raise
                go_on(error)
                processes = 1 if go_on is going_alone else processes
                go_on = going_alone

    def _tried(
        self, missing: Mapping[str, Setting], time_limit_s: float, processes: int | None
    ) -> Iterator[tuple[str, Answer]]:
        with solving(processes, len(missing)) as submit:
            waiting: dict[Future[list[Answer]], list[tuple[str, Setting]]] = {}
            for group in shared_out(alike(missing), processes or num_cores()):
                tasks, asked = [], []
                for key, setting in group:
                    try:
                        tasks.append(self.task(setting, time_limit_s, self._hints(setting)))
                    except (ValueError, GraphparError) as error:
                        yield key, Answer("", status="invalid", problem=str(error), batch=setting.batch)
                        continue
                    asked.append((key, setting))
                if tasks:
                    waiting[submit(tasks)] = asked
            for future in as_completed(waiting):
                for (key, setting), answer in zip(waiting[future], future.result(), strict=True):
                    yield key, self._valued(answer, setting)

    def _hints(self, setting: Setting) -> tuple[KnownPlan, ...]:
        """Plans to start from: the first that was found, and the fastest that can be had here."""
        if setting.layout is not None:
            return ()
        known = [
            (answer.step_s * setting.batch / answer.batch, key, answer.plan)
            for key, answer in self._known.items()
            if answer.status == "ok" and answer.plan is not None and answer.step_s is not None
        ]
        given = []
        for _, key, plan in sorted(known, key=lambda k: k[0]):
            there = self._moved(setting, key)
            given += [placed(plan, there)] if there is not None else []
        plans = dict.fromkeys([plan for _, _, plan in known[:1]] + given)
        return tuple(plans)[:MOST_HINTS]

    def task(
        self, setting: Setting, time_limit_s: float | None = None, hints: tuple[KnownPlan, ...] = ()
    ) -> Task:
        """What a process works on, asked for as `plan` would.

        Raises:
            ValueError: The setting cannot be planned; says why.
        """
        traits = self.book.traits(setting.optimizer)
        if traits is not None:
            refuse_unrepeatable(traits, len(setting.cluster.devices))
        table, prepared = self.book.table(setting), self.book.prepared(setting)
        if setting.recompute and not may_repeat(table) and table.training:
            why = prepared.batch_reason or prepared.in_step_reason
            raise ValueError(
                f"recompute=on cannot be had: {why}, and what mixes samples cannot run twice"
            )
        return Task(
            as_one_unit(table) if self.book.joins(setting) else table,
            "gpipe" if setting.schedule != "auto" and gpipe_reason(prepared) else setting.schedule,
            "auto" if whole_reason(prepared) else setting.microbatches,
            setting.recompute,
            setting.layout,
            self.limits.gap,
            self.limits.time_limit_s if time_limit_s is None else time_limit_s,
            hints,
            formats=dict.fromkeys(self.book.formats(setting).by_device, setting.precision),
        )

    def _ignored(self, setting: Setting) -> tuple[str, ...]:
        """What of the setting cannot be had, and what is done instead."""
        prepared, told = self.book.prepared(setting), []
        if setting.schedule not in ("auto", "gpipe") and gpipe_reason(prepared):
            told.append(f"schedule={setting.schedule} is ignored: {gpipe_reason(prepared)}")
        if setting.microbatches not in ("auto", 1) and whole_reason(prepared):
            told.append(f"microbatches={setting.microbatches} is ignored: {whole_reason(prepared)}")
        if joins := self.book.joins(setting):
            told.append(uncut_note(joins))
        return tuple(told)

    def _valued(self, answer: Answer, setting: Setting) -> Answer:
        """The answer with what only the setting knows of it: power, trust."""
        error, remarks = trust(setting, self.book, answer.used)
        remarks = (*remarks, *self._ignored(setting))
        cluster = setting.cluster
        powers = [cluster.device(name).power_w for name in answer.used]
        watts = sum(p for p in powers if p is not None)
        known = bool(powers) and all(p is not None for p in powers)
        return replace(
            answer,
            watts=watts if known else None,
            error_bar=error,
            remarks=tuple(dict.fromkeys((*answer.remarks, *remarks))),
        )


def _better(mine: Answer, other: Answer, setting: Setting, formula_s: float) -> Answer:
    """Another setting's plan in the place of this one's; its bound on any plan is one of this setting.

    `formula_s` is what the plan takes here by its formula, if it has one, which is what searches prove
    their bounds of; infinite where that is not known.
    """
    any_bound_s = mine.any_bound_s if mine.any_bound_s is not None else other.any_bound_s
    # Of schedules without a formula, and of a setting that seemed infeasible, no search proved anything.
    priced = other.plan is not None and has_formula(other.plan.schedule) and formula_s < math.inf
    searched = mine.bound_s is not None and priced
    # What is shorter than the bound on all that was searched is none of that.
    beyond = searched and formula_s < (mine.bound_s or 0.0) * (1 - _ROUNDING)
    bound_s = (mine.bound_s if searched and not beyond else any_bound_s) or 0.0
    step_s = other.step_s or 0.0
    compared_s = formula_s if searched and not beyond else step_s
    used = set(other.used)
    cut = (*(r for r in mine.remarks if r.startswith(CUT_SHORT)), *_against_the_rule(mine, other))
    cut = (*cut, f"{CUT_SHORT} by {BEYOND}") if beyond else cut
    kept = (r for r in other.remarks if not r.startswith("left out"))
    return replace(
        other,
        bound_s=min(bound_s, step_s),
        gap=max(gap_of(compared_s, bound_s), 0.0) if step_s > 0 and setting.layout is None else None,
        any_bound_s=any_bound_s,
        left_out=tuple(d.name for d in setting.cluster.devices if d.name not in used),
        remarks=tuple(dict.fromkeys((*cut, *kept))),
        seconds=mine.seconds + other.seconds,
    )


def _against_the_rule(mine: Answer, other: Answer) -> Iterator[str]:
    """A remark where `plan` would keep the longer plan, for the bound that it has."""
    if mine.plan is None or other.plan is None or mine.step_s is None or other.step_s is None:
        return
    here, there = mine.plan.schedule, other.plan.schedule
    if judged_s(other.step_s, there) > judged_s(mine.step_s, here):
        yield (
            f"{there} is taken over from another scenario, so that what cannot be worse is not; by "
            f"itself `plan` keeps {here} ({format_seconds(mine.step_s)}) unless another order is "
            f"{100 * LEAST_GAIN:.0f} % shorter, or asked for by schedule={there}"
        )


def _shorter(mine: Answer, other: Answer) -> bool:
    """Whether an answer is a plan, and the other none or a longer one."""
    if mine.step_s is None or other.status != "ok" or other.step_s is None:
        return mine.step_s is not None
    return mine.step_s < other.step_s * (1 - _ROUNDING)


def changed(baseline: Setting, scenario: Scenario) -> Setting | str:
    """The setting of a scenario, or why it makes no sense."""
    try:
        return apply(baseline, scenario.changes)
    except (ValueError, GraphparError) as error:
        return str(error)


def ask(
    solver: Solver, baseline: Setting, scenarios: Sequence[Scenario]
) -> tuple[Answer, tuple[Answer, ...]]:
    """The baseline's answer and the scenarios', in order; senseless scenarios are answered so.

    Raises:
        ValueError: The baseline makes no sense itself.
    """
    settings = [changed(baseline, scenario) for scenario in scenarios]
    # What changes nothing but prices has the plan of the baseline, which is searched for the longest.
    written = essential(baseline).to_dict()
    same = [isinstance(s, Setting) and essential(s).to_dict() == written for s in settings]
    sound = [
        s for s, is_same in zip(settings, same, strict=True) if isinstance(s, Setting) and not is_same
    ]
    first_limit_s = min(
        BASELINE_SHARE * solver.limits.time_limit_s, max(10.0, solver.limits.time_limit_s)
    )
    solver.price_groups([(baseline, first_limit_s), *((s, solver.limits.time_limit_s) for s in sound)])
    (known,) = solver.answers([baseline], first_limit_s)
    if known.status == "invalid":
        raise ValueError(known.problem)
    rest = iter(solver.answers(sound))
    # Asked again, since a scenario may have found what the baseline's search missed.
    (first,) = solver.answers([baseline], first_limit_s)
    answers = []
    for scenario, setting, is_same in zip(scenarios, settings, same, strict=True):
        if isinstance(setting, str):
            answers.append(Answer(scenario.title, scenario.changes, status="invalid", problem=setting))
            continue
        found = with_price(first, setting) if is_same else next(rest)
        told = idle(setting, scenario.changes)
        if is_same and not told:
            told = (SAME,) if setting.usd_per_h == baseline.usd_per_h else (SAME_PLAN,)
        found = replace(found, remarks=(*found.remarks, *told))
        answers.append(renamed(found, scenario.title, scenario.changes))
    return renamed(first, BASELINE, ()), tuple(answers)
