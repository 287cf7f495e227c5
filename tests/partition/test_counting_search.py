"""Where the search over counting programmes looks for better pipelines."""

import numpy as np
import pytest

from graphpar.partition import counting_search
from graphpar.partition.chain import ChainAnswer
from graphpar.partition.search import Asked, Found, Task
from graphpar.partition.unit_arrays import Setting


def test_better_pipelines_are_sought_between_a_failure_and_the_best(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At other places each time, from the first again after a better pipeline, until all were tried."""
    tried: list[float] = []
    counted_search = counting_search._CountedSearch
    monkeypatch.setattr(counted_search, "_program", lambda *_: None)
    monkeypatch.setattr(counted_search, "_try", lambda *args, widely: tried.append(args[3]))

    def found(setting: Setting, extra_s: float) -> Found:
        return Found(setting, ChainAnswer(1.0, extra_s, 0.0, 0.0, ()))

    own, other = Setting(8, 4, "1f1b"), Setting(8, 2, "1f1b")
    tasks = [Task(s, 2.0, 1.0, 1.0, 0.0, lambda: pytest.fail("built")) for s in (other, own)]
    seeking = counted_search(tasks, Asked(np.inf, 0.1, np.inf), lambda _: None)
    seeking._seek(1.0, 0.5)
    assert tried == []
    # Whatever has 9 seconds or more with the least fill of a task does not beat the best by the gap.
    seeking.best, seeking._cutoff = found(own, 9.0), 10.0
    seeking._seek(4.0, 0.5)
    assert tried == [6.0]
    seeking._seek(8.0, 0.5)
    assert tried == [6.0]
    tried.clear()
    for _ in range(20):
        seeking._seek_again(4.0)
    assert len(tried) == len(set(tried)) > 5
    assert all(4.0 < extra_s < 8.0 for extra_s in tried)
    first = tried[0]
    seeking.best = found(own, 8.5)
    seeking._seek_again(4.0)
    assert tried[-1] == first
    seeking.best = found(Setting(8, 8, "1f1b"), 8.5)
    tried.clear()
    seeking._seek_again(4.0)
    assert tried == []
