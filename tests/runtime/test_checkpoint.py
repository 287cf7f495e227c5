"""Checkpoints: written under one plan, read under another and in plain PyTorch; never half of one."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Line, compare_states, cpus, force, handmade, straight
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_equality import Language, sentences
from torch import nn

import graphpar
from graphpar.compiler import subject_of
from graphpar.errors import RunError
from graphpar.partition.types import PipelineChoice, Replica, StageChoice
from graphpar.planner import plan_of, price
from graphpar.preparation import prepare
from graphpar.runtime.checkpoint import exchanged, swap
from graphpar.runtime.job import CompiledModel
from graphpar.runtime.pieces import sliced
from graphpar.runtime.program import Slice
from graphpar.runtime.tensor_files import find_tensors, read_tensor, write_tensors
from graphpar.training import Training

TRAINING = Training(
    optimizer=lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.8, 0.9)), max_grad_norm=1.0
)
PLANS = {
    "replicas": (Line((1, 2), 4),),
    "pipelines": (Line((1,), 2, 5), Line((1, 1), 1, 3)),
    "stages": straight(3, 2),
}


def start(plan: str, model: nn.Module) -> CompiledModel:
    return force(model, sentences(), lines=PLANS[plan], train=TRAINING).start()


def steps(job: CompiledModel, batches: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    return [float(job.step(*batch)) for batch in batches]


@pytest.mark.distributed
def test_a_checkpoint_goes_on_under_any_plan(tmp_path: Path) -> None:
    model = Language(layers=2, drop=0.2)
    batches = [sentences() for _ in range(5)]
    with start("replicas", model) as job:
        steps(job, batches[:1])
        job.save(tmp_path / "c")
        steps(job, batches[1:2])
        job.save(tmp_path / "c")  # takes the older one's place
        saved = job.state_dict()
        wanted = steps(job, batches[2:])
        end = job.state_dict()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    for plan in ("pipelines", "stages"):
        with start(plan, model) as job:
            steps(job, batches[3:4])  # forgotten by loading
            job.load(tmp_path / "c")
            compare_equal(job.state_dict(), saved)
            torch.testing.assert_close(steps(job, batches[2:]), wanted, rtol=1e-4, atol=1e-6)
            compare_states(job.state_dict(), end, saved, 1e-4)
    plain = Language(layers=2)
    plain.load_state_dict(graphpar.checkpoint_state(tmp_path / "c"))
    compare_equal(plain.state_dict(), saved)


def compare_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


@pytest.mark.distributed
def test_what_cannot_be_written_or_read_leaves_all_as_it_was(tmp_path: Path) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(4, 4)
    model[2].register_parameter("unused", nn.Parameter(torch.ones(2)))
    forced = force(model, (batch,), lines=straight(2), train=None)
    with forced.start() as job:
        (tmp_path / "file").write_text("")
        with pytest.raises(RunError, match="could not be written"):
            job.save(tmp_path / "file" / "c")
        (tmp_path / "mine").mkdir()
        with pytest.raises(ValueError, match="no checkpoint"):
            job.save(tmp_path / "mine")
        job.save(tmp_path / "c")
        files = sorted((tmp_path / "c").glob("model-*.safetensors"))
        together = {n: t for file in files for n, t in load_file(file).items()}
        compare_equal(together, dict(model.state_dict()))
        other = {n: t * 2 for n, t in together.items()}
        torch.testing.assert_close(job(batch), model(batch))

        index = tmp_path / "c" / "model.safetensors.index.json"
        whole = index.read_text()
        index.write_text(json.dumps({"weight_map": {"0.bias": files[0].name}}))
        files[0].write_bytes(files[0].read_bytes()[:-3])
        with pytest.raises(ValueError, match="damaged"):
            job.load(tmp_path / "c")
        index.write_text(whole)
        with pytest.raises(ValueError, match="no checkpoint"):
            job.load(tmp_path / "mine")
        job.load_state_dict(other)
        job.save(tmp_path / "d")
        model.load_state_dict(other)
        torch.testing.assert_close(job(batch), model(batch))
    other_model = force(nn.Linear(4, 5), (batch,), lines=straight(1), train=None)
    with other_model.start() as job, pytest.raises(ValueError, match="no tensor for bias"):
        job.load(tmp_path / "d")
    empty = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    empty[2].register_parameter("unused", nn.Parameter(torch.ones(2)))
    with graphpar.compile(empty.to("meta"), cpus(1), args=(batch,), weights=tmp_path / "d") as job:
        torch.testing.assert_close(job(batch), model(batch))


class Wide(nn.Module):
    """Worth splitting between the members of a tensor group."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 512), nn.Linear(512, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.down(self.up(x).relu()).square().mean()
        return loss


@pytest.mark.distributed
def test_slices_of_a_tensor_group_are_put_together_and_cut_anew(tmp_path: Path) -> None:
    model, batches = Wide(), [(torch.randn(32, 32),) for _ in range(3)]
    prepared = prepare(model, batches[0], {}, TRAINING)

    def grouped(shares: tuple[float, ...], **source: Any) -> CompiledModel:
        where = cpus(2)
        first, second = (device.name for device in where.devices)
        team = Replica(first, 2, others=(second,), shares=shares)
        stage = StageChoice(0, len(prepared.chain.units), (team,))
        found = handmade((PipelineChoice(32, 2, (stage,)),), "1f1b")
        table = price(prepared, where, train=TRAINING, precision="float32", calibration=None)
        plan = plan_of(prepared, where, table, found)
        return CompiledModel.start(subject_of(model, prepared, where, TRAINING, **source), lambda: plan)

    with grouped((0.75, 0.25)) as job:
        job.step(*batches[0])
        job.save(tmp_path / "c")
        saved = job.state_dict()
        wanted = [float(job.step(*batch)) for batch in batches]
        end = job.state_dict()
        assert any(job._slices), "nothing was split: the test is void"
    compare_equal(graphpar.checkpoint_state(tmp_path / "c"), saved)
    with grouped((0.5, 0.5), weights=tmp_path / "c") as job:
        compare_equal(job.state_dict(), saved)
    whole = force(model, batches[0], lines=straight(1), train=TRAINING, prepared=prepared)
    starts: list[Callable[[], CompiledModel]] = [lambda: grouped((0.5, 0.5)), whole.start]
    for start_job in starts:
        with start_job() as job:
            job.load(tmp_path / "c")
            torch.testing.assert_close([float(job.step(*b)) for b in batches], wanted, rtol=1e-4, atol=0)
            compare_states(job.state_dict(), end, saved, 1e-4)


@given(st.data())
def test_a_slice_is_read_as_it_is_taken(data: st.DataObject) -> None:
    counts = tuple(data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    inner, runs = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    dim, ndim = data.draw(st.integers(0, 2)), 3
    shape = [data.draw(st.integers(1, 4)) for _ in range(ndim)]
    shape[dim] = runs * sum(counts) * inner
    tensor = torch.randn(shape)
    cut = Slice(dim, counts, inner, data.draw(st.integers(0, len(counts) - 1)))
    with tempfile.TemporaryDirectory() as folder:
        write_tensors(f"{folder}/x.safetensors", {"before": torch.zeros(3), "x": tensor})
        stored = find_tensors(f"{folder}/x.safetensors")["x"]
        assert torch.equal(read_tensor(stored, cut=cut), sliced(tensor, cut))
        assert torch.equal(read_tensor(stored, torch.float64, cut), sliced(tensor, cut).double())


@pytest.mark.parametrize("at_once", [True, False])
def test_an_older_checkpoint_stands_until_the_new_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    fresh, place = tmp_path / ".c.new", tmp_path / "c"
    for folder, content in ((fresh, "new"), (place, "old")):
        folder.mkdir()
        (folder / "file").write_text(content)
    if at_once:
        if not exchanged(fresh, place):
            pytest.skip("this system cannot exchange two folders at once")
        exchanged(fresh, place)
        monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("there is a moment without one"))
    else:
        monkeypatch.setattr("graphpar.runtime.checkpoint.exchanged", lambda *_: False)
    swap(fresh, place)
    assert (place / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
