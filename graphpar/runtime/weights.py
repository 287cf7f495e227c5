"""Where a job's weights come from: the model itself, files, or a function that makes them.

The driver of a job whose weights are not in the model holds none of them: each rank reads or makes its
own, and nobody the whole model.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import nn

from graphpar.frontend.capture import Captured
from graphpar.runtime import by_value
from graphpar.runtime.pieces import sliced
from graphpar.runtime.program import Slice
from graphpar.runtime.tensor_files import Stored, find_tensors, read_tensor

Init = Callable[[str, torch.Tensor], Any]
"""Fills a fresh tensor in place, given its name in the model."""
WeightSource = str | os.PathLike[str] | Init


class Origin(msgspec.Struct, frozen=True):
    """How a rank comes by one of its tensors: from a file, or without one from the function.

    Attributes:
        name: Its name in the model, which the function is told and which seeds its random numbers.
        dtype: Element type wanted.
        shape: Shape wanted.
        stored: Where it lies in a file.
        cut: The slice of it that is wanted; None for all of it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: Stored | None = None
    cut: Slice | None = None


def materialize(origin: Origin, init: Init | None) -> torch.Tensor:
    """The tensor, on the CPU; a function draws the same random numbers for a name on every rank.

    Raises:
        ValueError: The file cannot be read, or there is no function.
    """
    dtype = getattr(torch, origin.dtype)
    if origin.stored is not None:
        return read_tensor(origin.stored, dtype, origin.cut)
    if init is None:
        raise ValueError(f"There is neither a file nor a function for {origin.name}.")
    tensor = torch.empty(origin.shape, dtype=dtype)
    seed = int.from_bytes(hashlib.blake2b(origin.name.encode(), digest_size=7).digest(), "big")
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(seed)
        init(origin.name, tensor)
    return sliced(tensor, origin.cut)


def pickled_init(init: Init | None) -> bytes:
    """The function for workers in other processes; empty for none.

    Raises:
        ValueError: It cannot be sent.
    """
    if init is None:
        return b""
    try:
        return by_value.dumps(init)
    except Exception as error:
        raise ValueError(
            f"weights= cannot be sent to the workers: {error}. Give a function that refers to nothing "
            "but modules and plain values, or files."
        ) from error


@dataclass
class Weights(Mapping[str, torch.Tensor]):
    """A job's tensors by label: those that are here, and the origins of the others.

    As a mapping it gives any tensor, read or made when asked for. What is here belongs to the driver,
    unless it was `received`: then nobody else has it.
    """

    here: dict[str, torch.Tensor]
    origins: dict[str, Origin] = field(default_factory=dict)
    init: Init | None = None
    received: bool = False

    def __getitem__(self, label: str) -> torch.Tensor:
        if label in self.here:
            return self.here[label]
        return materialize(self.origins[label], self.init)

    def own(self, label: str, device: torch.device) -> torch.Tensor:
        """A tensor that shares no memory with the driver's; no other is held twice."""
        tensor = self[label]
        alone = (
            self.received if label in self.here else tensor.untyped_storage().nbytes() == tensor.nbytes
        )
        return tensor.to(device, copy=not alone)

    def __iter__(self) -> Iterator[str]:
        yield from self.here
        yield from (label for label in self.origins if label not in self.here)

    def __len__(self) -> int:
        return len({*self.here, *self.origins})

    def __contains__(self, label: object) -> bool:
        return label in self.here or label in self.origins

    def part(self, labels: Iterable[str], slices: Mapping[str, Slice]) -> "Weights":
        """Some of them, or slices of them; none is read yet."""
        wanted = tuple(labels)
        here = {la: sliced(self.here[la], slices.get(la)) for la in wanted if la in self.here}
        origins = {
            la: msgspec.structs.replace(self.origins[la], cut=slices.get(la))
            for la in wanted
            if la not in here
        }
        return Weights(here, origins, self.init)

    def take(self, stored: Mapping[str, Stored]) -> None:
        """Have other values from now on, read from files when asked for."""
        for label, place in stored.items():
            old = self.origins.get(label)
            dtype = old.dtype if old is not None else place.dtype
            if label in self.here:
                dtype = str(self.here.pop(label).dtype).removeprefix("torch.")
            self.origins[label] = Origin(label, dtype, place.shape, place)

    def also(self, tensors: Mapping[str, torch.Tensor]) -> "Weights":
        """These, and others that the driver has."""
        return Weights({**self.here, **tensors}, self.origins, self.init)


def find_weights(
    model: nn.Module,
    captured: Captured,
    source: WeightSource | None,
    made_anew: Callable[[Sequence[str]], Mapping[str, torch.Tensor]],
) -> Weights:
    """Every parameter, buffer and constant of a captured model.

    Args:
        model: The model.
        captured: The captured model.
        source: Files, whose values stand before the model's own, or a function that fills what the model
            has no values of; None when the model has its weights.
        made_anew: Makes buffers that follow from the model's configuration alone, as far as it can.

    Raises:
        ValueError: A tensor has no values anywhere, or another shape in its file.
    """
    held = dict(model.named_buffers(remove_duplicate=False))
    held.update(model.named_parameters(remove_duplicate=False))
    tensors = {**captured.constants, **held}
    here = {name: t.detach() for name, t in tensors.items() if t.device.type != "meta"}
    absent = {name: t for name, t in tensors.items() if name not in here}
    lost = [name for name in captured.constants if name in absent]
    if lost:
        raise ValueError(
            f"The model makes a tensor without values of its own while it runs ({lost[0]!r} of its "
            "graph), for it has no weights. Keep it in a buffer, or build the model with its weights."
        )
    if not absent and (source is None or callable(source)):
        return Weights(here)
    if source is None:
        first = next(iter(absent))
        raise ValueError(
            f"The model has no weights: {first} (and {len(absent) - 1} more) are on the meta device. "
            "Give compile(weights=...) a folder of safetensors files or a function that fills a tensor, "
            "or load weights first; graphpar.plan needs none."
        )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if callable(source):
        buffers = [name for name in absent if name not in parameters]
        here.update(made_anew(buffers))
        origins = {n: _origin(n, t, None) for n, t in absent.items() if n not in here}
        return Weights(here, origins, source)
    origins = _from_files(held, find_tensors(source), source)
    here = {name: tensor for name, tensor in here.items() if name not in origins}
    left = [name for name in absent if name not in origins]
    here.update(made_anew([name for name in left if name not in parameters]))
    left = [name for name in left if name not in here]
    if left:
        raise ValueError(
            f"{os.fspath(source)} has no {left[0]}" + (f" (and {len(left) - 1} more)" * (len(left) > 1))
            + ", and the model holds it on the meta device. A buffer that no checkpoint holds must be "
            "made with the model: build the model inside graphpar.without_weights()."
        )  # fmt: skip
    return Weights(here, origins)


def _from_files(
    held: Mapping[str, torch.Tensor],
    stored: Mapping[str, Stored],
    source: str | os.PathLike[str],
) -> dict[str, Origin]:
    """Origins of what the files hold, tied weights under any of their names."""
    names: dict[int, list[str]] = {}
    for name, tensor in held.items():
        names.setdefault(id(tensor), []).append(name)
    origins = {}
    for name, tensor in held.items():
        at = next((other for other in (name, *names[id(tensor)]) if other in stored), None)
        if at is None:
            continue
        if stored[at].shape != tuple(tensor.shape):
            raise ValueError(
                f"{at} has the shape {list(stored[at].shape)} in {os.fspath(source)}, but "
                f"{list(tensor.shape)} in the model."
            )
        origins[name] = _origin(name, tensor, stored[at])
    return origins


def _origin(name: str, tensor: torch.Tensor, stored: Stored | None) -> Origin:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Origin(name, dtype, tuple(tensor.shape), stored)


@contextmanager
def without_weights() -> Iterator[None]:
    """Build modules without memory for their parameters; buffers are real.

    Unlike under `torch.device("meta")`, buffers that no checkpoint holds (rotary angles, masks) keep
    their values. Give `graphpar.compile(weights=...)` what the parameters are.

    >>> with without_weights():
    ...     layer = nn.BatchNorm1d(3)
    >>> layer.weight.device.type, layer.running_var.tolist()
    ('meta', [1.0, 1.0, 1.0])
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
