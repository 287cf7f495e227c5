"""The errors graphpar raises, each with the exit code the command line gives it.

Every message says what happened, where, why, and what to try. `ValueError` is kept for wrong
arguments at the public face, `assert` for what cannot happen.
"""


class GraphparError(Exception):
    """The parent of all errors raised by graphpar.

    >>> issubclass(InfeasibleError, GraphparError)
    True
    """

    exit_code = 5


class CaptureError(GraphparError):
    """The model could not be captured as a graph; names the module and the source line."""

    exit_code = 4


class ClusterError(GraphparError):
    """A cluster description is wrong or does not match the machines at hand."""

    exit_code = 2


class PlanError(GraphparError):
    """A plan file is damaged, or belongs to another model or cluster."""

    exit_code = 2


class InfeasibleError(GraphparError):
    """No plan fits; says the binding limit, the need, what there is, and the nearest remedy.

    Args:
        message: The whole text shown to the user.
        limit: The name of the binding limit, such as `memory of a/0`.
        need: What the best attempt needs, in the limit's unit.
        have: What the cluster has, in the same unit.
        remedy: The smallest change that would fit.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        limit: str = "",
        need: float | None = None,
        have: float | None = None,
        remedy: str = "",
    ) -> None:
        super().__init__(message)
        self.limit = limit
        self.need = need
        self.have = have
        self.remedy = remedy


class VerifyError(GraphparError):
    """An internal rule was broken (a bug of graphpar): names the pass, the rule and the ops."""

    exit_code = 5


class RunError(GraphparError):
    """A running job failed; names the rank at the root of it.

    Args:
        message: The whole text shown to the user.
        rank: The rank that failed first, where known.
        reports: What the ranks that still answered had done of the step by then.
    """

    exit_code = 5

    def __init__(
        self, message: str, *, rank: int | None = None, reports: tuple[object, ...] = ()
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.reports = reports


class NumbersDifferError(GraphparError):
    """A parallel result differs from the one-device result by more than rounding."""

    exit_code = 6
