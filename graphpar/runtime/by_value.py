"""Python objects as bytes for workers: what a script defines goes along by value."""

import io
import marshal
from types import CodeType
from typing import Any

import cloudpickle


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            # cloudpickle from 3.1.3 on forgets files' names, and errors would not say where they arose.
            return marshal.loads, (marshal.dumps(obj),)
        return super().reducer_override(obj)


def dumps(value: object) -> bytes:
    """What `cloudpickle.loads` reads, in the same version of Python.

    >>> cloudpickle.loads(dumps(lambda x: x + 1))(2)
    3
    """
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()
