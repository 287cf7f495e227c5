"""A tiny transformer for commands."""

import torch

from graphpar.examples.gpt import GPT
from graphpar.examples.gpt import example_inputs as example_inputs


def make() -> torch.nn.Module:
    """Two narrow blocks."""
    return GPT(width=32, layers=2, heads=2, length=128)
