"""Python objects as bytes for workers: what a script defines goes along by value."""

import io
from collections.abc import Callable
from types import CodeType
from typing import Any

import cloudpickle


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            make, arguments = self.dispatch_table[CodeType](obj)
            return _named, (obj.co_filename, make, arguments)
        return super().reducer_override(obj)


def _named(filename: str, make: Callable[..., CodeType], arguments: tuple[Any, ...]) -> CodeType:
    """The code under its file's name.

    cloudpickle from 3.1.3 on leaves that out, and errors would not say where they arose.
    """
    return make(*arguments).replace(co_filename=filename)


def dumps(value: object) -> bytes:
    """What `cloudpickle.loads` reads, in the same version of Python.

    >>> cloudpickle.loads(dumps(lambda x: x + 1))(2)
    3
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()
