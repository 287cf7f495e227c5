"""What a model keeps in plain attributes from one call to the next, which a graph cannot see.

A graph holds what the example call did: a number counted up in Python, a tensor or a list that the next
call reads would stay as they were then. Buffers are the place for such values. What modules hold is
compared before and after the forward; only where something moved the model is called twice, to see
whether its result depends on it.
"""

import logging
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from graphpar.errors import CaptureError
from graphpar.frontend.frames import is_users
from graphpar.frontend.registered import registered_left
from graphpar.frontend.torch_private import flatten, writes_to

_log = logging.getLogger("graphpar.capture")
_TORCHS_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has; its tensors and submodules are among them."""
_PLAIN = (bool, str, bytes, int, float, complex, type(None))
_DEEPEST = 4
_LONGEST = 10_000

_harmless: WeakKeyDictionary[nn.Module, tuple[Any, Set[tuple[str, str]]]] = WeakKeyDictionary()
"""For models without values how they were, and the attributes whose change did not change their graph: a
capture exports a model several times, and asking takes two more exports, of every block."""

Numbers = dict[tuple[str, str], float]
"""Plain numbers that modules keep as attributes, by module and attribute."""


def numbers_of(model: nn.Module) -> Numbers:
    """The plain numbers of a model and its submodules."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def moved_numbers(model: nn.Module, before: Numbers) -> set[tuple[str, str]]:
    """Which numbers are others than before; new ones do not count."""
    return {key for key, value in numbers_of(model).items() if before.get(key, value) != value}


def refuse_counters(
    model: nn.Module,
    moved: set[tuple[str, str]],
    call: Callable[[], Any],
    graph: Callable[[], str],
) -> None:
    """Refuse a model whose result depends on a number that it changes at every call.

    A number that depends on the inputs alone, such as a remembered length, stands still when the model is
    called again with the same; so it is called twice. One that only counts does not show in the graph.

    Args:
        model: The model.
        moved: The numbers that one call changed.
        call: Calls the model.
        graph: The text of its graph at the numbers it has.

    Raises:
        CaptureError: Names the module and the attribute.
    """
    if not moved:
        return
    seen: list[Numbers] = [numbers_of(model)]
    try:
        with left_as_it_was(model):
            for _ in range(2):
                call()
                seen.append(numbers_of(model))
    except Exception as error:
        _log.warning("Whether %s change at every call could not be tried: %s", sorted(moved), error)
        return
    counters = [key for key in sorted(moved) if seen[1].get(key) != seen[2].get(key)]
    before = graph() if counters else ""
    for path, name in counters:
        module = model.get_submodule(path)
        values = [numbers.get((path, name)) for numbers in seen]
        with left_as_it_was(model):
            setattr(module, name, values[1])
            if graph() == before:
                continue
        raise CaptureError(
            f"Module {path or '(top)'!r} ({type(module).__name__}) changes its attribute {name!r} at "
            f"every call ({', '.join(map(repr, values))}, ...), and its result depends on it; a graph "
            f"would keep one value. Keep the number in a buffer (self.register_buffer({name!r}, "
            "torch.tensor(...))) and change it in place."
        )


@dataclass(frozen=True)
class Kept:
    """What the modules of a model hold in attributes that are neither tensors by name nor numbers.

    Attributes:
        marks: For each module and attribute what tells whether it was changed since.
        held: The values, kept alive so that no other takes the identity of one of them.
    """

    marks: Mapping[tuple[str, str], Hashable]
    held: tuple[Any, ...]

    @classmethod
    def by(cls, model: nn.Module) -> "Kept":
        """What a model holds now."""
        marks: dict[tuple[str, str], Hashable] = {}
        held: list[Any] = []
        seen: dict[int, Hashable] = {}
        for path, module in model.named_modules():
            for name, value in _attributes(module):
                if type(value) not in (int, float):
                    marks[path, name] = _mark(value, seen, held, 0)
        for path, names, name in _outside(model):
            marks[path, name] = _mark(names[name], seen, held, 0)
        return cls(marks, tuple(held))

    def changed_since(self, before: "Kept") -> set[tuple[str, str]]:
        """Modules and attributes that hold something else than before."""
        gone = object()
        return {key for key, mark in self.marks.items() if before.marks.get(key, gone) != mark}


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _TORCHS_OWN]


def _outside(model: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Plain values of their files that the user's forwards read: module, the file's names, and which."""
    for path, module in {type(m): (p, m) for p, m in model.named_modules()}.values():
        forward = type(module).forward
        code = getattr(forward, "__code__", None)
        if code is None or not is_users(code.co_filename):
            continue
        names = forward.__globals__
        yield from (
            (path, names, name)
            for name in code.co_names
            if name in names
            if isinstance(names[name], (*_PLAIN, torch.Tensor, list, dict, deque))
        )


def _mark(value: Any, seen: dict[int, Hashable], held: list[Any], depth: int) -> Hashable:
    """Equal for a value that was not changed in between; None for what no graph would depend on."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        held.append(value)
        return "tensor", id(value), 0 if value.is_inference() else writes_to(value)
    inside = _contents(value)
    if inside is None or depth > _DEEPEST:
        return None
    if id(value) not in seen:
        seen[id(value)] = None
        held.append(value)
        made = tuple((str(key), _mark(part, seen, held, depth + 1)) for key, part in inside)
        seen[id(value)] = made
    return seen[id(value)]


def _contents(value: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container or of a plain object; None for anything else."""
    if isinstance(value, (nn.Module, ModuleType, type, torch.dtype, torch.device)) or callable(value):
        return None
    if isinstance(value, (dict, list, tuple, deque)) and len(value) > _LONGEST:
        return [("length", len(value))]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, (list, tuple, deque)):
        return list(enumerate(value))
    return list(vars(value).items()) if hasattr(value, "__dict__") else None


def refuse_kept(
    model: nn.Module,
    moved: set[tuple[str, str]],
    call: Callable[[], Any],
    graph: Callable[[], str],
    ops: Callable[[], Any],
) -> None:
    """Refuse a model whose result depends on what its call before left in plain attributes.

    Without values there are no results to compare: graphs are, and a dependence is only told.

    Args:
        model: The model.
        moved: The attributes that one call changed.
        call: Calls the model.
        graph: The text of its graph with the attributes it has.
        ops: The operators that a call with these comes to, which is found in a fraction of the time.

    Raises:
        CaptureError: Called twice with the same, it returns something else; names module and attributes.
    """
    if not moved:
        return
    names = ", ".join(f"{path}.{name}".lstrip(".") for path, name in sorted(moved)[:3])
    if any(t.device.type == "meta" for t in (*model.parameters(), *model.buffers())):
        now = _plainly(model)
        then, harmless = _harmless.get(model, (None, frozenset[tuple[str, str]]()))
        if now == then and moved <= harmless:
            return
        if any(_same_after_a_call(model, call, told) for told in (ops, graph)):
            _harmless[model] = now, moved
        else:
            _log.warning("The model keeps values in plain attributes (%s); a graph does what its first "
                         "call does", names)  # fmt: skip
        return
    try:
        with left_as_it_was(model):
            with _same_numbers(model):
                first, _ = flatten(call())
            with _same_numbers(model):
                second, _ = flatten(call())
    except Exception as error:
        _log.warning("Whether the result depends on %s could not be tried: %s", names, error)
        return
    if len(first) == len(second) and all(map(_as_good_as_equal, first, second)):
        return
    path, name = min(moved)
    module = model.get_submodule(path)
    code = getattr(type(module).forward, "__code__", None)
    line = f", {code.co_filename}:{code.co_firstlineno}" if code else ""
    where = f"Module {path or '(top)'!r} ({type(module).__name__}{line})"
    depends = "its result depends on them: the same call gives another result the second time"
    if name in module._buffers:
        raise CaptureError(
            f"{where} puts tensors of another shape or type in the place of buffers, or of buffers that "
            f"are held elsewhere too ({names}), and {depends}. Let a buffer keep its shape and type, or "
            f"write to it in place (self.{name}.copy_(value.detach()))."
        )
    raise CaptureError(
        f"{where} keeps values in plain attributes ({names}) from one call to the next, and {depends}. A "
        f"graph would repeat the first. Keep the value in a buffer (self.register_buffer({name!r}, ...)) "
        f"and write to it in place (self.{name}.copy_(value.detach())), or pass it as an argument and "
        "return it."
    )


def _plainly(model: nn.Module) -> Any:
    """What a model's graph depends on beside its inputs, as far as plain attributes say."""
    return Kept.by(model).marks, numbers_of(model), [module.training for module in model.modules()]


def _same_after_a_call(model: nn.Module, call: Callable[[], Any], told: Callable[[], Any]) -> bool:
    """Whether what one call keeps leaves what is told of the next; no where it cannot be tried."""
    try:
        with attributes_left(model):
            first = told()
            call()
            same: bool = told() == first
            return same
    except Exception:
        return False


def _as_good_as_equal(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(torch.equal(a, b) or torch.allclose(a, b, rtol=1e-4, atol=1e-7, equal_nan=True))


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Calls within it leave no trace in buffers, plain attributes and torch's random state."""
    with _same_numbers(model), attributes_left(model):
        yield


@contextmanager
def _same_numbers(model: nn.Module) -> Iterator[None]:
    """Calls within it leave no trace in buffers and torch's random state."""
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


@contextmanager
def attributes_left(model: nn.Module) -> Iterator[None]:
    """Within it, a model may do to its plain attributes what it likes; afterwards they are as before."""
    with ExitStack() as stack:
        stack.enter_context(registered_left(model))
        seen: set[int] = set()
        for _, names, name in _outside(model):
            stack.callback(names.__setitem__, name, names[name])
            _save(names[name], stack, seen, 0)
        for module in model.modules():
            own = vars(module)
            stack.callback(_put_back, own, {k: v for k, v in own.items() if k not in _TORCHS_OWN})
            for _, value in _attributes(module):
                _save(value, stack, seen, 0)
        yield


def _put_back(own: dict[str, Any], before: dict[str, Any]) -> None:
    for name in [name for name in own if name not in before and name not in _TORCHS_OWN]:
        del own[name]
    for name, value in before.items():
        if own.get(name, before) is not value:
            own[name] = value


def _save(value: Any, stack: ExitStack, seen: set[int], depth: int) -> None:
    inside = _contents(value)
    if inside is None or id(value) in seen or depth > _DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, (dict, list, deque)):
        stack.callback(_refill, value, value.copy())
    elif not isinstance(value, tuple):
        stack.callback(_refill, vars(value), vars(value).copy())
    for _, part in inside:
        _save(part, stack, seen, depth + 1)


def _refill(container: Any, before: Any) -> None:
    """Put the contents of a container back, where they are others."""
    now = list(container.items()) if isinstance(container, dict) else list(container)
    then = list(before.items()) if isinstance(before, dict) else list(before)
    if len(now) == len(then) and all(_identical(a, b) for a, b in zip(now, then, strict=True)):
        return
    container.clear()
    container.update(before) if isinstance(container, dict) else container.extend(before)


def _identical(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return all(x is y for x, y in zip(a, b, strict=True))
    return a is b
