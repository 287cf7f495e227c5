"""Where the user wrote the op in which a stage's module failed."""

import linecache
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from graphpar.ir.ops import Op


def with_places(made: fx.GraphModule, ops: Sequence[Op], env: Mapping[str, Any]) -> fx.GraphModule:
    """The module, with the user's line for each of its own lines."""
    made.meta["places"] = {
        node.name: f"{op.target} in module {op.module or '(top)'!r}, {op.source}"
        for op in ops
        if isinstance(node := env.get(op.name), fx.Node) and op.source
    }
    return made


def place_of_failure(error: BaseException) -> str:
    """The op of a stage's module that raised an error; empty where none did."""
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        module = frame.f_locals.get("self")
        if isinstance(module, fx.GraphModule) and frame.f_code.co_name == "forward":
            line = linecache.getline(frame.f_code.co_filename, number, frame.f_globals)
            return str(module.meta.get("places", {}).get(line.partition("=")[0].strip(), ""))
    return ""
