"""What MODEL means on the command line: a factory, a transformers architecture, or an export.

- `package.module:factory` calls the factory without arguments. A function
  `example_inputs(batch_size, seq_len)` beside it gives the inputs: a tensor, a tuple of positional
  arguments, a dict of keyword arguments, or a pair of such a tuple and dict. It may be left out for
  transformers models.
- `hf:NAME` builds a transformers architecture from its configuration; nothing is downloaded.
- `PATH.pt2` is a file written by `torch.export.save`.
"""

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from graphpar.cluster_build import system_memory_bytes
from graphpar.frontend.frames import being_built
from graphpar.hf.models import build_hf_model, hf_inputs, is_hf_model
from graphpar.units import format_bytes

_FORMS = "give package.module:factory, hf:NAME, or a file that ends in .pt2"


@dataclass(frozen=True)
class LoadedModel:
    """A model with example inputs; all on the meta device where no weights were asked for."""

    name: str
    model: nn.Module
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def load_model(spec: str, *, batch_size: int, seq_len: int, train: bool, weights: bool) -> LoadedModel:
    """The model that a MODEL argument names, with inputs for one global batch.

    Args:
        spec: What the user wrote.
        batch_size: Samples in the inputs.
        seq_len: Tokens per sample, where the model takes tokens.
        train: Put the model in training mode and let its inputs include labels.
        weights: False builds `hf:` models without weights.

    Raises:
        ValueError: The argument names no model, or there are no example inputs.
    """
    if spec.startswith("hf:"):
        return _load_hf(spec, batch_size, seq_len, train, weights)
    if spec.endswith(".pt2"):
        return _load_export(Path(spec))
    module, colon, factory = spec.partition(":")
    if not colon or not module or not factory:
        raise ValueError(f"MODEL {spec!r} is none of the known forms; {_FORMS}")
    return _load_factory(spec, module, factory, batch_size, seq_len, train)


def _load_hf(spec: str, batch_size: int, seq_len: int, train: bool, weights: bool) -> LoadedModel:
    if weights:
        _check_weights_fit(spec, seq_len)
    with contextlib.nullcontext() if weights else torch.device("meta"):
        model = build_hf_model(spec.removeprefix("hf:"), seq_len)
        model.train(train)
        kwargs = hf_inputs(model, batch_size, seq_len, train)
    return LoadedModel(spec, model, kwargs=kwargs)


def _check_weights_fit(spec: str, seq_len: int) -> None:
    """Refuse before the system ends the process without a word."""
    with torch.device("meta"):
        model = build_hf_model(spec.removeprefix("hf:"), seq_len)
    need = sum(p.numel() * p.element_size() for p in model.parameters())
    have = system_memory_bytes(math.inf)
    if need > have:
        raise ValueError(
            f"{spec} has {format_bytes(need)} of weights, more than this machine's memory of "
            f"{format_bytes(have)}; graphpar plan needs no weights, and graphpar.compile(weights=...) "
            "lets each rank read its own, nobody the whole model"
        )


def _import_advice(spec: str) -> str:
    """
    >>> _import_advice("models/gpt.py:build")
    'give the name of the module, not of its file: models.gpt:build'
    """
    module, _, factory = spec.partition(":")
    if module.endswith(".py"):
        name = module.removesuffix(".py").replace("/", ".").strip(".")
        return f"give the name of the module, not of its file: {name}:{factory}"
    return "run in the folder that holds it, or install it"


def _load_factory(
    spec: str, module_name: str, factory_name: str, batch_size: int, seq_len: int, train: bool
) -> LoadedModel:
    with _working_directory_on_path():
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(
                f"MODEL {spec!r}: module {module_name} cannot be imported: {error}; "
                f"{_import_advice(spec)}"
            ) from error
        factory = getattr(module, factory_name, None)
        if factory is None:
            raise ValueError(f"MODEL {spec!r}: module {module_name} has no {factory_name}")
        model = _made(spec, factory)
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"MODEL {spec!r}: {factory_name} gives a {type(model).__name__}, not a torch.nn.Module"
            )
        model.train(train)
        args, kwargs = _example_inputs(spec, module, model, batch_size, seq_len, train)
    return LoadedModel(spec, model, args, kwargs)


def _made(spec: str, factory: Any) -> Any:
    """What a factory makes; a module is its own factory."""
    if isinstance(factory, nn.Module) or not callable(factory):
        return factory
    try:
        return factory()
    except Exception as error:
        where = being_built(error)
        hint = "it should fail at the same line" if where else "it has to need no arguments"
        raise ValueError(
            f"MODEL {spec!r}: building the model failed{where}: {type(error).__name__}: {error}; call "
            f"the factory on its own, {hint}"
        ) from error


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    """An installed command does not look for modules in the working directory by itself."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _example_inputs(
    spec: str, module: object, model: nn.Module, batch_size: int, seq_len: int, train: bool
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    give: Callable[[int, int], Any] | None = getattr(module, "example_inputs", None)
    if give is not None:
        try:
            inputs = give(batch_size, seq_len)
        except Exception as error:
            first, *_ = str(error).splitlines() or [""]
            raise ValueError(
                f"MODEL {spec!r}: example_inputs({batch_size}, {seq_len}) failed: "
                f"{type(error).__name__}: {first}"
            ) from error
        return _as_call(spec, inputs)
    if is_hf_model(model):
        return (), hf_inputs(model, batch_size, seq_len, train)
    raise ValueError(
        f"MODEL {spec!r}: there are no example inputs; define a function "
        "example_inputs(batch_size, seq_len) beside the factory that returns the arguments "
        "of the model's forward"
    )


def _as_call(spec: str, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `example_inputs` gave as positional and keyword arguments."""
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
            return inputs[0], dict(inputs[1])
        return inputs, {}
    raise ValueError(
        f"MODEL {spec!r}: example_inputs gives a {type(inputs).__name__}; it should give a tensor, "
        "a tuple of arguments, a dict of keyword arguments, or a pair of both"
    )


def _load_export(path: Path) -> LoadedModel:
    if not path.is_file():
        raise ValueError(f"MODEL {path}: there is no such file; {_FORMS}")
    try:
        with _no_pickled_code():
            program = torch.export.load(path)
    except Exception as error:
        raise ValueError(
            f"MODEL {path}: is not an export that can be loaded: {error}; "
            "write it with torch.export.save, from the same torch version"
        ) from error
    if program.example_inputs is None:
        raise ValueError(f"MODEL {path}: holds no example inputs; export the model anew")
    args, kwargs = program.example_inputs
    return LoadedModel(str(path), program.module(), tuple(args), dict(kwargs))


@contextlib.contextmanager
def _no_pickled_code() -> Iterator[None]:
    """Make torch.load refuse to run code from a file, which `torch.export.load` would let it do.

    https://docs.pytorch.org/docs/stable/notes/serialization.html names the variable.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
