"""Draws architectures at random that the harness has not seen.

    python benchmarks/coverage_draw.py --seed 3 --count 24

Drawn from the model types of transformers that are no part of another's configuration, and that stand
neither in `coverage_lists.json` nor in a run or a draw of a smaller seed in `coverage_runs/`; draws are
written down there (`draws.json`), for several model types can share the class that a row is named after.
A draw that is written down is printed as it was: what was run since changed what there is to draw from.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

from graphpar.hf.architectures import find_architecture, model_types, transformers_library

HERE = Path(__file__).parent
RUNS = HERE / "coverage_runs"


def unseen(seen: frozenset[str]) -> list[str]:
    """Model types that are no part of another and not among those seen, in alphabetical order."""
    library = transformers_library()
    parts = {
        getattr(kind, "model_type", "")
        for model_type in model_types()
        for kind in getattr(library.CONFIG_MAPPING[model_type], "sub_configs", {}).values()
        if kind.__name__ != "AutoConfig" and kind.model_type != model_type
    }
    return sorted(set(model_types()) - parts - seen)


def seen_before(seed: int) -> frozenset[str]:
    """Model types of the lists, and of runs and draws of smaller seeds."""
    earlier = {name for key, names in _drawn().items() if int(key) < seed for name in names}
    return frozenset(earlier | {find_architecture(name).model_type for name in _names(seed)})


def draw(seed: int, count: int) -> list[str]:
    """So many model types that were not seen before; those written down where the seed was drawn from."""
    if (known := _drawn().get(str(seed))) is not None:
        return known[:count]
    left = unseen(seen_before(seed))
    random.Random(seed).shuffle(left)
    return left[:count]


def _drawn() -> dict[str, list[str]]:
    found: dict[str, list[str]] = json.loads((RUNS / "draws.json").read_text(encoding="utf-8"))
    return found


def _names(seed: int) -> Iterator[str]:
    for groups in json.loads((HERE / "coverage_lists.json").read_text(encoding="utf-8")).values():
        for names in groups.values():
            yield from names
    for run in sorted(RUNS.glob("*seed-*.json")):
        if int(run.stem.rpartition("-")[2]) < seed:
            yield from (row["name"] for row in json.loads(run.read_text(encoding="utf-8"))["rows"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=24)
    options = parser.parse_args()
    print(*draw(options.seed, options.count))
