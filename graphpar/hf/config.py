"""Fields of transformers' configurations, also of those inside others."""

from collections.abc import Iterator, Mapping
from typing import Any


def first_field(config: Any, *names: str) -> Any:
    """The first of the fields that is set, in the configuration or else in one inside it."""
    for part in parts_of(config):
        for name in names:
            value = read_field(part, name)
            if value is not None:
                return value
    return None


def parts_of(config: Any) -> Iterator[Any]:
    """The configuration, then those inside it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = read_field(config, name)
        if inner is not None and not isinstance(inner, Mapping):
            yield from parts_of(inner)


def read_field(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # transformers has an error of its own for fields that differ between layers
        return None


def part_with(config: Any, name: str) -> Any:
    """The part of a configuration that has a field, the whole where none has."""
    return next((part for part in parts_of(config) if read_field(part, name) is not None), config)


def number_field(config: Any, *names: str) -> int:
    """The first of the fields that is a whole number.

    Raises:
        LookupError: None is.
    """
    value = first_field(config, *names)
    if not isinstance(value, int):
        raise LookupError(names)
    return value
