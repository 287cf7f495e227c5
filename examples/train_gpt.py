"""Train the small GPT on several unlike workers; the same script runs under torchrun.

python examples/train_gpt.py
torchrun --standalone --nproc-per-node 2 examples/train_gpt.py
"""

import argparse

import torch

import graphpar
from graphpar.examples.gpt import GPT
from graphpar.examples.text import batches, standard_library_text


def main() -> None:
    """Train for some steps and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--layers", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = GPT(width=128, layers=options.layers, heads=4, dropout=0.1)
    data = batches(standard_library_text(), batch_size=8, length=64)
    cluster = graphpar.Cluster.local(slowdowns=options.slowdowns)
    training = graphpar.Training(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), max_grad_norm=1.0)
    with graphpar.compile(model, cluster, args=next(data), train=training) as job:
        for step in range(options.steps):
            loss = job.step(*next(data))
            print(f"step {step} loss {loss.item():.6f}", flush=True)


if __name__ == "__main__":
    main()
