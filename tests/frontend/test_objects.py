"""Results that hold tensors in plain objects, and arguments that do."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Line, compare_results, eager, force
from torch import nn

import graphpar
from graphpar.errors import CaptureError
from graphpar.frontend.capture import capture
from graphpar.frontend.objects import closed, opened, plain_objects
from graphpar.frontend.torch_private import flatten


class Cache:
    """As models make them: tensors in lists of objects, and remarks beside."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.layers = [SimpleNamespace(keys=t, kind="full") for t in tensors]
        self.seen = {0: True}


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Cache]:
        a = self.first(x).tanh()
        b = self.second(a)
        return b, Cache(a, b.relu())


def as_plain(tree: Any) -> Any:
    """The same with dicts in the place of objects, for comparison."""
    if isinstance(tree, (Cache, SimpleNamespace)):
        return {key: as_plain(value) for key, value in vars(tree).items()}
    return [as_plain(part) for part in tree] if isinstance(tree, (list, tuple)) else tree


def test_objects_are_taken_apart_and_put_together() -> None:
    cache = Cache(torch.ones(2), torch.zeros(2))
    again = closed(opened({"cache": cache}))["cache"]
    assert isinstance(again, Cache) and again is not cache
    compare_results(as_plain(again), as_plain(cache))
    assert again.seen is not cache.seen


def test_what_holds_no_tensor_or_itself_stays_as_it_is() -> None:
    knot = SimpleNamespace(keys=1)
    knot.self = knot
    tree = [knot, SimpleNamespace(name="a"), torch.ones(1), "text", nn.Linear(1, 1)]
    assert all(a is b for a, b in zip(closed(opened(tree)), tree, strict=True))
    assert [type(leaf) for leaf in flatten(opened(tree))[0]] == [torch.Tensor, str]
    knot.keys = torch.ones(1)
    (apart,) = opened([knot])
    assert apart.rest == {"keys": None, "self": knot}


def test_a_job_returns_the_objects_of_the_model() -> None:
    model, x = Caching(), torch.randn(6, 4)
    with force(model, (x,), lines=(Line((1, 1), 2),), train=None, by_op=True).start() as job:
        for batch in (x, x[:5]):
            compare_results(as_plain(job(batch)), as_plain(eager(model, (batch,))))


def test_caches_of_transformers_are_returned() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=8))
    ids = torch.randint(0, 20, (4, 5))
    with force(model, (ids,), lines=(Line((1, 1), 2),), train=None).start() as job:
        got = job(ids)
    wanted = eager(model, (ids,))
    compare_results(got.logits, wanted.logits)
    for mine, theirs in zip(got.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        compare_results([mine.keys, mine.values], [theirs.keys, theirs.values])
    assert got.past_key_values.get_seq_length() == 5


class Counting(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(x=x + 1, samples=x.shape[0])


def test_an_object_that_tells_the_batch_size_keeps_the_batch_whole() -> None:
    captured = capture(Counting(), (torch.ones(4, 2),), {})
    assert captured.unsplittable == "the structure of the model's result changes with the batch size"


def test_arguments_with_tensors_inside_are_refused_by_name() -> None:
    class Taking(nn.Module):
        def forward(self, x: torch.Tensor, past: Any) -> torch.Tensor:
            result: torch.Tensor = x + past.keys
            return result

    past = SimpleNamespace(keys=torch.ones(2))
    assert list(plain_objects([past])) == [past]
    with pytest.raises(CaptureError, match=r"Argument past .* SimpleNamespace"):
        graphpar.plan(
            Taking(), {"devices": [{"kind": "cpu"}]}, args=(torch.ones(2),), kwargs={"past": past}
        )
