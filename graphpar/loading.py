"""Loading without the collector, which finds nothing and takes a quarter of the time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_MANY = 100_000
"""Of fewer new objects the next look is short enough."""

_INTERPRETERS = 1000
"""So few frozen objects are the interpreter's own (Python 3.12 begins with 375), which need not be."""


@contextmanager
def uncollected() -> Iterator[None]:
    """Within it nothing is collected: what modules make as they are imported stays, as problems do.

    Torch and what it loads make some 700,000 objects, which were looked through again and again.
    """
    if not gc.isenabled():
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        try:
            # Counting what is frozen looks at each, so it comes last.
            if gc.get_count()[0] >= _MANY and gc.get_freeze_count() < _INTERPRETERS:
                # Both together move all objects among the oldest; else the next look would be at each.
                gc.freeze()
                gc.unfreeze()
        finally:
            gc.enable()
