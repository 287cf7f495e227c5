"""Training steps on this machine's first GPU, predicted and measured: `benchmarks/gpu_steps.py --json`.

Every model trains with AdamW on one device: eager PyTorch (under autocast in bfloat16), then a job. The
job's step is predicted twice, with the model's units timed on the device and by the catalogue's curves
alone. All times are medians of steps after the first. The peak of memory is what the worker reported.
Eager steps under float8 are those of bfloat16. Without a GPU the processor takes its place.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn

import graphpar
from graphpar.cluster import Cluster
from graphpar.cluster_build import cuda_devices

STEPS = 5


@dataclass(frozen=True)
class Case:
    """A GPT-2 of some size, its batch, and the format it computes in."""

    name: str
    layers: int
    width: int
    batch: int
    length: int
    precision: str
    dropout: float = 0.0
    vocabulary: int = 50257

    def model(self) -> nn.Module:
        """The model, with heads of 64."""
        import transformers  # an optional extra

        config = transformers.GPT2Config(
            n_layer=self.layers, n_embd=self.width, n_head=max(self.width // 64, 1),
            vocab_size=self.vocabulary, n_positions=1024, bos_token_id=0, eos_token_id=0,
            resid_pdrop=self.dropout, embd_pdrop=self.dropout, attn_pdrop=self.dropout, use_cache=False,
        )  # fmt: skip
        made: nn.Module = transformers.GPT2LMHeadModel(config)
        return made

    def inputs(self) -> dict[str, torch.Tensor]:
        """Words that are their own labels."""
        ids = torch.randint(0, self.vocabulary, (self.batch, self.length))
        return {"input_ids": ids, "labels": ids}


CASES = (
    Case("GPT-2 124M", 12, 768, 8, 512, "float32"),
    Case("GPT-2 124M", 12, 768, 8, 512, "bfloat16"),
    Case("GPT-2 350M", 24, 1024, 8, 1024, "bfloat16"),
    Case("GPT-2 350M", 24, 1024, 8, 1024, "float8_e4m3fn"),
    Case("GPT-2 124M, dropout", 12, 768, 8, 512, "bfloat16", dropout=0.1),
    Case("4 layers of 512", 4, 512, 8, 128, "float32", vocabulary=2000),
)


@dataclass(frozen=True)
class Row:
    """One case: seconds of a step, bytes at the peak."""

    name: str
    precision: str
    eager_s: float
    measured_s: float
    predicted_s: float
    by_curves_s: float
    measured_bytes: int
    predicted_bytes: float


def measure(case: Case, cluster: Cluster) -> Row:
    """Eager steps, both plans, the job's steps."""
    torch.manual_seed(0)
    model, kwargs = case.model(), case.inputs()
    training = graphpar.Training(optimizer=partial(torch.optim.AdamW, lr=1e-4))
    wish: dict[str, Any] = {"kwargs": kwargs, "train": training, "precision": case.precision}
    by_curves = graphpar.plan(model, cluster, measure_s=0, **wish)
    eager_s = eager(model, kwargs, case.precision)
    with graphpar.compile(model, cluster, **wish) as job:
        measured_s = timed(lambda: job.step(**kwargs))
        last, plan = job.last_step, job.plan
    return Row(
        case.name, case.precision, eager_s, measured_s, plan.predicted_step_s, by_curves.predicted_step_s,
        last.reports[0].peak_bytes if last else 0, plan.predicted_peak_bytes[plan.devices[0]],
    )  # fmt: skip


def eager(model: nn.Module, kwargs: dict[str, torch.Tensor], precision: str) -> float:
    """Seconds of a step of plain PyTorch; the model's own weights stay as they are."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    there = {name: tensor.to(device) for name, tensor in kwargs.items()}

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision != "float32"):
            loss = model(**there).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = timed(step)
    model.to("cpu").load_state_dict(state)
    if device == "cuda":
        torch.cuda.empty_cache()
    return seconds


def timed(step: Callable[[], object]) -> float:
    """Median seconds of steps after the first."""
    step()
    times = []
    for _ in range(STEPS):
        began_s = time.perf_counter()
        step()
        times.append(time.perf_counter() - began_s)
    return median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--only", default="", help="cases whose name and format hold this")
    arguments = parser.parse_args()
    devices = cuda_devices()[:1] or [{"kind": "cpu", "threads": 1}]
    cluster = Cluster.from_dict({"devices": devices})
    rows = []
    for case in CASES:
        if arguments.only in f"{case.name} {case.precision}":
            rows.append(measure(case, cluster))
            # A line as soon as it is known: the next case may take a minute.
            print(line(rows[-1]), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        made = {"device": cluster.devices[0].kind, "torch": torch.__version__}
        print(json.dumps({**made, "rows": [asdict(row) for row in rows]}))


def line(row: Row) -> str:
    """A row for people."""
    error, curves = (100 * (s / row.measured_s - 1) for s in (row.predicted_s, row.by_curves_s))
    return (
        f"{row.name:22}{row.precision:14} eager {1e3 * row.eager_s:8.1f} ms  job "
        f"{1e3 * row.measured_s:8.1f} ms  predicted {1e3 * row.predicted_s:8.1f} ms ({error:+.1f} %)"
        f"  by curves {1e3 * row.by_curves_s:8.1f} ms ({curves:+.1f} %)  peak "
        f"{row.measured_bytes / 1e9:.2f} GB, predicted {row.predicted_bytes / 1e9:.2f} GB"
    )


if __name__ == "__main__":
    main()
