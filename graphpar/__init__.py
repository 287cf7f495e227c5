"""graphpar: a stock PyTorch model and a cluster description in, a running parallel job out.

Public names load on first use, so that `import graphpar` stays cheap and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphpar.calibration import Calibration
    from graphpar.cluster import Cluster
    from graphpar.compiler import compile, plan
    from graphpar.local.measure import calibrate
    from graphpar.plans.plan import Plan
    from graphpar.runtime.checkpoint import checkpoint_state
    from graphpar.runtime.job import CompiledModel
    from graphpar.runtime.weights import without_weights
    from graphpar.scenarios.api import Study, what_if
    from graphpar.training import Training
    from graphpar.view.api import visualize

from graphpar.errors import (
    CaptureError,
    ClusterError,
    GraphparError,
    InfeasibleError,
    NumbersDifferError,
    PlanError,
    RunError,
    VerifyError,
)
from graphpar.loading import uncollected

__version__ = "0.2.0.dev0"

_LAZY = {
    "Calibration": "graphpar.calibration",
    "Cluster": "graphpar.cluster",
    "CompiledModel": "graphpar.runtime.job",
    "Plan": "graphpar.plans.plan",
    "Study": "graphpar.scenarios.api",
    "Training": "graphpar.training",
    "calibrate": "graphpar.local.measure",
    "checkpoint_state": "graphpar.runtime.checkpoint",
    "compile": "graphpar.compiler",
    "plan": "graphpar.compiler",
    "visualize": "graphpar.view.api",
    "what_if": "graphpar.scenarios.api",
    "without_weights": "graphpar.runtime.weights",
}

_GIVES_PLANS = frozenset({"Plan", "compile", "plan"})
"""Names after whose first use notebooks are taught to show plans."""

__all__ = [
    "Calibration",
    "CaptureError",
    "Cluster",
    "ClusterError",
    "CompiledModel",
    "GraphparError",
    "InfeasibleError",
    "NumbersDifferError",
    "Plan",
    "PlanError",
    "RunError",
    "Study",
    "Training",
    "VerifyError",
    "calibrate",
    "checkpoint_state",
    "compile",
    "plan",
    "visualize",
    "what_if",
    "without_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'graphpar' has no attribute {name!r}")
    with uncollected():
        value = getattr(import_module(_LAZY[name]), name)
        if name in _GIVES_PLANS:
            import_module("graphpar.view.notebook").attach()
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
