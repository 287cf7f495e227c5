"""Operators that are not torch's own: a worker must import or define them before it can call them.

An operator made with `torch.library.custom_op` in a module is there once the module is imported. One
made in the user's script or notebook belongs to no module that could be imported elsewhere, so that
its functions travel; so do those of a custom `autograd.Function`. Operators of a compiled extension
are looked for in a module named like their namespace (`torchvision.nms` in `torchvision`).
"""

import warnings
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

import cloudpickle
import torch

from graphpar.errors import CaptureError, RunError
from graphpar.frontend.functions import NAMESPACES, FunctionCall
from graphpar.frontend.torch_private import OpDefinition, define_op, op_definition
from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES
from graphpar.runtime import by_value

_OWN = frozenset({"aten", "prims", "gp"})


def foreign_targets(graph: Graph, stage: int) -> list[str]:
    """Targets of a stage's ops that are neither torch's nor graphpar's own."""
    targets = {op.target for op in graph.ops if op.attr("stage") == stage and op.target not in SOURCES}
    return sorted(t for t in targets if "." in t and t.partition(".")[0] not in _OWN)


def refuse_without_derivative(graph: Graph) -> None:
    """
    Raises:
        CaptureError: A gradient flows through an operator or a Function that has none; names the line.
    """
    for op in graph.ops:
        if not op.attr("grad") or op.target.partition(".")[0] in _OWN or "." not in op.target:
            continue
        definition = op_definition(op.target)
        if definition is None or _has_derivative(definition):
            continue
        kind, remedy = "operator", "register_autograd"
        if op.target.partition(".")[0] in NAMESPACES:
            kind, remedy = "autograd.Function", "a backward"
        raise CaptureError(
            f"Module {op.module or '(top)'!r} at {op.source} calls the {kind} {op.target}, which has no "
            f"derivative, where a gradient flows. Give it {remedy}, or call it on a detached tensor."
        )


def _has_derivative(definition: OpDefinition) -> bool:
    call = getattr(definition.backward, "__self__", None)
    if not isinstance(call, FunctionCall):
        return definition.backward is not None
    plain = torch.autograd.Function
    return call.function.backward is not plain.backward or call.function.vjp is not plain.vjp


def needed_code(targets: Iterable[str]) -> tuple[tuple[str, ...], bytes]:
    """Modules to import, and pickled definitions of operators that no module has.

    Raises:
        ValueError: An operator of the user's script cannot be sent to workers.
    """
    modules: set[str] = set()
    loose: list[OpDefinition] = []
    for target in targets:
        definition = op_definition(target)
        if definition is None:
            namespace = target.partition(".")[0]
            modules.update([namespace] if find_spec(namespace) is not None else [])
        elif definition.function.__module__ == "__main__" or target.partition(".")[0] in NAMESPACES:
            loose.append(definition)
        else:
            modules.add(definition.function.__module__)
    return tuple(sorted(modules)), _pickle(loose) if loose else b""


def _pickle(definitions: list[OpDefinition]) -> bytes:
    try:
        return by_value.dumps(definitions)
    except Exception as error:
        names = ", ".join(d.name for d in definitions)
        raise ValueError(
            f"The operators {names} of the script cannot be sent to workers: {error}. Define them in a "
            "module of their own and import it."
        ) from error


def load_code(imports: Iterable[str], pickled: bytes) -> None:
    """Make operators known to this process.

    Raises:
        RunError: A module cannot be imported here.
    """
    for module in imports:
        try:
            import_module(module)
        except ImportError as error:
            raise RunError(
                f"The model calls operators that module {module!r} defines, but this worker cannot "
                f"import it: {error}. Install it here, or put its folder on PYTHONPATH."
            ) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own trees unpickle by a deprecated class
        definitions = cloudpickle.loads(pickled) if pickled else ()
    for definition in definitions:
        define_op(definition)
