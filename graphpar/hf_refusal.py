"""What a model of transformers names when it refuses its inputs or its configuration.

Few refusals say in words what is missing (``'NoneType' object has no attribute 'shape'``), but the line
that raised them does, and the calls that led to it tell what its names were called further out.
"""

import linecache
import re
import traceback

_WORD = re.compile(r"[A-Za-z_]\w*")
_PASSED = re.compile(r"\b([A-Za-z_]\w*)\s*=\s*(?:self\.)?(?:\w+\.)*([A-Za-z_]\w*)")
_LIBRARY = re.compile(r"[/\\]transformers[/\\]models[/\\]")


def words_of(error: BaseException) -> list[str]:
    """Names in the text of an error, in order.

    >>> words_of(ValueError("You have to specify `pixel_values`"))
    ['You', 'have', 'to', 'specify', 'pixel_values']
    """
    return _WORD.findall(str(error))


def failing_source(error: BaseException) -> list[str]:
    """The expressions of model code in which an error arose, innermost first."""
    found = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.lineno is None or not _LIBRARY.search(frame.filename):
            continue
        lines = range(frame.lineno, (frame.end_lineno or frame.lineno) + 1)
        found.append("".join(linecache.getline(frame.filename, n) for n in lines))
    return found


def blamed_names(error: BaseException) -> list[str]:
    """Names in the expression that raised, and what the calls around it pass as these, innermost first.

    >>> blamed_names(ValueError("raised by no model"))
    []
    """
    names: list[str] = []
    for number, source in enumerate(failing_source(error)):
        if number == 0:
            names += _WORD.findall(source)
        else:
            names += [given for name, given in _PASSED.findall(source) if name in names]
    return list(dict.fromkeys(names))
