"""Clocks and random numbers of the host that a model reads while it runs.

A graph would hold what they gave at the capture for ever. Random streams of Python and NumPy tell by
their state that a model drew from them; single numbers that decide nothing may be drawn (`draws.py`).
Clocks and sources of fresh randomness are replaced while the model is exported: they note which line of
the user's code asked them. A model may well time itself; so one that asked is exported once more with
clocks that are far ahead, and refused if another graph comes out.
"""

import contextlib
import datetime
import os
import random
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from graphpar.errors import CaptureError
from graphpar.frontend.draws import Draws, draws_stand_ins
from graphpar.frontend.frames import blame, called_by_user, is_users, running

_now, _timedelta = time.time, datetime.timedelta
_AHEAD_S = 12_345_678.9
"""How far a clock is ahead in the second export: another minute, hour, weekday, month and year."""
_CLOCKS = ("time", "monotonic", "perf_counter", "process_time", "thread_time")
_CALENDARS = ("localtime", "gmtime")
_FRESH: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (os, ("urandom", "getrandom")),
    (uuid, ("uuid1", "uuid4")),
    (secrets, ("token_bytes", "token_hex", "randbits", "randbelow", "choice")),
)
_SEEDED: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (torch, ("manual_seed", "set_rng_state")),
    (torch.random, ("manual_seed", "set_rng_state")),
    (torch.cuda, ("manual_seed", "manual_seed_all", "set_rng_state")),
)


@dataclass
class HostReads:
    """What a model asked the host's clocks and sources of randomness, and where.

    Attributes:
        model: The model, for the names of its modules.
        ahead_s: How far clocks are ahead of the time.
        places: What was read, by the place that read it.
        seeds: What torch's random numbers were seeded with, and where.
        modules: The Python modules of the user's own.
        streams: Random streams of Python and NumPy that the model can reach.
        draws: What becomes of single numbers that the model draws.
    """

    model: nn.Module
    ahead_s: float = 0.0
    places: dict[str, str] = field(default_factory=dict)
    seeds: list[tuple[str, str]] = field(default_factory=list)
    modules: list[ModuleType] = field(init=False)
    streams: list[Any] = field(init=False)
    draws: Draws = field(default_factory=Draws)

    def __post_init__(self) -> None:
        self.modules = _users_modules(self.model)
        self.streams = _streams(self.model, self.modules)

    def note(self, what: str) -> None:
        """Remember that the user's code reads something at the line that is being run."""
        self.places.setdefault(blame(self.model, running()), what)


@contextmanager
def host_watched(reads: HostReads) -> Iterator[None]:
    """Within it, what the user's code reads of clocks and fresh randomness, and seeds, is noted."""
    made: dict[int, Any] = {}
    with ExitStack() as stack:
        for owner, name, stand_in in _stand_ins(reads):
            original = getattr(owner, name)
            made.setdefault(id(original), stand_in(original))
            stack.enter_context(_replaced(owner, name, made[id(original)]))
        for module in reads.modules:  # `from time import time`
            for name, value in list(vars(module).items()):
                if id(value) in made:
                    stack.enter_context(_replaced(module, name, made[id(value)]))
        yield


def refuse_frozen(reads: HostReads, before: str, again: Callable[[], str]) -> None:
    """Refuse a model whose graph depends on what it read of the host, or that draws the same every time.

    Args:
        reads: What was read during the export.
        before: What came out.
        again: Exports once more, with clocks as `reads` says.

    Raises:
        CaptureError: Another graph came out, or torch was given the same seeds; names module and line.
    """
    if not (reads.places or reads.seeds):
        return
    seeds, reads.seeds, reads.ahead_s = reads.seeds, [], _AHEAD_S
    try:
        with left_alone():
            same = again() == before
    finally:
        reads.ahead_s = 0.0
    if not same and reads.places:
        read = "; ".join(f"{what} at {place}" for place, what in reads.places.items())
        raise CaptureError(
            f"The model's result depends on {read}. A captured graph would hold what it gave now, the "
            "same at every step. Read it outside of the model and pass it as a tensor argument, or draw "
            "with torch.rand."
        )
    fixed = next((seed for seed in seeds if seed in reads.seeds), None)
    if fixed is not None:
        place, seed = fixed
        raise CaptureError(
            f"The model seeds torch with {seed} at {place}. A job draws random numbers by seed, step "
            "and place in the batch, whatever the plan, and would not draw these. If all steps shall "
            "have the same, draw them once in __init__ and keep them in a buffer; else leave it out."
        )


@contextmanager
def left_alone() -> Iterator[None]:
    """Calls within it leave the host's and torch's global random streams where they are."""
    host, numbers = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(host)
            np.random.set_state(numbers)


def host_state(reads: HostReads) -> tuple[Any, ...]:
    """Where random streams of the host stand: the global ones, and those that the model can reach."""
    numpy_state: Any = np.random.get_state(legacy=False)
    state = random.getstate(), numpy_state["state"]["pos"], bytes(numpy_state["state"]["key"][:4])
    return (*state, *(_position(stream) for stream in reads.streams))


def host_randomness(reads: HostReads, call: Callable[[], Any]) -> CaptureError:
    """The error for a model that drew on the host: names the line that does so.

    Args:
        reads: Tells the model and its random streams.
        call: Calls the model once more.
    """
    place = _DrawingLine(reads).find(call) or blame(reads.model, ())
    return CaptureError(
        f"{place[0].upper()}{place[1:]}, draws random numbers with NumPy or Python's random while it "
        "runs; a captured graph would hold the same numbers at every step. Switch it off (in "
        "transformers' configurations: mask_time_prob, mask_feature_prob, layerdrop = 0), or draw with "
        "torch.rand and pass what must be drawn elsewhere as an input."
    )


class _DrawingLine:
    """Looks for the line of the user's code after which a random stream of the host stands elsewhere."""

    def __init__(self, reads: HostReads) -> None:
        self._reads = reads
        self._before = host_state(reads)
        self._at: list[tuple[FrameType, int]] = []
        self._found = ""

    def find(self, call: Callable[[], Any]) -> str:
        """The place, empty where a call draws nothing."""
        tracer = sys.gettrace()
        sys.settrace(self._entered)
        try:
            with torch.no_grad(), contextlib.suppress(Exception):
                call()
        finally:
            sys.settrace(tracer)
        return self._found

    def _entered(self, frame: FrameType, event: str, arg: Any) -> Any:
        return self._line if is_users(frame.f_code.co_filename) and not self._found else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        now = host_state(self._reads)
        if now != self._before and not self._found:
            self._found = blame(self._reads.model, self._at)
        self._before, self._at = now, running()
        return self._line


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


_StandIn = Callable[[Any], Any]


def _stand_ins(reads: HostReads) -> Iterator[tuple[Any, str, _StandIn]]:
    """What is replaced, and by what."""
    yield from draws_stand_ins(reads.draws)
    for name in _CLOCKS:
        yield time, name, _clock(reads, f"time.{name}()", 1)
        if hasattr(time, f"{name}_ns"):
            yield time, f"{name}_ns", _clock(reads, f"time.{name}_ns()", 1_000_000_000)
    for name in _CALENDARS:
        yield time, name, _calendar(reads, f"time.{name}()")
    yield datetime, "datetime", lambda original: _dates(reads, original, "datetime")
    yield datetime, "date", lambda original: _dates(reads, original, "date")
    for module, names in _FRESH:
        for name in names:
            if hasattr(module, name):
                yield module, name, _fresh(reads, f"{module.__name__}.{name}()")
    yield (
        np.random,
        "default_rng",
        _fresh(reads, "numpy.random.default_rng() without a seed", seeded=True),
    )
    for module, names in _SEEDED:
        for name in names:
            yield module, name, _seeding(reads)


def _clock(reads: HostReads, what: str, unit: int) -> _StandIn:
    def make(original: Any) -> Any:
        def clock() -> Any:
            value = original()
            if not called_by_user():
                return value
            reads.note(what)
            return value + type(value)(reads.ahead_s * unit)

        return clock

    return make


def _calendar(reads: HostReads, what: str) -> _StandIn:
    def make(original: Any) -> Any:
        def calendar(*given: Any) -> Any:
            if (given and given[0] is not None) or not called_by_user():
                return original(*given)
            reads.note(what)
            return original(_now() + reads.ahead_s)

        return calendar

    return make


def _dates(reads: HostReads, original: Any, name: str) -> Any:
    """A class that makes the original's objects, and whose clocks are watched."""

    class Meta(type(original)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, original)

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, original)

    def clock(method: str) -> Any:
        def read(*args: Any, **kwargs: Any) -> Any:
            value = getattr(original, method)(*args, **kwargs)
            if not called_by_user():
                return value
            reads.note(f"{name}.{method}()")
            return value + _timedelta(seconds=reads.ahead_s)

        return staticmethod(read)

    clocks = {m: clock(m) for m in ("now", "utcnow", "today") if hasattr(original, m)}
    made = {"__new__": lambda cls, *args, **kwargs: original(*args, **kwargs), **clocks}
    return Meta(original.__name__, (original,), made)


def _fresh(reads: HostReads, what: str, *, seeded: bool = False) -> _StandIn:
    def make(original: Any) -> Any:
        def draw(*args: Any, **kwargs: Any) -> Any:
            given = [a for a in (*args, *kwargs.values()) if a is not None]
            if called_by_user() and not (seeded and given):
                reads.note(what)
            return original(*args, **kwargs)

        return draw

    return make


def _seeding(reads: HostReads) -> _StandIn:
    def make(original: Any) -> Any:
        def seed(*args: Any, **kwargs: Any) -> Any:
            if called_by_user():
                given = next(iter((*args, *kwargs.values())), None)
                reads.seeds.append((blame(reads.model, running()), _seed_text(given)))
            return original(*args, **kwargs)

        return seed

    return make


def _seed_text(given: Any) -> str:
    return f"a state of {given.numel()} bytes" if isinstance(given, torch.Tensor) else repr(given)


_packages: set[str] = set()
"""Names of Python modules seen before that belong to torch, Python or installed packages."""


def _users_modules(model: nn.Module) -> list[ModuleType]:
    """Python modules of the user's own: what defines the model's classes, and all outside of packages."""
    of_classes = {c.__module__ for m in model.modules() for c in type(m).__mro__}
    found = [sys.modules[name] for name in of_classes if _is_users_module(name)]
    for name in [name for name in list(sys.modules) if name not in _packages]:
        if "site-packages" in (getattr(sys.modules[name], "__file__", None) or "") or not (
            _is_users_module(name)
        ):
            _packages.add(name)
        elif name not in of_classes:
            found.append(sys.modules[name])
    return found


def _is_users_module(name: str) -> bool:
    module = sys.modules.get(name)
    if not isinstance(module, ModuleType):
        return False
    return name == "__main__" or is_users(getattr(module, "__file__", None) or "<none>")


def _streams(model: nn.Module, modules: Sequence[ModuleType]) -> list[Any]:
    """Random streams of Python and NumPy that are attributes of modules or global in the user's code."""
    held = [value for module in model.modules() for value in vars(module).values()]
    held += [value for module in modules for value in vars(module).values()]
    kinds = (random.Random, np.random.Generator, np.random.RandomState)
    return [value for value in held if isinstance(value, kinds) and not _is_fresh(value)]


def _is_fresh(stream: Any) -> bool:
    return isinstance(stream, random.SystemRandom)


def _position(stream: Any) -> Any:
    if isinstance(stream, random.Random):
        return stream.getstate()
    if isinstance(stream, np.random.Generator):
        return repr(stream.bit_generator.state)
    return repr(stream.get_state())
