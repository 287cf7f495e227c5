"""Importing without the collector leaves it as it was, and nothing uncollectable behind."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from graphpar.loading import uncollected


class Knot:
    """Refers to itself, so that only the collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def nothing_is_frozen() -> Iterator[None]:
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    yield
    if frozen:
        gc.freeze()


@pytest.mark.usefixtures("nothing_is_frozen")
def test_what_became_garbage_meanwhile_is_found_later() -> None:
    with uncollected():
        assert not gc.isenabled()
        knot = weakref.ref(Knot())
        with uncollected():
            pass
        assert not gc.isenabled() and knot() is not None
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert knot() is None


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.usefixtures("nothing_is_frozen")
def test_what_somebody_froze_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    with uncollected():
        pass
    assert 0 < frozen <= gc.get_freeze_count() + 100
    gc.unfreeze()


@pytest.mark.usefixtures("nothing_is_frozen")
def test_of_many_new_objects_none_is_looked_at_again_and_again() -> None:
    gc.collect()
    with uncollected():
        kept = [[i] for i in range(500_000)]
    young = [*gc.get_objects(generation=0), *gc.get_objects(generation=1)]
    assert len(young) < len(kept) // 10
