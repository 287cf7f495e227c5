"""Checkpoints that know no plan: model, optimiser and step of a job in a folder.

    manifest.json                    step, files, optimiser settings, other names of tied weights
    model.safetensors.index.json     which file holds which tensor of the model
    model-00000.safetensors ...      the model's tensors, one file for each rank that held some
    optimizer-00000.safetensors ...  the optimiser's tensors, named `parameter:key`

Every tensor is whole and stands once, under its name in the model, so that any plan can read it, and
plain PyTorch too. Each rank writes and reads its own part; under torchrun the folder must be one that all
machines share. A folder is written beside its place and moved there at the end: there is always a whole
checkpoint under the name, the old or the new one.
"""

import ctypes
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch

from graphpar.errors import RunError
from graphpar.runtime.pieces import joined
from graphpar.runtime.plain import Plain, plain
from graphpar.runtime.program import Slice
from graphpar.runtime.tensor_files import Stored, find_tensors, read_tensor, write_tensors

MANIFEST, INDEX = "manifest.json", "model.safetensors.index.json"
_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE, as linux/fcntl.h and linux/fs.h define them."""
FORMAT, VERSION = "graphpar-checkpoint", 1


class ParameterState(msgspec.Struct, frozen=True):
    """What an optimiser keeps of one parameter, and its settings for it.

    Attributes:
        values: State that is no tensor.
        keys: Names of the state that is; file and tensor follow from them.
        settings: Learning rate and the like.
    """

    values: dict[str, Plain]
    keys: tuple[str, ...]
    settings: dict[str, Plain]


class Part(msgspec.Struct, frozen=True):
    """What one rank wrote; `scaler` is the loss scale and its good steps, `failure` why nothing."""

    model: tuple[str, ...] = ()
    optimizer: dict[str, ParameterState] = {}
    scaler: tuple[float, int] | None = None
    failure: str = ""


class Manifest(msgspec.Struct, frozen=True):
    """The table of contents of a checkpoint.

    Attributes:
        format: Always `graphpar-checkpoint`.
        version: Of this layout.
        model: The model's class.
        step: Optimiser steps made; random streams go on from there.
        aliases: Other names of tied weights, by the name in the files.
        optimizer: For each trained parameter what the optimiser keeps.
        scaler: Loss scale of training in float16, and the good steps since it changed.
    """

    format: str
    version: int
    model: str
    step: int
    aliases: dict[str, tuple[str, ...]]
    optimizer: dict[str, ParameterState]
    scaler: tuple[float, int] | None = None


class Restored(msgspec.Struct, frozen=True):
    """What one rank is to read: its tensors, for each parameter the optimiser's state, and the step."""

    model: dict[str, Stored]
    optimizer: dict[str, ParameterState]
    tensors: dict[str, dict[str, Stored]]
    scaler: tuple[float, int] | None = None
    slices: dict[str, Slice] = {}
    state_slices: dict[str, Slice] = {}
    step: int = 0

    def optimizer_tensors(self, label: str) -> dict[str, torch.Tensor]:
        """What the optimiser kept of a parameter; of the parameter's shape is what is sliced like it."""
        return {
            key: read_tensor(
                stored, cut=self._cut(label) if stored.shape == self.model[label].shape else None
            )
            for key, stored in self.tensors[label].items()
        }

    def _cut(self, label: str) -> Slice | None:
        return self.state_slices.get(label) or self.slices.get(label)


def write_part(
    folder: str,
    rank: int,
    tensors: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    apart: Collection[str] = (),
) -> Part:
    """Write what one rank holds.

    Args:
        folder: Where to.
        rank: Names the files.
        tensors: The model's tensors by label.
        optimizer: For each parameter its state and its settings.
        apart: Labels whose tensors are not written here.
    """
    held: dict[str, torch.Tensor] = {}
    states = {}
    for label, (state, settings) in optimizer.items():
        inside = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        if label not in apart:
            held.update({f"{label}:{key}": value for key, value in inside.items()})
        values = {key: value for key, value in state.items() if key not in inside}
        states[label] = ParameterState(plain(values), tuple(inside), plain(settings))
    whole = {label: tensor for label, tensor in tensors.items() if label not in apart}
    if whole:
        write_tensors(Path(folder) / f"model-{rank:05d}.safetensors", whole)
    if held:
        write_tensors(Path(folder) / f"optimizer-{rank:05d}.safetensors", held)
    return Part(tuple(whole), states)


def restore_optimizer(
    optimizer: torch.optim.Optimizer, labels: Mapping[int, str], restored: Restored
) -> None:
    """Put state and settings into an optimiser.

    Args:
        optimizer: The rank's own.
        labels: Names of its parameters by their identity.
        restored: What to put.

    Raises:
        ValueError: Parameters of one group were trained with unlike settings.
    """
    packed = optimizer.state_dict()
    for group, own in zip(packed["param_groups"], optimizer.param_groups, strict=True):
        names = [labels[id(parameter)] for parameter in own["params"]]
        known = [restored.optimizer[name] for name in names if name in restored.optimizer]
        if any(state.settings != known[0].settings for state in known):
            raise ValueError(
                "The checkpoint's optimiser treats parameters differently that are one group here; make "
                "the same groups in Training(optimizer=...)."
            )
        for key, value in known[0].settings.items() if known else ():
            group[key] = tuple(value) if isinstance(value, list) else value
        for number, name in zip(group["params"], names, strict=True):
            if name in restored.optimizer:
                tensors = restored.optimizer_tensors(name)
                packed["state"][number] = {**restored.optimizer[name].values, **tensors}
    packed["state"] = {number: state for number, state in packed["state"].items() if state}
    optimizer.load_state_dict(packed)


def free_place(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a checkpoint to be.

    Raises:
        ValueError: Something that is no checkpoint is there.
    """
    place = Path(path).absolute()
    if place.exists() and not (place / MANIFEST).is_file():
        raise ValueError(f"{place} exists and is no checkpoint; give a new folder.")
    return place


def exchanged(one: Path, other: Path) -> bool:
    """Whether two folders could be made to change places in one step: renameat2(2) of Linux."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    if exchange is None:
        return False
    done: int = exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)
    return done == 0


def swap(fresh: Path, place: Path) -> None:
    """Move a folder to its place; one that was there is removed after, not before.

    Where the system can exchange two folders at once, there is no moment without one in its place.
    """
    fresh.chmod(0o755)
    if not place.exists():
        fresh.rename(place)
        return
    if exchanged(fresh, place):
        shutil.rmtree(fresh, ignore_errors=True)
        return
    old = place.with_name(f".{place.name}-old-{os.getpid()}")
    place.rename(old)
    try:
        fresh.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


class _Writers(Protocol):
    """What saving needs of a job's workers."""

    @property
    def is_first(self) -> bool: ...

    def meet(self) -> None: ...

    def save(
        self, folder: str, labels: Sequence[Sequence[str]], apart: Sequence[Collection[str]]
    ) -> list[Part]: ...

    def kept(self, labels: Sequence[str]) -> list[dict[str, torch.Tensor]]: ...


def save_checkpoint(
    workers: _Writers,
    place: Path,
    labels: Sequence[Sequence[str]],
    rest: Mapping[str, torch.Tensor],
    slices: Sequence[Mapping[str, Slice]],
    finish: Callable[[Path, Sequence[Part]], None],
) -> None:
    """Let all ranks write beside the place, then move the folder there.

    Args:
        workers: The job's.
        place: Where the checkpoint is to be.
        labels: For each rank the tensors it writes.
        rest: Tensors that no rank holds.
        slices: For each rank the labels that it holds a slice of.
        finish: Writes the table of contents.

    Raises:
        RunError: A rank could not write; nothing has changed then.
    """
    fresh = place.with_name(f".{place.name}.new")
    failure = ""
    if workers.is_first:
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    workers.meet()
    parts = workers.save(str(fresh), labels, slices)
    failure = failure or next((part.failure for part in parts if part.failure), "")
    for number, (label, kept) in enumerate(_put_together(workers, labels, slices)):
        if workers.is_first and not failure:
            failure = _write_joined(fresh, number, label, kept)
    if workers.is_first:
        try:
            if not failure:
                own = write_part(str(fresh), len(parts), rest, {})
                finish(fresh, [*parts, own])
                swap(fresh, place)
        except OSError as error:
            failure = str(error)
        shutil.rmtree(fresh, ignore_errors=True)
    workers.meet()
    if failure:
        raise RunError(f"The checkpoint {place} could not be written: {failure}.")


def _put_together(
    workers: _Writers, labels: Sequence[Sequence[str]], slices: Sequence[Mapping[str, Slice]]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Tensors that ranks hold slices of, one after another: whole, with what the optimiser keeps."""
    held = [[la for la in own if la in cuts] for own, cuts in zip(labels, slices, strict=True)]
    for label in sorted({label for own in held for label in own}):
        answers = workers.kept([label if label in own else "" for own in held])
        pieces = [(answer, cuts[label]) for answer, cuts in zip(answers, slices, strict=True) if answer]
        whole = {}
        for key, first in pieces[0][0].items():
            like_it = first.ndim and first.shape == pieces[0][0][""].shape
            whole[key] = joined((answer[key], cut) for answer, cut in pieces) if like_it else first
        yield label, whole


def _write_joined(folder: Path, number: int, label: str, kept: Mapping[str, torch.Tensor]) -> str:
    """Write one tensor with the optimiser's; returns why it failed."""
    inside = {f"{label}:{key}": tensor for key, tensor in kept.items() if key}
    try:
        write_tensors(folder / f"model-joined-{number:05d}.safetensors", {label: kept[""]})
        if inside:
            write_tensors(folder / f"optimizer-joined-{number:05d}.safetensors", inside)
    except OSError as error:
        return str(error)
    return ""


def write_manifest(
    folder: Path,
    model: str,
    step: int,
    aliases: Mapping[str, Sequence[str]],
    parts: Sequence[Part],
) -> None:
    """The table of contents and the index, once all parts are written."""
    files = sorted(folder.glob("model-*.safetensors"))
    where = {label: file.name for file in files for label in find_tensors(file)}
    total = sum((folder / name).stat().st_size for name in set(where.values()))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    optimizer = {label: state for part in parts for label, state in part.optimizer.items()}
    names = {label: tuple(others) for label, others in aliases.items() if label in where}
    scaler = next((part.scaler for part in parts if part.scaler), None)
    manifest = Manifest(FORMAT, VERSION, model, step, names, optimizer, scaler)
    _write(folder / INDEX, json.dumps(index, indent=1).encode())
    _write(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """
    Raises:
        ValueError: The folder is no checkpoint, a damaged one, or one of a newer version.
    """
    file = Path(path) / MANIFEST
    try:
        manifest = msgspec.json.decode(file.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} is no checkpoint, or a damaged one: {error}.") from error
    if manifest.format != FORMAT or manifest.version > VERSION:
        raise ValueError(
            f"{path} is a {manifest.format} of version {manifest.version}, not a {FORMAT} of version "
            f"{VERSION}; read it with the version of graphpar that wrote it."
        )
    return manifest


def stored_model(path: str | os.PathLike[str], manifest: Manifest) -> dict[str, Stored]:
    """Where each of the model's tensors lies, under all its names."""
    found = find_tensors(Path(path) / INDEX)
    for label, others in manifest.aliases.items():
        found.update(dict.fromkeys(others, found[label]))
    return found


def stored_optimizer(path: str | os.PathLike[str], manifest: Manifest) -> dict[str, dict[str, Stored]]:
    """For each trained parameter where the optimiser's tensors lie.

    Raises:
        ValueError: One is missing.
    """
    everything: dict[str, Stored] = {}
    for file in sorted(Path(path).glob("optimizer-*.safetensors")):
        everything.update(find_tensors(file))
    try:
        return {
            label: {key: everything[f"{label}:{key}"] for key in state.keys}
            for label, state in manifest.optimizer.items()
        }
    except KeyError as error:
        raise ValueError(f"{path} is damaged: the optimiser's tensor {error} is missing.") from error


def checkpoint_state(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The model of a checkpoint as a state dict for plain PyTorch, under all names of tied weights.

    Raises:
        ValueError: The folder is no checkpoint.

    >>> import tempfile, torch, graphpar
    >>> model, batch = torch.nn.Linear(4, 2), torch.randn(6, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with graphpar.compile(model, {"devices": [{"kind": "cpu", "threads": 1}]}, (batch,)) as job:
    ...         job.save(f"{folder}/kept")
    ...     state = graphpar.checkpoint_state(f"{folder}/kept")
    >>> model.load_state_dict(state)
    <All keys matched successfully>
    """
    return {n: read_tensor(s) for n, s in stored_model(path, read_manifest(path)).items()}


def restored_for(
    held: Iterable[str],
    shapes: Mapping[str, tuple[int, ...]],
    manifest: Manifest,
    model: Mapping[str, Stored],
    optimizer: Mapping[str, Mapping[str, Stored]],
    slices: Mapping[str, Slice],
    state_slices: Mapping[str, Slice],
) -> Restored:
    """What a rank reads of a checkpoint.

    Args:
        held: Labels of the tensors it holds.
        shapes: Shapes of the model's tensors by name; other labels are no part of a checkpoint.
        manifest: The checkpoint's table of contents.
        model: Where the model's tensors lie.
        optimizer: Where the optimiser's lie.
        slices: Of which of them it holds a slice.
        state_slices: Of which of them it steps a slice, though it holds them whole.

    Raises:
        ValueError: A tensor is missing or has another shape; names it.
    """
    wanted = [label for label in sorted(held) if label in shapes]
    for label in wanted:
        if label not in model:
            raise ValueError(f"The checkpoint has no tensor for {label}.")
        if model[label].shape != shapes[label]:
            raise ValueError(
                f"{label} has the shape {list(model[label].shape)} in the checkpoint, but "
                f"{list(shapes[label])} in the model."
            )
    known = {label: manifest.optimizer[label] for label in wanted if label in manifest.optimizer}
    return Restored(
        {label: model[label] for label in wanted},
        known,
        {label: dict(optimizer[label]) for label in known},
        manifest.scaler,
        {label: slices[label] for label in wanted if label in slices},
        {label: state_slices[label] for label in wanted if label in state_slices},
        manifest.step,
    )
