"""Train transformers' GPT-2, from its configuration, over unlike workers.

    python examples/gpt2.py
    torchrun --standalone --nproc-per-node 2 examples/gpt2.py

The losses are those of one device.
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphpar
from graphpar.examples.one_device import compare, say, train_alone
from graphpar.examples.text import batches, standard_library_text

BATCH, LENGTH = 8, 64


def main() -> None:
    """Train over the workers, then alone, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--out", type=Path, help="write the losses here as JSON")
    options = parser.parse_args()

    torch.manual_seed(0)
    # Without dropout, whose masks eager PyTorch draws in the order it runs, so that losses compare.
    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=4, n_head=4,
        use_cache=False, loss_type="ForCausalLM",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    text = batches(standard_library_text(), BATCH, LENGTH)
    data = [
        {"input_ids": ids, "labels": ids} for _, (ids, _) in zip(range(options.steps), text, strict=False)
    ]
    training = graphpar.Training(optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), max_grad_norm=1.0)
    cluster = graphpar.Cluster.local(slowdowns=options.slowdowns)
    with graphpar.compile(model, cluster, kwargs=data[0], train=training) as job:
        say(str(job.plan))
        losses = [float(job.step(**batch)) for batch in data]
    alone = train_alone(model, data, training.optimizer, max_grad_norm=1.0)
    compare(losses, alone, job.plan.partition.used_devices, options.out)


if __name__ == "__main__":
    main()
