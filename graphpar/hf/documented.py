"""What the documentation of a transformers model's forward says about its inputs: shapes and kinds.

transformers documents every input in one form, also those that its signature marks as optional only so
that they can be passed by keyword:
``states (`torch.Tensor` of shape `(batch_size, length, state_dim)`)``.
"""

import inspect
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Kind = Literal["float", "int", "bool"]
_ENTRY = re.compile(
    r"^\s*(?P<name>\w+) \(`?(?P<type>[^`]*?Tensor[^`]*)`? of shape\s+`*[\(\[](?P<shape>[^`]*?)[\)\]]"
    r"(?P<others>(?:\s+or \([^`()]*\))*)`*(?P<rest>[^\n]*)",
    re.MULTILINE,
)
_TOP = re.compile(r"range[^\[]*\[0,\s*(?:config\.)?(?P<bound>\w+)\s*(?P<less>- ?1)?\s*[\]\)]")


@dataclass(frozen=True)
class DocumentedInput:
    """One input as documented.

    Attributes:
        name: Its parameter.
        shape: What each dimension is called, or its number.
        kind: What its elements are.
        is_optional: Whether the model does without it.
        bound: What its values stay below: a number, or the name of a field of the configuration.
    """

    name: str
    shape: tuple[str, ...]
    kind: Kind
    is_optional: bool
    bound: str


def handed_on(model: nn.Module, name: str) -> bool:
    """Whether a model hands a keyword argument that its signature does not name on to a part that does.

    >>> class Part(nn.Module):
    ...     def forward(self, x, t_cond=None): ...
    >>> class Whole(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.part = Part()
    ...
    ...     def forward(self, x, **kwargs): ...
    >>> handed_on(Whole(), "t_cond"), handed_on(Whole(), "other"), handed_on(Part(), "t_cond")
    (True, False, False)
    """
    taken = inspect.signature(model.forward).parameters
    if name in taken or all(p.kind is not p.VAR_KEYWORD for p in taken.values()):
        return False
    return any(name in inspect.signature(part.forward).parameters for part in model.modules())


def documented_inputs(forward: Callable[..., Any]) -> Mapping[str, DocumentedInput]:
    """The tensors among the parameters of a forward that its docstring gives a shape for, by name.

    >>> def forward(self, states=None, mask=None):
    ...     '''Args:
    ...         states (`torch.FloatTensor` of shape `(batch_size, 7, state_dim)`):
    ...             The states.
    ...         mask (`torch.BoolTensor` of shape `(batch_size,)`, *optional*):
    ...             Which count.'''
    >>> for made in documented_inputs(forward).values():
    ...     print(made.name, made.shape, made.kind, made.is_optional)
    states ('batch_size', '7', 'state_dim') float False
    mask ('batch_size',) bool True
    """
    text = (inspect.getdoc(forward) or "").partition("\nReturns:")[0]
    accepted = inspect.signature(forward).parameters
    found: dict[str, DocumentedInput] = {}
    entries = list(_ENTRY.finditer(text))
    for entry, after in itertools.zip_longest(entries, entries[1:]):
        name = entry["name"]
        if name not in accepted or name in found:
            continue
        about = text[entry.end() : after.start() if after else len(text)]
        bound = _TOP.search(about)
        found[name] = DocumentedInput(
            name=name,
            shape=_fullest([entry["shape"], *re.findall(r"\(([^()]*)\)", entry["others"])]),
            kind=_kind(name, entry["type"]),
            is_optional="optional" in entry["rest"],
            bound=bound["bound"] if bound else "",
        )
    return found


def _fullest(shapes: Sequence[str]) -> tuple[str, ...]:
    """Of the shapes that are documented as alternatives the one with most dimensions.

    >>> _fullest(["batch_size * codebooks, length", "batch_size, length, codebooks"])
    ('batch_size', 'length', 'codebooks')
    """
    split = [tuple(part.strip() for part in shape.split(",") if part.strip()) for shape in shapes]
    return max(split, key=len)


def _kind(name: str, described: str) -> Kind:
    if "Bool" in described:
        return "bool"
    if "Long" in described or "Int" in described:
        return "int"
    if "Float" not in described and re.search(r"(ids?|labels?|mask|index|positions)$", name):
        return "int"
    return "float"
