"""Train transformers' Llama, from its configuration (grouped-query attention), over unlike workers.

    python examples/llama.py
    torchrun --standalone --nproc-per-node 2 examples/llama.py

The losses are those of one device.
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        use_cache=False, loss_type="ForCausalLM",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
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
