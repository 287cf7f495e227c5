"""From one layout of a value to another: which op of ours does it, and what it sends.

Forward and backward belong together: the gradient of a sum is a copy, that of a copy a sum, that of a
gathered whole its slice. Each op is such a pair, so that nothing is summed twice.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from graphpar.ir.shards import Layout, Split

CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


@dataclass(frozen=True)
class Conversion:
    """One way from a layout to another.

    Attributes:
        target: The op; empty where nothing is to be done.
        forward: What it sends in forward, over the value's bytes.
        backward: What it sends in backward, over the gradient's bytes.
    """

    target: str
    forward: CollectiveName | None = None
    backward: CollectiveName | None = None


_NOTHING = Conversion("")


@lru_cache(maxsize=65536)
def conversion(
    made: Layout, wanted: Layout, has_gradient: bool, is_weight: bool = False
) -> Conversion | None:
    """How a value made in one layout comes to another; None where it cannot.

    Only a weight held whole can be read by the first member alone: the others have no gradient for it
    then, and gradients of weights are summed over the members where they are parts.

    >>> conversion("partial", "whole", True)
    Conversion(target='gp.all_reduce', forward='all_reduce', backward=None)
    >>> conversion("whole", "copied", True)
    Conversion(target='gp.copy_to_group', forward=None, backward='all_reduce')
    >>> conversion("copied", "whole", True) is None
    True
    """
    if wanted == "first" and made == "whole":
        return _NOTHING if is_weight or not has_gradient else None
    found = _conversion(made, wanted, has_gradient)
    if found is None or has_gradient or found.backward is None:
        return found
    return Conversion(found.target, found.forward)


def _conversion(made: Layout, wanted: Layout, has_gradient: bool) -> Conversion | None:
    if not has_gradient:
        made = "whole" if made == "copied" else made
        wanted = "whole" if wanted == "copied" else wanted
    if made == wanted:
        return _NOTHING
    if isinstance(made, Split):
        return _from_split(wanted)
    if isinstance(wanted, Split):
        return {
            "whole": Conversion("gp.take_shard", None, "all_gather"),
            "copied": Conversion("gp.take_part"),
            "partial": Conversion("gp.reduce_scatter", "reduce_scatter", "all_gather"),
            "disjoint": Conversion("gp.reduce_scatter", "reduce_scatter", "all_gather"),
        }[made]
    return _PLAIN.get((made, wanted))


def _from_split(wanted: Layout) -> Conversion | None:
    if isinstance(wanted, Split):
        return Conversion("gp.all_to_all", "all_to_all", "all_to_all")
    if wanted == "whole":
        return Conversion("gp.all_gather", "all_gather")
    if wanted == "copied":
        return Conversion("gp.gather_copies", "all_gather", "reduce_scatter")
    return None


_PLAIN: dict[tuple[str, str], Conversion] = {
    ("whole", "copied"): Conversion("gp.copy_to_group", None, "all_reduce"),
    ("partial", "whole"): Conversion("gp.all_reduce", "all_reduce"),
    ("disjoint", "whole"): Conversion("gp.all_reduce", "all_reduce"),
    ("partial", "copied"): Conversion("gp.reduce_copies", "all_reduce", "all_reduce"),
    ("disjoint", "copied"): Conversion("gp.reduce_copies", "all_reduce", "all_reduce"),
    ("disjoint", "partial"): _NOTHING,
    ("copied", "first"): _NOTHING,
}

COLLECTIVES: dict[str, tuple[CollectiveName | None, CollectiveName | None]] = {
    "gp.copy_to_group": (None, "all_reduce"),
    "gp.all_reduce": ("all_reduce", None),
    "gp.reduce_copies": ("all_reduce", "all_reduce"),
    "gp.take_shard": (None, "all_gather"),
    "gp.all_gather": ("all_gather", None),
    "gp.gather_copies": ("all_gather", "reduce_scatter"),
    "gp.reduce_scatter": ("reduce_scatter", "all_gather"),
    "gp.all_to_all": ("all_to_all", "all_to_all"),
}
"""What each op of a group sends in forward and, where a gradient flows, in backward."""
