"""Fine-tune a BERT classifier over unlike workers: is a line of text Python code or English prose?

    python examples/bert_classifier.py
    torchrun --standalone --nproc-per-node 2 examples/bert_classifier.py

What many tutorials on distributed BERT get wrong is right here: AdamW has its own update rule, the
loss is taken from logits, padding is masked, gradients are clipped by their norm over all workers,
and the loss is the mean over the whole batch, however unevenly the workers share it.
"""

import argparse
import inspect
import pydoc_data.topics
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import graphpar
from graphpar.examples.one_device import compare, say, train_alone

BATCH, LENGTH, PAD = 32, 64, 0


def labelled_lines() -> list[tuple[bytes, int]]:
    """Lines of the language reference (0) and of the standard library's sources (1), as bytes."""
    prose = "\n".join(pydoc_data.topics.topics.values())
    code = "".join(inspect.getsource(module) for module in (argparse, inspect, random))
    labelled = [(line, 0) for line in prose.splitlines()] + [(line, 1) for line in code.splitlines()]
    return [(line.strip().encode()[:LENGTH], label) for line, label in labelled if len(line.split()) > 3]


def batches(seed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    """Endless random batches; a token is a byte plus one, zero pads each line to LENGTH."""
    lines = labelled_lines()
    by_label = [[line for line, label in lines if label == wanted] for wanted in (0, 1)]
    draw = random.Random(seed)
    while True:
        labels = [draw.randrange(2) for _ in range(BATCH)]
        ids = torch.full((BATCH, LENGTH), PAD)
        for row, label in enumerate(labels):
            line = draw.choice(by_label[label])
            ids[row, : len(line)] = torch.tensor(list(line)) + 1
        yield {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": torch.tensor(labels)}


def main() -> None:
    """Train over the workers, then alone, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--out", type=Path, help="write the losses here as JSON")
    options = parser.parse_args()

    torch.manual_seed(0)
    # Eager PyTorch draws dropout masks in the order it runs, which no split can repeat: off, to compare.
    config = BertConfig(
        vocab_size=257, hidden_size=128, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=LENGTH, pad_token_id=PAD, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    data = [batch for _, batch in zip(range(options.steps), batches(), strict=False)]
    training = graphpar.Training(optimizer=lambda p: torch.optim.AdamW(p, lr=5e-4), max_grad_norm=1.0)
    cluster = graphpar.Cluster.local(slowdowns=options.slowdowns)
    with graphpar.compile(model, cluster, kwargs=data[0], train=training) as job:
        say(str(job.plan))
        losses = [float(job.step(**batch)) for batch in data]
        unseen = next(batches(seed=1))
        wanted = unseen.pop("labels")
        right = job(**unseen).logits.argmax(-1) == wanted
    say(f"{int(right.sum())} of {BATCH} unseen lines told right")
    alone = train_alone(model, data, training.optimizer, max_grad_norm=1.0)
    compare(losses, alone, job.plan.partition.used_devices, options.out)


if __name__ == "__main__":
    main()
