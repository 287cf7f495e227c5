"""Sequence models without softmax attention, and attention with other positions."""

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, normal
from zoo.language import next_word, words


class TimeMix(nn.Module):
    """RWKV-4's attention without attention, as a loop over time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_decay = nn.Parameter(torch.linspace(-5, 3, dim))
        self.time_first = nn.Parameter(torch.ones(dim) * math.log(0.3))
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.time_mix_k = nn.Parameter(torch.rand(1, 1, dim))
        self.time_mix_v = nn.Parameter(torch.rand(1, 1, dim))
        self.time_mix_r = nn.Parameter(torch.rand(1, 1, dim))
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.receptance, self.output = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Any:
        B, T, C = x.size()  # noqa: N806
        xx = self.time_shift(x)
        k = self.key(x * self.time_mix_k + xx * (1 - self.time_mix_k))
        v = self.value(x * self.time_mix_v + xx * (1 - self.time_mix_v))
        r = torch.sigmoid(self.receptance(x * self.time_mix_r + xx * (1 - self.time_mix_r)))
        w, u = -torch.exp(self.time_decay), self.time_first
        aa = torch.zeros(B, C, dtype=x.dtype, device=x.device)
        bb = torch.zeros(B, C, dtype=x.dtype, device=x.device)
        pp = torch.full((B, C), -1e38, dtype=x.dtype, device=x.device)
        out = torch.empty_like(k)
        for t in range(T):
            ww = u + k[:, t]
            p = torch.maximum(pp, ww)
            e1, e2 = torch.exp(pp - p), torch.exp(ww - p)
            out[:, t] = (e1 * aa + e2 * v[:, t]) / (e1 * bb + e2)
            ww = w + pp
            p = torch.maximum(ww, k[:, t])
            e1, e2 = torch.exp(ww - p), torch.exp(k[:, t] - p)
            aa, bb, pp = e1 * aa + e2 * v[:, t], e1 * bb + e2, p
        return self.output(r * out)


class ChannelMix(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.mix = nn.Parameter(torch.rand(1, 1, dim))
        self.key, self.value = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(2 * dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Any:
        xx = self.time_shift(x)
        xk = x * self.mix + xx * (1 - self.mix)
        kv = self.value(torch.square(torch.relu(self.key(xk))))
        return torch.sigmoid(self.receptance(xk)) * kv


class Stack(nn.Module):
    """Embedding, residual blocks with norms in front, and a head."""

    def __init__(self, mixers: list[nn.Module], dim: int = 16) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, dim), nn.Linear(dim, 20)
        self.mixers = nn.ModuleList(mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in mixers)

    def forward(self, tokens: Tensor) -> Any:
        x = self.embed(tokens)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x)


@case
def rwkv() -> Case:
    return Case(Stack([TimeMix(16), ChannelMix(16), TimeMix(16), ChannelMix(16)]), words, next_word)


class Retention(nn.Module):
    """RetNet's retention in its parallel form, with decays by head and a group norm."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.gate = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.group_norm, self.proj = nn.GroupNorm(heads, dim), nn.Linear(dim, dim)
        gammas = 1 - torch.exp(torch.linspace(math.log(1 / 32), math.log(1 / 512), heads))
        self.register_buffer("gammas", gammas)

    def _decay(self, length: int) -> Tensor:
        n = torch.arange(length).unsqueeze(1)
        m = torch.arange(length).unsqueeze(0)
        D = (self.gammas.view(-1, 1, 1) ** (n - m)) * (n >= m).float()  # noqa: N806
        D[D != D] = 0
        return D

    def forward(self, x: Tensor) -> Any:
        b, t, c = x.shape
        q, k, v = (p.reshape(b, t, self.heads, -1).transpose(1, 2) for p in self.qkv(x).chunk(3, -1))
        ret = (q @ k.transpose(-1, -2)) * self._decay(t).unsqueeze(0)
        y = (ret @ v).transpose(1, 2).reshape(-1, c)
        y = self.group_norm(y).reshape(b, t, c)
        return self.proj(F.silu(self.gate(x)) * y)


@case
def retnet() -> Case:
    return Case(Stack([Retention(16), Retention(16)]), words, next_word)


class MambaMixer(nn.Module):
    """mamba-minimal: selective scan as a loop, a depthwise convolution along time, softplus steps."""

    def __init__(self, dim: int, state: int = 4) -> None:
        super().__init__()
        inner, self.rank, self.state = 2 * dim, 2, state
        self.in_proj = nn.Linear(dim, inner * 2, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, 4, groups=inner, padding=3)
        self.x_proj = nn.Linear(inner, self.rank + state * 2, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        A = torch.arange(1, state + 1).float().repeat(inner, 1)  # noqa: N806
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Any:
        (_, length, _) = x.shape
        x, res = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv1d(x.transpose(1, 2))[:, :, :length].transpose(1, 2)
        y = self.ssm(F.silu(x))
        return self.out_proj(y * F.silu(res))

    def ssm(self, x: Tensor) -> Tensor:
        A, D = -torch.exp(self.A_log.float()), self.D.float()  # noqa: N806
        (delta, B, C) = self.x_proj(x).split(split_size=[self.rank, self.state, self.state], dim=-1)  # noqa: N806
        delta = F.softplus(self.dt_proj(delta))
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))  # noqa: N806
        deltaBu = torch.einsum("bld,bln,bld->bldn", delta, B, x)  # noqa: N806
        h = torch.zeros((x.shape[0], x.shape[2], self.state), device=x.device)
        ys = []
        for i in range(x.shape[1]):
            h = deltaA[:, i] * h + deltaBu[:, i]
            ys.append(torch.einsum("bdn,bn->bd", h, C[:, i, :]))
        return torch.stack(ys, dim=1) + x * D


@case
def mamba() -> Case:
    return Case(Stack([MambaMixer(16), MambaMixer(16)]), words, next_word)


class AlibiAttention(nn.Module):
    """ALiBi's slopes, a sliding window, and a mask made by comparison of positions."""

    def __init__(self, dim: int, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.to_q, self.to_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        slopes = torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)])
        self.register_buffer("slopes", slopes.view(1, heads, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Any:
        b, n, _ = x.shape
        q = self.to_q(x).view(b, n, self.heads, -1).permute(0, 2, 1, 3)
        k, v = self.to_kv(x).view(b, n, 2, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        i, j = torch.arange(n, device=x.device)[:, None], torch.arange(n, device=x.device)[None, :]
        bias = -self.slopes * (i - j).abs()
        allowed = (j <= i) & (i - j < self.window)
        sim = torch.einsum("b h i d, b h j d -> b h i j", q, k) * q.shape[-1] ** -0.5 + bias
        sim = sim.masked_fill(~allowed, -torch.finfo(sim.dtype).max)
        attn = sim.softmax(dim=-1)
        o = torch.einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.out(o.permute(0, 2, 1, 3).reshape(b, n, -1))


@case
def alibi_window() -> Case:
    return Case(Stack([AlibiAttention(16), AlibiAttention(16)]), words, next_word)


class RelativeAttention(nn.Module):
    """Transformer-XL's shifted relative positions, and a learned table of biases like T5's."""

    def __init__(self, dim: int, heads: int = 2, length: int = 16) -> None:
        super().__init__()
        self.heads, self.d = heads, dim // heads
        self.qkv, self.pos = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.u, self.v = (
            nn.Parameter(torch.randn(heads, self.d)),
            nn.Parameter(torch.randn(heads, self.d)),
        )
        self.table = nn.Parameter(torch.randn(2 * length - 1, heads) * 0.1)
        coords = torch.arange(length)
        self.register_buffer("index", coords[:, None] - coords[None, :] + length - 1)
        self.register_buffer("inv_freq", 1 / (10000 ** (torch.arange(0.0, dim, 2.0) / dim)))
        self.out = nn.Linear(dim, dim)

    @staticmethod
    def _rel_shift(x: Tensor) -> Tensor:
        zero_pad = torch.zeros((*x.shape[:-1], 1), device=x.device, dtype=x.dtype)
        x_padded = torch.cat([zero_pad, x], dim=-1)
        x_padded = x_padded.view(*x.shape[:2], x.size(3) + 1, x.size(2))
        return x_padded[:, :, 1:].view_as(x)

    def forward(self, x: Tensor) -> Any:
        b, n, c = x.shape
        pos_seq = torch.arange(n - 1, -1, -1.0, device=x.device)
        sinusoid = torch.ger(pos_seq, self.inv_freq)
        r = self.pos(torch.cat([sinusoid.sin(), sinusoid.cos()], dim=-1).to(x.dtype)).view(
            n, self.heads, self.d
        )
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.d).unbind(2)
        ac = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        bd = self._rel_shift(torch.einsum("bihd,jhd->bhij", q + self.v, r))
        bias = self.table[self.index[:n, :n].reshape(-1)].view(n, n, -1).permute(2, 0, 1)
        score = (ac + bd) / self.d**0.5 + bias.unsqueeze(0)
        causal = torch.ones(n, n, dtype=torch.bool, device=x.device).triu_(1)
        score.masked_fill_(causal[None, None], float("-inf"))
        prob = F.softmax(score, dim=3)
        return self.out(torch.einsum("bhij,bjhd->bihd", prob, v).reshape(b, n, c))


@case
def relative_positions() -> Case:
    return Case(Stack([RelativeAttention(16), RelativeAttention(16)]), words, next_word)


@case
def word_vectors() -> Case:
    return Case(Stack([nn.Identity()]), lambda n: (words(n)[0], normal(n, 8, 20)), nn.MSELoss())
