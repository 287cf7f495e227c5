"""A study: a baseline and scenarios, each planned anew, in parallel and from the cache where known."""

import dataclasses
import hashlib
import importlib.metadata
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from graphpar import catalogue
from graphpar.cluster_build import num_cores
from graphpar.errors import GraphparError
from graphpar.scenarios.cache import AnswerCache, key_of
from graphpar.scenarios.changes import apply
from graphpar.scenarios.consistent import consistent
from graphpar.scenarios.pricing import PriceBook, priced_by, trust
from graphpar.scenarios.solve import Task, solve_together
from graphpar.scenarios.types import Answer, Scenario, Setting, renamed

Progress = Callable[[int, int], None]
"""Told how many answers are there, of how many."""


STUDY_S = 30.0
"""Wall-clock time that the searches of one study may take together where nobody says otherwise."""


LEAST_TOGETHER = 12
"""Settings that differ in their links alone help each other; so many of them at least stay together."""

_Item = TypeVar("_Item")


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

    def answers(self, settings: Sequence[Setting]) -> list[Answer]:
        """One answer per setting; equal settings are solved once."""
        keys = [self._key(setting) for setting in settings]
        missing = {
            key: setting
            for key, setting in zip(keys, settings, strict=True)
            if key not in self._known and not self._from_cache(key)
        }
        done = len(set(keys)) - len(missing)
        total = len(set(keys))
        self._tell(done, total)
        for key, answer in self._solved(missing):
            self._known[key] = answer
            if answer.status != "invalid":
                self.kept.put(key, answer)
            done += 1
            self._tell(done, total)
        return [self._known[key] for key in keys]

    def _tell(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(done, total)

    def _from_cache(self, key: str) -> bool:
        found = self.kept.get(key)
        if found is not None:
            self._known[key] = found
        return found is not None

    def _key(self, setting: Setting) -> str:
        calibration = self.book.calibration
        devices = setting.cluster.devices
        fingerprint = repr(calibration) if calibration and any(d.is_local_cpu for d in devices) else ""
        return key_of(
            {
                "version": _version(),
                "catalogue": _catalogue_hash(),
                "model": self.book.baseline().model_hash,
                "state": self.book.state_bytes(),
                "setting": setting.to_dict(),
                "calibration": fingerprint,
                "gap": self.limits.gap,
                "time_limit_s": self.limits.time_limit_s,
            }
        )

    def _solved(self, missing: Mapping[str, Setting]) -> Iterator[tuple[str, Answer]]:
        if not missing:
            return
        with _executor(self.limits.processes, len(missing)) as submit:
            waiting: dict[Future[list[Answer]], list[tuple[str, Setting]]] = {}
            for group in shared_out(_alike(missing), self.limits.processes or num_cores()):
                tasks, asked = [], []
                for key, setting in group:
                    try:
                        tasks.append(self._task(setting))
                    except (ValueError, GraphparError) as error:
                        yield key, Answer("", status="invalid", problem=str(error), batch=setting.batch)
                        continue
                    asked.append((key, setting))
                if tasks:
                    waiting[submit(tasks)] = asked
            for future in as_completed(waiting):
                for (key, setting), answer in zip(waiting[future], future.result(), strict=True):
                    yield key, self._priced(answer, setting)

    def _task(self, setting: Setting) -> Task:
        return Task(
            self.book.table(setting),
            setting.schedule,
            setting.microbatches,
            setting.recompute,
            setting.layout,
            self.limits.gap,
            self.limits.time_limit_s,
        )

    def _priced(self, answer: Answer, setting: Setting) -> Answer:
        """The answer with what only the setting knows: money, power, trust."""
        error, remarks = trust(setting, self.book)
        if setting.layout is not None and setting.layout.tensor > 1:
            remarks = (*remarks, *_group_remarks(setting))
        cluster = setting.cluster
        nodes = {cluster.device(name).node for name in answer.used}
        prices = dict(setting.usd_per_h)
        usd_per_h = sum(prices[n] for n in nodes) if nodes and nodes <= set(prices) else None
        powers = [cluster.device(name).power_w for name in answer.used]
        watts = sum(p for p in powers if p is not None)
        known = bool(powers) and all(p is not None for p in powers)
        return replace(
            answer,
            usd_per_h=usd_per_h,
            watts=watts if known else None,
            error_bar=error,
            remarks=(*answer.remarks, *remarks),
        )


def _alike(missing: Mapping[str, Setting]) -> list[list[tuple[str, Setting]]]:
    """Settings that differ in their links alone, together; every other by itself."""
    groups: dict[str, list[tuple[str, Setting]]] = {}
    for key, setting in missing.items():
        own = (setting.schedule, setting.microbatches, setting.recompute, setting.layout)
        nodes = [node.name for node in setting.cluster.nodes]
        alike = f"{priced_by(setting)} {own} {nodes}" if setting.layout is None else key
        groups.setdefault(alike, []).append((key, setting))
    return list(groups.values())


def shared_out(groups: Sequence[list[_Item]], processes: int) -> list[list[_Item]]:
    """Groups of many settings cut into one part per process, each with fast links and slow ones.

    >>> shared_out([list(range(5)), ["a"]], 2)
    [[0, 1, 2, 3, 4], ['a']]
    >>> [len(part) for part in shared_out([list(range(100))], 2)]
    [50, 50]
    """
    parts = [min(processes, len(group) // LEAST_TOGETHER) or 1 for group in groups]
    return [group[i::n] for group, n in zip(groups, parts, strict=True) for i in range(n)]


def _group_remarks(setting: Setting) -> tuple[str, ...]:
    """How tensor groups were priced, and what of that can run."""
    if setting.precision == "float32" and not setting.recompute:
        return ()
    return (
        "tensor groups in this format, or with recomputation, are priced by a rule: layers divided "
        "evenly at 90 % of full speed, two sums per layer",
    )


def fair_limit_s(scenarios: int, processes: int | None) -> float:
    """Seconds for each of so many scenarios.

    >>> fair_limit_s(3, 2), fair_limit_s(40, 2), fair_limit_s(1000, 2)
    (10.0, 1.5, 0.4)
    """
    together_s = STUDY_S * (processes if processes is not None else num_cores())
    return min(max(together_s / scenarios, 0.4), 10.0)


def _version() -> str:
    try:
        return importlib.metadata.version("graphpar")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@cache
def _catalogue_hash() -> str:
    """Of the data that prices come from; a changed number makes other answers."""
    files = sorted(catalogue.data_directory().glob("*.toml"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@contextmanager
def _executor(
    processes: int | None, tasks: int
) -> Iterator[Callable[[list[Task]], "Future[list[Answer]]"]]:
    """Submits to other processes, or runs at once where one process is enough."""
    count = min(processes if processes is not None else num_cores(), tasks)
    if count <= 1 or (tasks <= 2 and processes is None):
        yield _at_once
        return
    # Fresh interpreters: this one may have threads that a fork would not survive.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        try:
            yield lambda tasks: pool.submit(solve_together, tasks)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _at_once(tasks: list[Task]) -> "Future[list[Answer]]":
    future: Future[list[Answer]] = Future()
    future.set_result(solve_together(tasks))
    return future


def ask(
    solver: Solver, baseline: Setting, scenarios: Sequence[Scenario]
) -> tuple[Answer, tuple[Answer, ...]]:
    """The baseline's answer and the scenarios', in order; senseless scenarios are answered so."""
    settings: list[Setting | str] = []
    for scenario in scenarios:
        try:
            settings.append(apply(baseline, scenario.changes))
        except (ValueError, GraphparError) as error:
            settings.append(str(error))
    sound = [s for s in settings if isinstance(s, Setting)]
    found = consistent([baseline, *sound], solver.answers([baseline, *sound]))
    first, rest = found[0], iter(found[1:])
    answers = [
        renamed(next(rest), scenario.title, scenario.changes)
        if isinstance(setting, Setting)
        else Answer(scenario.title, scenario.changes, status="invalid", problem=setting)
        for scenario, setting in zip(scenarios, settings, strict=True)
    ]
    return renamed(first, "baseline", ()), tuple(answers)


def as_plain(answer: Answer, baseline: Answer) -> dict[str, Any]:
    """An answer as plain data with its derived numbers."""
    data = dataclasses.asdict(answer)
    data["samples_per_s"] = answer.samples_per_s
    data["usd_per_million_samples"] = answer.usd_per_million_samples
    data["kwh_per_million_samples"] = answer.kwh_per_million_samples
    data["least_headroom_bytes"] = min(answer.headroom_bytes.values(), default=None)
    data["change"] = answer.change(baseline)
    data["needless"] = answer.needless
    return data
