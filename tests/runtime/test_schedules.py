"""Every schedule computes what one device computes."""

import pytest
from helpers import Line, check_training
from test_equality import Language, sentences

from graphpar.partition.types import ScheduleName


@pytest.mark.parametrize(
    ("schedule", "lines"),
    [
        pytest.param("zero-bubble", (Line((1, 1, 1), 4),), id="zero-bubble"),
        pytest.param("zero-bubble", (Line((1, (3, 1)), 4),), id="zero-bubble, replicas 3:1"),
        pytest.param("interleaved", (Line((1, 1), 4, chunks=2),), id="interleaved"),
        pytest.param(
            "zero-bubble", (Line((1, 1), 2, 5, chunks=2), Line((1,), 2, 3)), id="both, two pipelines"
        ),
    ],
)
def test_schedules_give_the_numbers_of_one_device(
    schedule: ScheduleName, lines: tuple[Line, ...]
) -> None:
    check_training(Language(drop=0.1), sentences(), lines=lines, schedule=schedule)
