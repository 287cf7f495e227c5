"""What a model of transformers names when it refuses its inputs or its configuration.

Few refusals say in words what is missing (``'NoneType' object has no attribute 'shape'``), but the line
that raised them does, and the calls that led to it tell what its names were called further out.
"""

import linecache
import re
import traceback
from dataclasses import dataclass

_WORD = re.compile(r"[A-Za-z_]\w*")
_PASSED = re.compile(r"\b([A-Za-z_]\w*)\s*=\s*(?:self\.)?(?:\w+\.)*([A-Za-z_]\w*)")
_LIBRARY = re.compile(r"[/\\]transformers[/\\]models[/\\]")


def words_of(error: BaseException) -> list[str]:
    """Names in the text of an error, in order.

    >>> words_of(ValueError("You have to specify `pixel_values`"))
    ['You', 'have', 'to', 'specify', 'pixel_values']
    """
    return _WORD.findall(str(error))


@dataclass(frozen=True)
class Place:
    """An expression of model code that was being evaluated when an error arose.

    Attributes:
        file: Where it stands.
        source: Its lines.
        empty: Names in it that were None.
    """

    file: str
    source: str
    empty: tuple[str, ...]


def failing_places(error: BaseException) -> list[Place]:
    """The expressions of model code in which an error arose, innermost first."""
    found = []
    frames = traceback.walk_tb(error.__traceback__)
    summaries = traceback.extract_tb(error.__traceback__)
    for (frame, _), summary in zip(frames, summaries, strict=True):
        if summary.lineno is None or not _LIBRARY.search(summary.filename):
            continue
        lines = range(summary.lineno, (summary.end_lineno or summary.lineno) + 1)
        source = "".join(linecache.getline(summary.filename, n) for n in lines)
        known = frame.f_locals
        empty = tuple(n for n in _WORD.findall(source) if n in known and known[n] is None)
        found.append(Place(summary.filename, source, empty))
    return found[::-1]


def blamed_names(error: BaseException) -> list[str]:
    """Names in the expression that raised, what calls around it pass as these, then all that were None.

    >>> blamed_names(ValueError("raised by no model"))
    []
    """
    places = failing_places(error)
    names: list[str] = []
    for number, place in enumerate(places):
        if number == 0:
            names += _WORD.findall(place.source)
        else:
            names += [given for name, given in _PASSED.findall(place.source) if name in names]
    return list(dict.fromkeys([*names, *(name for place in places for name in place.empty)]))


def blamed_fields(error: BaseException) -> list[str]:
    """Fields of the configuration that were read into what stands in the expression that raised.

    And those that stand in the calls that led there.
    """
    places = failing_places(error)
    found = [name for place in places for name in re.findall(r"config\.(\w+)", place.source)]
    for place in places[:1]:
        text = "".join(linecache.getlines(place.file))
        for name in dict.fromkeys(re.findall(r"self\.(\w+)", place.source)):
            found += re.findall(rf"self\.{name} = (?:self\.)?config\.(?:\w+\.)*(\w+)", text)
    return list(dict.fromkeys(found))
