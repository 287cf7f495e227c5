"""A small configuration found by trying, for architectures whose fields no rule understands.

Starting from the default configuration, numbers are made smaller as long as the model can still be built
and run: first the layers, then all sizes, then all numbers that are equal (equal numbers are mostly the
same size, wherever they stand), then single ones. On the meta device a trial costs some hundredths of a
second whatever the size of the model.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tiny_configs import rebuilt
from tiny_defaults import default_config, parts_of, read
from tiny_fields import number_kind
from tiny_scale import MAX_POSITIONS, VOCABULARY

Place = tuple[str, ...]
"""The fields that lead to a number in a configuration."""
SMALL = 2_000_000
"""With so many parameters and numbers in its inputs a model is small enough."""
_SMALLEST = {
    "vocabulary": VOCABULARY,
    "positions": MAX_POSITIONS,
    "picture": 64,
    "experts": 8,
    "queries": 16,
}
_LEAST_WIDTH = 8


@dataclass
class Search:
    """One search.

    Attributes:
        config_class: Whose configuration is wanted.
        size_of: How large the model and the inputs are that a configuration makes; None where it does not
            run.
        seconds: Processor time that it may take.
    """

    config_class: Any
    size_of: Callable[[Any], int | None]
    seconds: float = 60.0
    _chosen: dict[Place, int] = field(default_factory=dict)
    _size: int = 0
    _best: Any = None

    def run(self) -> Any:
        """The smallest configuration found; None where not even the default one runs."""
        until = time.process_time() + self.seconds
        numbers = dict(_numbers(default_config(self.config_class)))
        layers = {p: v for p, v in numbers.items() if _kind(p) == "layers"}
        for few in (2, 4, max(layers.values(), default=0)):
            if self._accepts({p: min(v, few) for p, v in layers.items()}):
                break
        if self._best is None:
            return None
        for changes in self._moves(numbers):
            if self._size <= SMALL or time.process_time() > until:
                break
            if any(self._chosen.get(p, numbers[p]) > v for p, v in changes.items()):
                self._accepts({**self._chosen, **changes})
        return self._best

    def _accepts(self, changes: dict[Place, int]) -> bool:
        try:
            config = rebuilt(default_config(self.config_class), changes)
            size = self.size_of(config)
        except Exception:  # whatever a configuration class says about numbers that do not fit
            return False
        if size is None or (self._best is not None and size >= self._size):
            return False
        self._best, self._chosen, self._size = config, changes, size
        return True

    def _moves(self, numbers: Mapping[Place, int]) -> Iterator[dict[Place, int]]:
        """Changes to try, those that change most first."""
        small = {p: least for p, v in numbers.items() if (least := _SMALLEST.get(_kind(p), v)) < v}
        widths = {p: v for p, v in numbers.items() if _kind(p) == "width"}
        yield small
        for by in (8, 4, 2):
            yield _divided(widths, by)
        yield from ({place: value} for place, value in small.items())
        for value in sorted(set(widths.values()), reverse=True):
            equal = {p: v for p, v in widths.items() if v == value}
            yield from (_divided(equal, by) for by in (8, 4, 2))
        for place, value in widths.items():
            yield from (_divided({place: value}, by) for by in (8, 4, 2))


def _kind(place: Place) -> str:
    return number_kind(place[-2] if place[-1].isdigit() else place[-1])


def _divided(widths: Mapping[Place, int], by: int) -> dict[Place, int]:
    return {p: v // by for p, v in widths.items() if v % by == 0 and v // by >= _LEAST_WIDTH}


def _numbers(config: Any) -> Iterator[tuple[Place, int]]:
    for path, part in parts_of(config):
        for spec in dataclasses.fields(part):
            value = read(part, spec.name)
            if type(value) is int and value > 1:
                yield (*path, spec.name), value
            elif isinstance(value, (list, tuple)) and all(type(v) is int for v in value):
                yield from (((*path, spec.name, str(i)), v) for i, v in enumerate(value) if v > 1)
