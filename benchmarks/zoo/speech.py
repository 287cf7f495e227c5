"""Speech, sequences of unlike lengths, loops over time, translation."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from zoo.case import Case, case, ids, normal


class DeepSpeech(nn.Module):
    """Convolutions, a GRU, CTC with lengths of inputs and targets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv1d(5, 8, 3, 2, 1), nn.BatchNorm1d(8), nn.Hardtanh(0, 20, inplace=True)
        )
        self.rnn, self.fc = nn.GRU(8, 6, bidirectional=True), nn.Linear(12, 5)
        self.loss = nn.CTCLoss(blank=0, zero_infinity=True)

    def forward(self, x: Tensor, targets: Tensor, lengths: Tensor, target_lengths: Tensor) -> Any:
        x = self.conv(x).permute(2, 0, 1).contiguous()
        x, _ = self.rnn(x)
        log_probs = self.fc(x).log_softmax(2)
        return {
            "loss": self.loss(log_probs, targets, lengths, target_lengths),
            "logits": log_probs.transpose(0, 1),
        }


@case
def deep_speech() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        return normal(n, 5, 16), ids(n, 3, low=1, high=5), torch.full((n,), 8), ids(n, low=1, high=4)

    return Case(DeepSpeech(), batch)


class Tagger(nn.Module):
    """A packed BiLSTM over sorted lengths, and a mean over words that exist."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor, lengths: Tensor, tags: Tensor) -> Any:
        packed = pack_padded_sequence(
            self.embed(x), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.size(1))
        logits = self.fc(out)
        return {"loss": F.cross_entropy(logits.transpose(1, 2), tags, ignore_index=-1), "logits": logits}


@case
def packed_tagger() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        lengths = torch.tensor([5, 3, 4, 2, 5, 1, 4])[:n]
        there = torch.arange(5) < lengths[:, None]
        return torch.where(there, ids(n, 5, low=1), 0), lengths, torch.where(there, ids(n, 5, high=4), -1)

    return Case(Tagger(), batch)


class Tacotron(nn.Module):
    """A decoder loop with location-sensitive attention, teacher forcing, masks by -inf, lists stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = (
            nn.Embedding(20, 8),
            nn.LSTM(8, 4, batch_first=True, bidirectional=True),
        )
        self.prenet = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Dropout(0.5))
        self.rnn, self.query, self.memory = nn.LSTMCell(14, 8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.location, self.v = nn.Conv1d(2, 6, 3, padding=1), nn.Linear(6, 1, bias=False)
        self.mel, self.gate = nn.Linear(16, 3), nn.Linear(16, 1)
        self.go = nn.Parameter(torch.zeros(1, 3), requires_grad=False)

    def forward(self, text: Tensor, mels: Tensor) -> Any:
        memory, _ = self.encoder(self.embed(text))
        keys, mask = self.memory(memory), text == 0
        B, T = text.shape  # noqa: N806
        h = c = memory.new_zeros(B, 8)
        context, weights, total = memory.new_zeros(B, 8), memory.new_zeros(B, T), memory.new_zeros(B, T)
        frames = self.prenet(torch.cat([self.go.expand(B, 1, 3), mels[:, :-1]], 1))
        outs, gates, aligns = [], [], []
        for t in range(mels.size(1)):
            h, c = self.rnn(torch.cat((frames[:, t], context), -1), (h, c))
            place = self.location(torch.cat((weights.unsqueeze(1), total.unsqueeze(1)), 1)).transpose(
                1, 2
            )
            energies = self.v(torch.tanh(self.query(h).unsqueeze(1) + place + keys)).squeeze(-1)
            energies.data.masked_fill_(mask, -1e9)
            weights = F.softmax(energies, dim=1)
            context = torch.bmm(weights.unsqueeze(1), memory).squeeze(1)
            total = total + weights
            both = torch.cat((h, context), dim=1)
            outs += [self.mel(both)]
            gates += [self.gate(both).squeeze(1)]
            aligns += [weights]
        out = torch.stack(outs).transpose(0, 1).contiguous()
        loss = F.mse_loss(out, mels) + F.binary_cross_entropy_with_logits(
            torch.stack(gates, 1), (mels[..., 0] > 1).float()
        )
        return {"loss": loss, "mel": out, "alignments": torch.stack(aligns, 1)}


@case
def tacotron() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        text = ids(n, 6, low=1)
        text[::2, 4:] = 0
        return text, normal(n, 4, 3)

    return Case(Tacotron(), batch)


class Translator(nn.Module):
    """nn.Transformer with masks made anew, tied generator, and sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.register_buffer("pe", torch.randn(32, 1, 16))
        self.transformer = nn.Transformer(16, 2, 2, 2, 32, dropout=0.1)
        self.generator = nn.Linear(16, 20)
        self.generator.weight = self.embed.weight

    def forward(self, src: Tensor, tgt: Tensor, labels: Tensor) -> Any:
        src, tgt = src.t(), tgt.t()
        tgt_mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(0))
        src_mask = torch.zeros((src.size(0), src.size(0))).type(torch.bool)
        src_pad, tgt_pad = (src == 0).transpose(0, 1), (tgt == 0).transpose(0, 1)
        outs = self.transformer(
            self.embed(src) * 4 + self.pe[: src.size(0)], self.embed(tgt) * 4 + self.pe[: tgt.size(0)],
            src_mask, tgt_mask, None, src_pad, tgt_pad, src_pad,
        )  # fmt: skip
        logits = self.generator(outs)
        loss = F.cross_entropy(logits.reshape(-1, 20), labels.t().reshape(-1), ignore_index=0)
        return {"loss": loss, "logits": logits.transpose(0, 1)}


@case
def translator() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        src, tgt = ids(n, 7, low=1), ids(n, 5, low=1)
        src[::2, 5:] = 0
        tgt[1::2, 3:] = 0
        return src, tgt, tgt.roll(-1, 1)

    return Case(Translator(), batch)
