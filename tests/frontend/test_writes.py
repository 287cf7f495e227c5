"""Writes in place and regions without gradient: the graph's numbers are eager's, or it is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from one_device import Calls, assert_as_eager, assert_close, in_parts, ready
from torch import Tensor, nn

from graphpar.errors import CaptureError

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


def frozen(model: Calls) -> Calls:
    model.linear.weight.requires_grad_(False)
    return model


def nothing_recorded(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        target = (h * s.table[0]).softmax(-1)
    return -(target * (h * s.vector).log_softmax(-1)).sum(-1).mean()


def recorded_inside(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        a = h * 2
        with torch.enable_grad():
            b = (h * s.vector).sum()
    return (a * s.table[0]).sum() + b


def checked(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    torch._assert(h.size(1) == 4, "four columns")  # type: ignore[no-untyped-call]
    assert h.ndim == 2
    return h.pow(2).sum()


def fresh_writes(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = (h * 2).add_(1).mul_(s.vector).clamp_(min=-3)
    a[:, 0] = 0
    a[:, 1:3] += h[:, :2]
    torch.diagonal(a).add_(-1).pow_(2)
    return F.relu(a, inplace=True).pow(2).sum()


def shift_right(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    ids = y[:, None].expand(-1, 5).contiguous()
    shifted = ids.new_zeros(ids.shape)
    shifted[:, 1:] = ids[:, :-1].clone()
    shifted[:, 0] = 2
    shifted.masked_fill_(shifted == 1, 3)
    return (s.table[shifted] * h[:, None]).pow(2).sum()


def two_writes_through_one_view(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    view = a[:, 1:]
    view.add_(1)
    view.mul_(s.vector[1:])
    return (a * s.vector).pow(2).sum() + view.sum()


def writes_through_reshape(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    rows = a.view(-1, 2, 2)
    rows[:, 0].add_(1)
    a.t()[1].mul_(3)
    flat = a.reshape(-1)
    flat.mul_(2)
    copied = a.t().reshape(-1)
    copied.mul_(5)
    return (a * s.vector).pow(2).sum() + copied.sum()


def copies_keep_apart(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    wide = a.to(torch.float64)
    wide.mul_(2)
    return (a * wide).sum().float()


def types_stay(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    count = y * 1
    count.div_(2, rounding_mode="floor")
    mask = h.detach() * 1
    mask.gt_(0.1)
    return (h * mask / 3 + count[:, None]).pow(2).sum()


def filled_in_steps(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros(h.size(0), 3, 4)
    for t in range(3):
        out[:, t] = h * s.vector**t
    return out.pow(2).sum()


def reshaped_in_place(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * 1
    a.unsqueeze_(1).add_(1)
    return (a * h[:, None]).sum()


def parts_and_sorts(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a, b = h.chunk(2, 1)
    values, places = (h * s.vector).topk(2)
    return (a * b).sum() + (values * places).sum()


def counts(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    s.buffer += 1
    s.buffer[0] = h.detach()[0]
    return (h * s.buffer[:1]).sum()


def renamed_in_place(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    """In-place ops whose functional form has another overload's name."""
    step = y * 1
    step //= 2
    fixed, given = (h * s.vector).pow_(2), h.detach().abs()
    wide = (fixed + 1).double().float_power_(0.5)
    powers = (fixed + 1).pow_(given) + (fixed + 2).double().float_power_(given)
    return (wide.transpose_(0, 1) + (fixed * 1).ldexp_(step[:, None]) + powers).sum().float()


def diagonals(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h @ h.t()
    a.fill_diagonal_(0.5)
    b = a * s.vector[0]
    b.diagonal().mul_(3)
    return b.pow(2).sum()


def views_beside_a_write(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h * s.vector
    left, right, turned = a[:, :2], a[:, 2:], a.t()
    corner = left[:, 0]
    left.mul_(2)
    right.add_(s.vector[:1])
    return (a * left.sum()).sum() + (corner * right[:, 0]).sum() + turned[3].pow(2).sum()


def rows_of_a_stack(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    a = h.detach() * 2
    columns = a.unbind(1)
    for place, column in enumerate(columns):
        column.mul_(place + 1.5)
    head, tail = torch.split(a, [1, 3], 1)
    tail.add_(head)
    return (a * head * h).pow(2).sum() + columns[2].sum()


FUNCTIONS: list[Callable[[Calls, Tensor, Tensor], Tensor]] = [
    nothing_recorded, recorded_inside, checked, fresh_writes, shift_right, two_writes_through_one_view,
    writes_through_reshape, copies_keep_apart, types_stay, filled_in_steps, reshaped_in_place,
    parts_and_sorts, counts, renamed_in_place, diagonals, views_beside_a_write, rows_of_a_stack,
]  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numbers_are_those_of_eager(function: Callable[[Calls, Tensor, Tensor], Tensor]) -> None:
    made = assert_as_eager(Calls(function), (X, Y))
    assert not any(op.target.startswith("aten._assert") for op in made.source.ops)
    if not made.reason:
        assert_close(in_parts(made, (X, Y), (1, 3)), in_parts(made, (X, Y), (4,)))


def test_frozen_parameters_carry_no_gradient() -> None:
    made = assert_as_eager(frozen(Calls(lambda s, h, y: h.pow(2).sum())), (X, Y))
    by_name = {op.args[0]: op.attr("grad") for op in made.source.sources("parameter")}
    assert by_name["linear.weight"] is None and by_name["linear.bias"] is True


def test_batch_norm_keeps_its_statistics() -> None:
    model = Calls(lambda s, h, y: s.layer(h).pow(2).sum(), nn.BatchNorm1d(4))
    made = ready(model, (X, Y))
    device = made.device()
    for _ in range(2):
        device.forward((X, Y), {})
        model(X, Y)
    layer = model.layer
    assert isinstance(layer, nn.BatchNorm1d) and layer.running_mean is not None
    torch.testing.assert_close(device.tensors["layer.running_mean"], layer.running_mean)
    assert int(device.tensors["layer.num_batches_tracked"]) == 2


def test_a_power_iteration_that_writes_through_out_keeps_its_vectors() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    model = Calls(lambda s, h, y: s.layer(h).pow(2).sum(), layer)
    device = ready(model, (X, Y)).device()
    for _ in range(2):
        (loss,) = device.forward((X, Y), {})
        torch.testing.assert_close(loss, model(X, Y))
    vectors = {name: b for name, b in model.named_buffers() if name.endswith(("_u", "_v"))}
    assert len(vectors) == 2
    for name, vector in vectors.items():
        torch.testing.assert_close(device.tensors[name], vector)


def chained_buffer_writes(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    s.buffer[1].mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
    return (h * s.buffer[1]).sum()


def test_writes_in_a_row_to_part_of_a_buffer_all_count() -> None:
    model = Calls(chained_buffer_writes)
    made = ready(model, (X, Y))
    device = made.device()
    for _ in range(2):
        (loss,) = device.forward((X, Y), {})
        torch.testing.assert_close(loss, model(X, Y))
    torch.testing.assert_close(device.tensors["buffer"], model.buffer)


def test_an_argument_that_is_overwritten_is_the_callers_no_more(caplog: pytest.LogCaptureFixture) -> None:
    def writes(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        y[0] = 7
        return (h * y[:, None]).sum()

    made, y = ready(Calls(writes), (X, Y.clone())), Y.clone()
    assert "overwrites the argument" in caplog.text
    (loss,) = made.device().forward((X, y), {})
    assert torch.equal(y, Y)
    torch.testing.assert_close(loss, made.model(X, Y.clone()))


class Assigning(nn.Module):
    """Puts new tensors in the place of buffers, swaps two of them, and computes with what they were."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.again = self.linear
        self.mean: Tensor
        self.old: Tensor
        self.older: Tensor
        for name in ("mean", "old", "older"):
            self.register_buffer(name, torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.again(self.linear(x)) * self.older
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        self.old, self.older = self.mean, self.old
        result: Tensor = (h - self.mean).pow(2).mean()
        return result


def test_tensors_put_in_the_place_of_buffers_are_kept() -> None:
    model, x = Assigning(), torch.randn(6, 4)
    device = assert_as_eager(model, (x,)).device()
    for _ in range(3):
        device.forward((x,), {})
        model(x)
    for name, wanted in model.named_buffers():
        torch.testing.assert_close(device.tensors[name], wanted)


def test_a_buffer_that_is_held_elsewhere_too_cannot_be_reassigned() -> None:
    model = Assigning()
    model.register_buffer("other", model.mean)
    with pytest.raises(CaptureError, match=r"held elsewhere too \(mean\)"):
        ready(model, (torch.randn(6, 4),), loss=None)


class Momentum(nn.Module):
    """A frozen twin that follows the trained layer in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.twin = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            self.twin.weight.lerp_(self.layer.weight, 0.5)
            self.twin.bias.data = self.twin.bias.data * 0.5 + self.layer.bias.data * 0.5
            target = self.twin(x)
        return F.mse_loss(self.layer(x), target) + F.cross_entropy(target, y)


def test_a_frozen_weight_that_the_forward_writes_to_is_kept() -> None:
    model = Momentum()
    device = assert_as_eager(model, (X, Y)).device()
    for _ in range(2):
        device.forward((X, Y), {})
        model(X, Y)
    torch.testing.assert_close(device.tensors["twin.weight"], model.twin.weight)
    torch.testing.assert_close(device.tensors["twin.bias"], model.twin.bias)


@torch.library.custom_op("graphpar_tests::track", mutates_args={"seen"})
def track(x: Tensor, seen: Tensor) -> None:
    """Changes a buffer and returns nothing."""
    seen.add_(x.mean())


def test_an_operator_that_only_writes_to_a_buffer_is_kept() -> None:
    def run(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        track(h.detach(), s.buffer)
        return (h * s.buffer[0]).sum()

    assert "track.default" in assert_as_eager(Calls(run), (X, Y)).reason


class ByData(nn.Module):
    """Writes to a buffer, and takes rounding for nothing, through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.linear(x)
        self.mean.data.mul_(0.9).add_(h.data.mean(0), alpha=0.1)
        self.mean.data = self.mean.data * 2
        return F.cross_entropy(h + (h.round() - h).data - self.mean, y)


def test_writes_through_data_are_followed() -> None:
    model = ByData()
    made = assert_as_eager(model, (X, Y))
    device = made.device()
    device.forward((X, Y), {})
    model(X, Y)
    torch.testing.assert_close(device.tensors["mean"], model.mean)


class OtherData(nn.Module):
    """Puts one value in the place of another, the whole or a view, or writes to it afterwards."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.how = nn.Linear(4, 4), how

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([x, 2 * x])
        first, value = both[: len(x)], 5 * x
        target = first if self.how == "view" else 3 * x
        target.data = value
        if self.how == "written":
            value.add_(1)
        return F.cross_entropy(self.linear(target) + first, y)


def test_data_of_other_memory_is_followed_unless_memory_is_shared() -> None:
    assert_as_eager(OtherData("whole"), (X, Y))
    for how, told in (("view", "in place of a view"), ("written", "gave a tensor as data")):
        with pytest.raises(CaptureError, match=told):
            ready(OtherData(how), (X, Y))


class Masked(nn.Module):
    """Overwrites its own weights at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.linear.weight.data *= 0.5
        return F.cross_entropy(self.linear(x), y)


def test_weights_overwritten_through_data_are_refused() -> None:
    with pytest.raises(
        CaptureError, match=r"overwrites the parameter linear.weight in place.*parametrize"
    ):
        ready(Masked(), (X, Y))
