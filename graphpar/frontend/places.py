"""Where in the user's code a node of an exported graph comes from."""

import re

from torch import fx

from graphpar.errors import CaptureError
from graphpar.frontend.export import MODEL_PREFIX
from graphpar.frontend.frames import is_users

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def strip_prefix(name: str) -> str:
    """The user's name of something inside `Traced`."""
    return name.removeprefix(MODEL_PREFIX)


def unsupported(node: fx.Node, what: str) -> CaptureError:
    """An error that names the user's module and line."""
    module, source = place(node)
    return CaptureError(
        f"Module {module or '(top)'!r} at {source or 'an unknown line'} cannot be captured: {what}."
    )


def place(node: fx.Node) -> tuple[str, str]:
    """Module path and source line of the user's code that made a node."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0]
    path = re.sub(r"^L__self__\.?", "", path)
    path = "" if path == MODEL_PREFIX[:-1] else strip_prefix(path)
    return re.sub(r"@\d+$", "", path), _source_line(node.meta.get("stack_trace") or "")


def _source_line(trace: str) -> str:
    for filename, line in reversed(_FRAME.findall(trace)):
        if is_users(filename):
            return f"{filename.rpartition('/')[2]}:{line}"
    return ""
