"""The operator that checks, at every step, that a value is what the graph was captured for."""

import torch

from graphpar.errors import RunError

EXPECTED = "graphpar.expected.default"


@torch.library.custom_op("graphpar::expected", mutates_args=())
def expected(given: torch.Tensor, value: float, place: str) -> torch.Tensor:
    """Zero.

    Args:
        given: One number or truth value.
        value: What it must be.
        place: The line of the model that branches on it or computes with it.

    Raises:
        RunError: It is another one.
    """
    now = float(given.item())
    same = now == value or abs(now - value) <= 1e-5 * abs(value) or (now != now and value != value)
    if not same:
        was, is_now = (bool(value), bool(now)) if given.dtype == torch.bool else (value, now)
        raise RunError(
            f"The model branches on values at {place}: it was captured for {was}, as in the example "
            f"batch, but with this batch the value is {is_now}. Compile again with this batch as the "
            "example, or replace the branch by torch.where."
        )
    return torch.zeros((), device=given.device)


@expected.register_fake
def _(given: torch.Tensor, value: float, place: str) -> torch.Tensor:
    return torch.zeros((), device=given.device)
