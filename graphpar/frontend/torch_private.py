"""Every use of torch that is not public API, in one place; `tests/test_torch_private.py` watches it.

`torch.utils._pytree` is what torch.export itself uses to flatten arguments; there is no public name
for it that also knows registered classes such as transformers' `ModelOutput`.
"""

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

TreeSpec = pytree.TreeSpec


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves of nested tuples, lists, dicts and registered classes, and how to put them back."""
    return pytree.tree_flatten(tree)


def unflatten(leaves: list[Any], spec: TreeSpec) -> Any:
    """The inverse of `flatten`."""
    return pytree.tree_unflatten(leaves, spec)


def output_spec(program: ExportedProgram) -> TreeSpec:
    """How the flat results of an exported program become the user's output structure."""
    spec: TreeSpec = program.call_spec.out_spec
    return spec


def lookup_op(target: str) -> Any:
    """The torch operator with a name such as `aten.linear.default`.

    Raises:
        AttributeError: torch has no such operator.
    """
    namespace, _, rest = target.partition(".")
    packet, _, overload = rest.rpartition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


def op_name(function: Any) -> str | None:
    """The name of a torch operator overload, None for anything else."""
    return str(function) if isinstance(function, torch._ops.OpOverload) else None


def higher_order_name(function: Any) -> str | None:
    """The name of a higher-order operator such as `wrap_with_set_grad_enabled`."""
    if not isinstance(function, torch._ops.HigherOrderOperator):
        return None
    name: str = function.__name__
    return name


def is_pointwise(function: Any) -> bool:
    """Whether torch marks the operator as acting element by element."""
    return torch.Tag.pointwise in function.tags


def is_random(function: Any) -> bool:
    """Whether torch marks the operator as drawing from a random stream."""
    return torch.Tag.nondeterministic_seeded in function.tags


def mutated_arguments(function: Any) -> tuple[int, ...]:
    """Positions of the arguments an operator writes to, by its schema."""
    return tuple(
        i
        for i, argument in enumerate(function._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def views_first_argument(function: Any) -> bool:
    """Whether the result may share storage with the first argument, by schema or by tag.

    Dropout in evaluation mode returns its very argument without saying so in the schema.
    """
    if torch.Tag.maybe_aliasing_or_mutating in function.tags:
        return True
    first = function._schema.arguments[0].alias_info if function._schema.arguments else None
    return first is not None and not first.is_write
