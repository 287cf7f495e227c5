"""Trains a small model and writes what it saw; run under plain python and under torchrun.

Usage: torchrun_script.py FOLDER CLUSTER_JSON [unlike | misfits | planned | lingers]

`planned` takes the plan that lies in the folder; with `lingers` the process goes on and on afterwards.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn

import graphpar


class Net(nn.Module):
    """An odd one: dropout, a tie, and a parameter that training never reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight
        self.unread = nn.Parameter(torch.randn(3))

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss."""
        h = self.embed(ids)
        h = h + self.down(self.drop(self.up(h).relu()))
        loss: torch.Tensor = nn.functional.cross_entropy(self.head(h).flatten(0, 1), labels.flatten())
        return loss


def main() -> None:
    folder, cluster, mode = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    rank = int(os.environ.get("RANK", "0"))
    torch.manual_seed(0)
    ids, labels = torch.randint(0, 20, (8, 5)), torch.randint(0, 20, (8, 5))
    labels[:3] = -100
    torch.manual_seed(rank if "unlike" in mode else 0)
    training = graphpar.Training(
        optimizer=lambda p: torch.optim.AdamW(p, lr=0.01), max_grad_norm=1.0, microbatches=4
    )
    seen: dict[str, object] = {}

    def train(model: nn.Module, cluster: dict[str, object]) -> None:
        plan = graphpar.Plan.load(folder / "plan.json") if "planned" in mode else None
        with graphpar.compile(model, cluster, (ids, labels), train=training, plan=plan) as job:
            seen["losses"] = [float(job.step(ids, labels)) for _ in range(3)]
            job.save(folder / "checkpoint")
            last = job.step(ids, labels)
            job.load(folder / "checkpoint")
            seen["again"] = float(job.step(ids, labels)) - float(last)
            job.load(folder / "checkpoint")
            seen["inference"] = float(job(ids, labels))
            seen["sums"] = {name: float(t.sum()) for name, t in job.state_dict().items()}

    runs = [(Net(16), cluster)]
    if "misfits" in mode:
        many = {"devices": [{"kind": "cpu", "count": 7}]}
        runs = [(Net(16), many), (Net(16 + 16 * rank), cluster)]
    errors = []
    for model, where in runs:
        try:
            train(model, where)
        except graphpar.GraphparError as error:
            errors.append([type(error).__name__, str(error)])
    if errors:
        seen["errors"] = errors
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    if "lingers" in mode:
        time.sleep(100)


if __name__ == "__main__":
    main()
