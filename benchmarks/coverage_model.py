"""A tiny model of any transformers architecture, with inputs that it accepts."""

import contextlib
import functools
import io
import itertools
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_configs import tiny_config, with_dropout, without_cache, without_randomness
from tiny_defaults import default_config
from tiny_hints import Hints, fields_named, numbers_demanded
from tiny_scale import FIRST_WORD, LAST_WORD, STYLES
from tiny_search import Search
from torch import nn

from graphpar.frontend.torch_private import flatten
from graphpar.hf.architectures import Architecture, config_for, find_architecture, head_classes
from graphpar.hf.inputs import Wanted, candidate_inputs, further_input, unknown_inputs
from graphpar.hf.repair import with_repairs

BATCH, LENGTH = 4, 10
MAX_PARAMETERS = 70_000_000
"""A model larger than this is not tiny; the next style of scaling is tried."""
ATTEMPT_S = 10.0
"""Processor time for one attempt to build a model or to run it."""
_NO_VALUES = re.compile(
    r"meta tensor|Cannot copy out of meta|item\(\)|meta device|data.dependent", re.IGNORECASE
)
_MAX_HINTS = 2
"""How often a style is tried again with fields left as they are that errors name."""
SAME = 4
"""After so many equal refusals of inputs the next configuration is tried."""
WANTED = Wanted(BATCH, LENGTH, words=(FIRST_WORD, LAST_WORD))


class NoTinyModelError(Exception):
    """No configuration and inputs were found with which the architecture runs at all."""


@dataclass(frozen=True)
class Built:
    """A tiny model that runs in eager PyTorch.

    Attributes:
        name: The architecture's prefix.
        model: With random weights, no dropout; nothing in it is zero.
        config: Its configuration.
        kwargs: Inputs, labels among them where the head takes them.
        loss: Whether the model itself returns a loss.
        style: Which style of scaling made it.
    """

    name: str
    model: nn.Module
    config: Any
    kwargs: dict[str, Any]
    loss: bool
    style: int
    tried: list[str] = field(default_factory=list)

    def with_dropout(self) -> nn.Module:
        """The same model with dropout on, where the architecture has it."""
        config = with_dropout(type(self.config).from_dict(self.config.to_dict()))
        torch.manual_seed(0)
        model = type(self.model)(config)
        model.load_state_dict(self.model.state_dict())
        assert isinstance(model, nn.Module)
        noisy: nn.Module = settled(model.train(), self.kwargs)
        return noisy


def build_tiny(name: str) -> Built:
    """The first tiny model of an architecture that runs, forward and backward.

    Raises:
        ValueError: There is no such architecture.
        NoTinyModelError: Nothing that was tried runs; tells the last few reasons.
    """
    architecture = find_architecture(name)
    tried: list[str] = []
    for number, style in enumerate(STYLES):
        hints: Hints = {}
        for _ in range(_MAX_HINTS + 1):
            refused: list[Exception] = []
            make = functools.partial(tiny_config, architecture.config_class, style, hints)
            built = _tried(architecture, make, number, refused)
            tried += [_short(error) for error in refused]
            if built is not None:
                built.tried[:] = tried
                return built
            more = _hints(refused, architecture)
            if more.keys() <= hints.keys():
                break
            hints = {**hints, **more}
    refused = []
    built = _tried(architecture, functools.partial(_found, architecture), len(STYLES), refused)
    if built is not None:
        return built
    tried += [_short(error) for error in refused]
    reasons = Counter(tried).most_common(3)
    raise NoTinyModelError(
        "; ".join([*(reason for reason, _ in reasons), *tried[-1:]])
        or "no model class has this configuration"
    )


def _hints(refused: Sequence[Exception], architecture: Architecture) -> dict[str, int | None]:
    """What the refusals say of fields of the configuration."""
    found: dict[str, int | None] = {}
    try:
        config = default_config(architecture.config_class)
    except Exception:  # a composite whose parts do not fit it
        config = None
    for error in refused:
        found |= fields_named(error, config) if config is not None else numbers_demanded(error)
    return found


def _found(architecture: Architecture) -> Any:
    """A configuration found by trying.

    Raises:
        NoTinyModelError: Not even the default one runs.
    """
    known: list[Any] = []

    def size_of(config: Any) -> int | None:
        without_randomness(without_cache(config))
        for made in known or head_classes(
            architecture, bool(getattr(config, "is_encoder_decoder", False))
        ):
            size = _size_if_it_runs(made, config_for(made, config))
            if size is not None:
                known[:] = [made]
                return size
        return None

    config = Search(architecture.config_class, size_of).run()
    if config is None:
        raise NoTinyModelError("not even the default configuration with fewer layers runs")
    return without_cache(config)


def _size_if_it_runs(made: Any, config: Any) -> int | None:
    """Numbers in a model and its inputs, if it runs forward on the meta device, or else on the CPU."""
    try:
        with at_most(ATTEMPT_S), torch.device("meta"):
            model = made(config)
    except Exception:
        return None
    parameters = int(sum(p.numel() for p in model.parameters()))
    asks = False
    more = functools.partial(further_input, model, WANTED)

    def attempt(kwargs: dict[str, Any]) -> Any:
        return model(**kwargs)

    for candidate in candidate_inputs(model, WANTED):
        try:
            with at_most(ATTEMPT_S), torch.no_grad():
                kwargs, _ = with_repairs(candidate, attempt, more)
        except Exception as error:
            asks = asks or _NO_VALUES.search(str(error)) is not None
            continue
        return parameters + _numbers_in(kwargs)
    if not asks or parameters > MAX_PARAMETERS:
        return None
    try:
        with at_most(ATTEMPT_S):
            model = made(config)
    except Exception:
        return None
    for candidate in itertools.islice(candidate_inputs(model, WANTED), 6):
        try:
            with at_most(ATTEMPT_S), torch.no_grad():
                kwargs, _ = with_repairs(candidate, attempt, more)
        except Exception:
            continue
        return parameters + _numbers_in(kwargs)
    return None


def _numbers_in(kwargs: dict[str, Any]) -> int:
    return sum(v.numel() for v in kwargs.values() if isinstance(v, torch.Tensor))


def _tried(
    architecture: Architecture, make: Callable[[], Any], number: int, refused: list[Exception]
) -> Built | None:
    """The first model class that runs with a configuration, and inputs with which it does."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = without_randomness(make())
    except Exception as error:
        refused.append(_told(error, f"style {number}"))
        return None
    for model in _models(architecture, config, refused):
        own = config_for(type(model), config)
        said: Counter[str] = Counter()
        more = functools.partial(further_input, model, WANTED)
        for candidate in candidate_inputs(model, WANTED):
            try:
                with at_most(ATTEMPT_S):
                    kwargs, loss = with_repairs(candidate, functools.partial(_runs, model), more)
            except Exception as error:
                refused.append(_told(error, type(model).__name__))
                said[str(error)] += 1
                if isinstance(error, (RuntimeError, TimeoutError)) and said[str(error)] == SAME:
                    break  # the sizes of the model do not fit each other, whatever it is given
                continue
            return Built(architecture.name, model.train(), own, kwargs, loss, number)
        if not said:
            unknown = ", ".join(unknown_inputs(model, WANTED)) or "any of its inputs"
            refused.append(NoTinyModelError(f"{type(model).__name__}: nothing tells what {unknown} is"))
    return None


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """
    Raises:
        TimeoutError: What is within took so much processor time; as soon as the op at hand ends.
    """

    def late(number: int, frame: Any) -> None:
        raise TimeoutError(f"no end after {seconds:g} s of processor time")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _models(architecture: Architecture, config: Any, refused: list[Exception]) -> Iterator[Any]:
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    classes = head_classes(architecture, encoder_decoder)
    for made in sorted(classes, key=lambda made: config_for(made, config) is not config):
        own = config_for(made, config)
        try:
            with at_most(ATTEMPT_S), torch.device("meta"):
                size = sum(p.numel() for p in made(own).parameters())
            if size > MAX_PARAMETERS:
                refused.append(NoTinyModelError(f"{made.__name__} has {size} parameters"))
                continue
            torch.manual_seed(0)
            with at_most(ATTEMPT_S):
                model = made(own)
        except Exception as error:
            refused.append(_told(error, made.__name__))
            continue
        stir(model)
        yield model


def settled(model: Any, kwargs: dict[str, Any]) -> Any:
    """The model after a call in its mode: some rescale weights or swap parts at the first one."""
    before = [(b, b.clone()) for b in model.buffers()]
    with torch.no_grad():
        model(**kwargs)
        for buffer, value in before:
            buffer.copy_(value)
    return model


def stir(model: nn.Module) -> None:
    """Add noise to every weight: zeros and equal weights hide mistakes, empty memory is no number."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-10, 10)
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def _runs(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the model returns a loss of its own; raises where it does not run."""
    model.train()
    result = model(**kwargs)
    own = getattr(result, "loss", None)
    loss = own if isinstance(own, torch.Tensor) and own.numel() == 1 else mean_loss(result, None)
    if not bool(torch.isfinite(loss)):
        raise ArithmeticError(f"the loss is {float(loss)}")
    loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        model(**kwargs)
    return loss is own


def mean_loss(output: Any, _: Any) -> torch.Tensor:
    """A loss for models without one: the mean square of all floating tensors returned.

    Raises:
        ValueError: The model returns none that depends on its weights.
    """
    leaves, _spec = flatten(output)
    parts = [t for t in leaves if isinstance(t, torch.Tensor) and t.is_floating_point() and t.numel()]
    if not parts:
        raise ValueError("the model returns no floating tensor")
    wide = [t if t.dtype == torch.float64 else t.float() for t in parts[:2]]
    return sum((t.square().mean() for t in wide), torch.zeros(()))


def _told(error: Exception, where: str) -> Exception:
    """The error, with a note of where it was raised."""
    error.add_note(where)
    return error


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    if isinstance(error, NoTinyModelError):
        return text
    return ": ".join([*getattr(error, "__notes__", [])[-1:], type(error).__name__, text])
