"""Peak memory of jobs of other families on this machine: `benchmarks/local_peaks.py [NAME ...]`.

Models, optimisers and settings that `benchmarks/prediction.py` does not hold: dropout, masks, experts,
batch normalisation, recurrent layers, large vocabularies, clipping, SGD, ZeRO. Each is trained on one
worker for two steps (the optimiser's state comes with the first) and its process's peak compared with
the plan's. Other work on the machine does not disturb it.
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
from prediction import memory_errors_pct, memory_summary, run
from torch import nn
from torch.nn import functional

import graphpar

BATCH, LENGTH, WORDS = 8, 128, 2000

AdamW = torch.optim.AdamW
Case = tuple[nn.Module, dict[str, Any], dict[str, Any]]


class Recurrent(nn.Module):
    """A table, an LSTM of two layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(WORDS, 256), nn.Linear(256, WORDS)
        self.inner = nn.LSTM(256, 256, 2, batch_first=True)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(batch, length) twice to the loss."""
        logits = self.head(self.inner(self.table(input_ids))[0])
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Segmenter(nn.Module):
    """Down twice and up again, with what was seen on the way down."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.down = nn.ModuleList(_twice(*ends) for ends in ((3, width), (width, 2 * width)))
        self.deep = _twice(2 * width, 4 * width)
        self.widen = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in (2 * width, width))
        self.up = nn.ModuleList(_twice(2 * w, w) for w in (2 * width, width))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) and (batch, height, width) to the loss."""
        seen = []
        for part in self.down:
            seen.append(part(x))
            x = functional.max_pool2d(seen[-1], 2)
        x = self.deep(x)
        for widen, part in zip(self.widen, self.up, strict=True):
            x = part(torch.cat([widen(x), seen.pop()], 1))
        return functional.cross_entropy(self.head(x), labels)


def _twice(before: int, after: int) -> nn.Module:
    parts = (
        [nn.Conv2d(n, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()] for n in (before, after)
    )
    return nn.Sequential(*(layer for part in parts for layer in part))


def _words(length: int = LENGTH, words: int = WORDS) -> dict[str, Any]:
    ids = torch.randint(0, words, (BATCH, length))
    return {"input_ids": ids, "labels": ids.clone()}


def _pictures(size: int, number: int = BATCH) -> dict[str, Any]:
    return {"pixel_values": torch.randn(number, 3, size, size), "labels": torch.randint(0, 10, (number,))}


_SIZES = {
    "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 256, "intermediate_size": 1024,
    "vocab_size": WORDS, "max_position_embeddings": 512,
}  # fmt: skip


def _llama(**changes: int) -> Any:
    sizes = {**_SIZES, "num_key_value_heads": 2, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False))


def _t5(dropout: float) -> Any:
    config = transformers.T5Config(
        d_model=256, d_ff=1024, d_kv=64, num_layers=3, num_heads=4, vocab_size=WORDS,
        decoder_start_token_id=0, dropout_rate=dropout, use_cache=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _masked() -> Case:
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, **quiet))
    return model, {**_words(256), "attention_mask": torch.ones(BATCH, 256, dtype=torch.long)}, {}


def _resnet(kind: str, sizes: list[int], pixels: int) -> Case:
    config = transformers.ResNetConfig(
        embedding_size=sizes[0],
        hidden_sizes=sizes,
        depths=[2] * len(sizes),
        layer_type=kind,
        num_labels=10,
    )
    return transformers.ResNetForImageClassification(config), _pictures(pixels, 16), {}


def _gpt2() -> Any:
    sizes = {"n_embd": 256, "n_layer": 4, "n_head": 4, "vocab_size": WORDS, "n_positions": 256}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, use_cache=False))


def _vit() -> Any:
    sizes = {**_SIZES, "image_size": 64, "patch_size": 4, "num_labels": 10}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))


def _mixtral() -> Any:
    sizes = {**_SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.MixtralConfig(**sizes, use_cache=False, experts_implementation="grouped_mm")
    return transformers.MixtralForCausalLM(config)


def _segmenter() -> Case:
    given = {"x": torch.randn(BATCH, 3, 64, 64), "labels": torch.randint(0, 2, (BATCH, 64, 64))}
    return Segmenter(), given, {}


CASES: dict[str, Callable[[], Case]] = {
    "t5": lambda: (_t5(0.0), _words(), {}),
    "t5 dropout": lambda: (_t5(0.1), _words(), {}),
    "bert dropout": lambda: (
        transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES)), _words(), {}
    ),
    "bert mask": _masked,
    "gpt2 dropout": lambda: (_gpt2(), _words(), {}),
    "vit": lambda: (_vit(), _pictures(64), {}),
    "mixtral": lambda: (_mixtral(), _words(), {}),
    "resnet bottleneck": lambda: _resnet("bottleneck", [64, 128, 256], 64),
    "resnet basic": lambda: _resnet("basic", [64, 128, 256, 512], 96),
    "llama sgd": lambda: (_llama(), _words(), {"optimizer": partial(torch.optim.SGD, lr=0.1)}),
    "llama clipped": lambda: (_llama(), _words(), {"max_grad_norm": 1.0}),
    "llama fused": lambda: (_llama(), _words(), {"optimizer": partial(AdamW, fused=True)}),
    "llama zero": lambda: (_llama(), _words(), {"zero": 1}),
    "llama 32k words": lambda: (_llama(vocab_size=32000, num_hidden_layers=2), _words(), {}),
    "lstm": lambda: (Recurrent(), _words(64), {}),
    "unet": _segmenter,
}  # fmt: skip


def measure(names: list[str]) -> Iterator[float]:
    """Errors in per cent, each printed when it is known."""
    calibration = graphpar.Calibration.cached() or graphpar.calibrate()
    for name, make in CASES.items():
        if names and name not in names:
            continue
        torch.manual_seed(0)
        model, inputs, changes = make()
        train = graphpar.Training(**{"optimizer": AdamW, **changes})
        devices = {"devices": [{"kind": "cpu", "threads": 1}]}
        with graphpar.compile(
            model,
            devices,
            (),
            inputs,
            train=train,
            calibration=calibration,
            time_limit_s=1.0,
            measure_s=0,
        ) as job:
            step = run(job, (), inputs, steps=1)[-1]
            errors = memory_errors_pct(job.plan, step)
        megabytes = ", ".join(f"{r.peak_bytes / 1e6:.0f}" for r in step.reports)
        print(
            f"{name:<20}" + "".join(f"{e:>+7.1f}" for e in errors) + f"   of {megabytes} MB", flush=True
        )
        yield from errors


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="Only these; all of them otherwise.")
    options = parser.parse_args()
    unknown = sorted(set(options.names) - CASES.keys())
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    print("memory_error_pct", memory_summary(list(measure(options.names))))


if __name__ == "__main__":
    main()
