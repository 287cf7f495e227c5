"""CTC losses, whose targets have as many labels as a batch happens to have."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from helpers import Line, compare_states, force, sgd
from torch import Tensor, nn


class Speech(nn.Module):
    """Frames to characters; the targets are all labels that are not ignored, as transformers has them."""

    def __init__(self, reduction: str, rows: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 6)
        self.reduction, self.rows = reduction, rows

    def forward(self, frames: Tensor, labels: Tensor) -> Tensor:
        logits = self.last(self.first(frames).tanh())
        log_probs = F.log_softmax(logits, -1, dtype=torch.float32).transpose(0, 1)
        mask = labels >= 0
        targets = labels.clamp_min(1) if self.rows else labels.masked_select(mask)
        steps = torch.full((len(frames),), frames.shape[1], dtype=torch.long)
        return F.ctc_loss(log_probs, targets, steps, mask.sum(-1), reduction=self.reduction)


def batch_of(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 6, (samples, 4), generator=generator)
    kept = torch.randint(1, 5, (samples, 1), generator=generator)
    return (
        torch.randn(samples, 12, 3, generator=generator),
        torch.where(torch.arange(4)[None] < kept, labels, -100),
    )


@pytest.mark.distributed
@pytest.mark.parametrize(("reduction", "rows"), [("mean", False), ("sum", True)])
def test_any_number_of_labels_is_as_on_one_device(reduction: str, rows: bool) -> None:
    torch.manual_seed(0)
    model = Speech(reduction, rows)
    alone = copy.deepcopy(model)
    optimizer = sgd(alone.parameters())
    lines = (Line((1,), 2, 3), Line((1,), 1, 2))
    with force(model, batch_of(5, 0), lines=lines).start() as job:
        for samples, seed in ((5, 0), (5, 1), (3, 2), (5, 3)):
            batch = batch_of(samples, seed)
            got, loss = job.step(*batch), alone(*batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(got, loss.detach(), rtol=2e-5, atol=1e-6)
        compare_states(job.state_dict(), alone.state_dict(), model.state_dict())
