"""`torch.autocast` in a model: captured as the casts it makes, with eager's numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from one_device import Calls, assert_close, eagerly, in_parts, ready
from torch import Tensor, nn

from graphpar.errors import CaptureError
from graphpar.frontend.autocast import Casting, NoSuchCasts, casts_of
from graphpar.frontend.torch_private import lookup_op
from graphpar.ir.ops import TensorType

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
LOW = torch.bfloat16


def layers(s: Calls, h: Tensor, y: Tensor) -> Any:
    """Products in bfloat16, norms in float32, islands without gradient and without autocast."""
    with torch.autocast("cpu", LOW):
        a = s.linear(h) @ s.table[:4]
        with torch.no_grad():
            scale = (h @ s.table[4:8]).amax()
        with torch.autocast("cpu", enabled=False):
            b = s.linear(h) * scale
        c = F.layer_norm(a, (4,), s.vector) + b
        loss = F.cross_entropy(c, y)
    return loss + a.float().mean() + (h @ s.vector).mean()


def attention(s: Calls, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", LOW):
        q = s.linear(h).view(1, 2, 2, 4)
        k = torch.einsum("bi,ij->bj", h, s.table[:4]).view(1, 2, 2, 4)
        mixed = F.scaled_dot_product_attention(q, k, h.view(1, 2, 2, 4))
        joined = torch.cat([mixed.view(4, 4), h])
        return (
            torch.softmax(joined, -1)[:, 0].float().square().mean()
            + torch.baddbmm(h[None], q[0, :1].expand(1, 2, 4).transpose(1, 2), k[0, :1]).float().mean()
        )


def one_weight_twice(s: Calls, h: Tensor, y: Tensor) -> Any:
    """Autocast casts a weight once and adds up both gradients in bfloat16."""
    with torch.autocast("cpu", LOW):
        made = s.linear(torch.tanh(s.linear(s.linear(h))))
    again = s.linear(h)
    with torch.autocast("cpu", torch.float16):
        return F.mse_loss(made, again) + s.linear(made).float().mean()


def convolves(s: Calls, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", LOW):
        made = F.conv1d(h[:, None], s.table[:6, None, :3], padding=1)
        pooled = F.adaptive_avg_pool1d(made, 2).flatten(1)
        return F.binary_cross_entropy_with_logits(pooled, (pooled > 0).float())


def in_place(s: Calls, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", LOW):
        made = s.linear(h)
        made[:, 1:].mul_(2).add_(h[:, 1:])
        return made.float().square().mean()


def in_vmap(s: Calls, h: Tensor, y: Tensor) -> Any:
    def one(v: Tensor) -> Tensor:
        with torch.autocast("cpu", LOW):
            return v @ s.table[:4]

    return torch.vmap(one)(h).float().square().mean()


def vmap_inside(s: Calls, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cpu", LOW):
        made = torch.vmap(s.linear, in_dims=1, out_dims=1)(h)
    return made.float().square().mean()


def of_another_device(s: Calls, h: Tensor, y: Tensor) -> Any:
    with torch.autocast("cuda", torch.float16):
        return s.linear(h).square().mean()


FUNCTIONS: tuple[Callable[[Calls, Tensor, Tensor], Any], ...] = (
    layers, attention, one_weight_twice, convolves, in_place, in_vmap, vmap_inside, of_another_device,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_numbers_are_those_of_eager_whole_and_in_parts(function: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = Calls(function)
    made = ready(model, (X, Y))
    # A batched operator adds up in another order; a bfloat16 keeps eight bits.
    whole = 2e-2 if function in (in_vmap, vmap_inside) else 1e-5
    assert_close(in_parts(made, (X, Y), (4,)), eagerly(model, (X, Y)), whole)
    casts = [op for op in made.source.ops if op.target == "aten._to_copy.default"]
    assert casts or function is of_another_device
    if not made.reason:  # parts round one by one
        assert_close(in_parts(made, (X, Y), (1, 3)), eagerly(model, (X, Y)), 2e-2)


STEPS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    lambda h, w: h @ w.to(h.dtype),
    lambda h, w: F.linear(h, w) if h.dtype == w.dtype else h + 1,
    lambda h, w: torch.tanh(h) * w.sum(),
    lambda h, w: torch.softmax(h, -1),
    lambda h, w: F.layer_norm(h.float(), (4,)),
    lambda h, w: torch.stack([h, h * 2]).mean(0),
    lambda h, w: h.pow(2).cumsum(-1) + w[0],
)
Program = list[Any]


def programs() -> st.SearchStrategy[Program]:
    """Steps, and settings around other programs."""
    step = st.integers(0, len(STEPS) - 1)
    settings = st.sampled_from(["low", "off", "no_grad", "enable_grad"])
    return st.recursive(
        st.lists(step, min_size=1, max_size=3),
        lambda inner: st.lists(st.one_of(step, st.tuples(settings, inner)), min_size=1, max_size=3),
        max_leaves=8,
    )


class Runs(nn.Module):
    """Runs a program on a linear layer's result."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.program = program

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", LOW):
            h = self.run(self.program, self.linear(x))
        loss: Tensor = h.float().square().mean() + self.linear(x).mean()
        return loss

    def run(self, program: Program, h: Tensor) -> Tensor:
        around: dict[str, Callable[[], Any]] = {
            "low": lambda: torch.autocast("cpu", LOW),
            "off": lambda: torch.autocast("cpu", enabled=False),
            "no_grad": torch.no_grad,
            "enable_grad": torch.enable_grad,
        }
        for part in program:
            if isinstance(part, int):
                h = h / (1 + h.detach().abs().amax())
                h = STEPS[part](h, self.weight)
            else:
                with around[part[0]]():
                    h = self.run(part[1], h)
        return h


@settings(max_examples=8, deadline=None)
@given(programs())
def test_any_nesting_of_settings_is_as_in_eager(program: Program) -> None:
    torch.manual_seed(0)
    model, x = Runs(program), torch.randn(3, 4)
    assert_close(in_parts(ready(model, (x,)), (x,), (3,)), eagerly(model, (x,)), 2e-2)


def test_what_casts_of_arguments_do_not_explain_is_refused() -> None:
    state = [TensorType((1, 2, 2), "float32")] * 2
    weights = [TensorType((8, 2), "float32")] * 2
    args = (TensorType((2, 2, 2), "float32"), state, weights, False, 1, 0.0, False, False, True)
    with pytest.raises(NoSuchCasts, match=r"torch.autocast makes .*aten.mkldnn_rnn_layer"):
        casts_of(lookup_op("aten.lstm.input"), args, {}, Casting("cpu", LOW), torch.device("cpu"))


def test_casts_are_not_lost_on_the_meta_device() -> None:
    with pytest.raises(CaptureError, match=r"\.py:\d+.*torch.autocast casts nothing on the meta device"):
        ready(Calls(layers).to("meta"), (X.to("meta"), Y.to("meta")))
