"""Language models: transformers, recurrent attention, state spaces, experts."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids


@dataclass
class GPTConfig:
    """Sizes of a GPT."""

    block_size: int = 16
    vocab_size: int = 20
    n_layer: int = 3
    n_head: int = 2
    n_embd: int = 16
    dropout: float = 0.0
    bias: bool = True


class LayerNorm(nn.Module):
    def __init__(self, ndim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Any:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head, self.n_embd, self.dropout, self.flash = (
            config.n_head, config.n_embd, config.dropout, flash,
        )  # fmt: skip
        mask = torch.tril(torch.ones(config.block_size, config.block_size))
        self.register_buffer("bias", mask.view(1, 1, config.block_size, config.block_size))

    def forward(self, x: Tensor) -> Any:
        B, T, C = x.size()  # noqa: N806
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=None, dropout_p=self.dropout if self.training else 0, is_causal=True
            )
        else:
            att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            att = self.attn_dropout(F.softmax(att, dim=-1))
            y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (
            LayerNorm(config.n_embd, config.bias),
            LayerNorm(config.n_embd, config.bias),
        )
        self.attn = CausalSelfAttention(config, flash)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(config.n_embd, 4 * config.n_embd),
                "act": nn.GELU(),
                "c_proj": nn.Linear(4 * config.n_embd, config.n_embd),
                "dropout": nn.Dropout(config.dropout),
            }
        )
        m = self.mlp
        self.mlpf = lambda x: m.dropout(m.c_proj(m.act(m.c_fc(x))))

    def forward(self, x: Tensor) -> Any:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlpf(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT and minGPT: a lambda in a block, tied weights, the last position alone without targets."""

    def __init__(self, config: GPTConfig, flash: bool) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config, flash) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Any:
        device = idx.device
        _, t = idx.size()
        assert t <= self.config.block_size, f"Cannot forward sequence of length {t}"
        pos = torch.arange(0, t, dtype=torch.long, device=device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        return logits, loss


def words(samples: int) -> tuple[Tensor, Tensor]:
    """Words and the next ones, unequally many of which are ignored."""
    x = ids(samples, 8)
    y = torch.roll(x, -1, 1)
    y[:, -1] = -1
    y[::2, :3] = -1
    return x, y


class Second(nn.Module):
    """The loss of a model that returns (logits, loss)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        logits, loss = self.inner(*args, **kwargs)
        return {"loss": loss, "logits": logits}


@case
def nano_gpt() -> Case:
    return Case(Second(GPT(GPTConfig(), flash=True)), words)


@case
def min_gpt() -> Case:
    return Case(Second(GPT(GPTConfig(bias=True), flash=False)), words)


@case
def gpt_without_targets() -> Case:
    return Case(GPT(GPTConfig(), flash=True), lambda n: (words(n)[0], words(n)[0][:, 0]), last_word)


def last_word(out: Any, y: Tensor) -> Any:
    """Cross entropy of the only position that such a model returns."""
    return F.cross_entropy(out[0].squeeze(1), y)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    freqs = torch.outer(torch.arange(end, device=freqs.device), freqs).float()
    return torch.polar(torch.ones_like(freqs), freqs)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    shape = [d if i in (1, xq_.ndim - 1) else 1 for i, d in enumerate(xq_.shape)]
    freqs_cis = freqs_cis.view(*shape)
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Any:
        return self._norm(x.float()).type_as(x) * self.weight


class LlamaBlock(nn.Module):
    """Rotary positions as complex numbers, grouped keys, a cache in buffers written at `start_pos`."""

    def __init__(self, dim: int, cached: bool) -> None:
        super().__init__()
        self.heads, self.kv, self.head_dim, self.cached = 4, 2, dim // 4, cached
        self.wq = nn.Linear(dim, dim, bias=False)
        self.wk = nn.Linear(dim, self.kv * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, self.kv * self.head_dim, bias=False)
        self.wo = nn.Linear(dim, dim, bias=False)
        self.w1, self.w3 = nn.Linear(dim, 2 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.w2 = nn.Linear(2 * dim, dim, bias=False)
        self.attention_norm, self.ffn_norm = RMSNorm(dim), RMSNorm(dim)
        if cached:
            self.register_buffer("cache_k", torch.zeros(32, 16, self.kv, self.head_dim), persistent=False)
            self.register_buffer("cache_v", torch.zeros(32, 16, self.kv, self.head_dim), persistent=False)

    def forward(self, x: Tensor, start_pos: int, freqs_cis: Tensor, mask: Tensor | None) -> Any:
        h = self.attention_norm(x)
        bsz, seqlen, _ = h.shape
        xq = self.wq(h).view(bsz, seqlen, self.heads, self.head_dim)
        keys = self.wk(h).view(bsz, seqlen, self.kv, self.head_dim)
        values = self.wv(h).view(bsz, seqlen, self.kv, self.head_dim)
        xq, keys = apply_rotary_emb(xq, keys, freqs_cis=freqs_cis)
        if self.cached:
            self.cache_k[:bsz, start_pos : start_pos + seqlen] = keys
            self.cache_v[:bsz, start_pos : start_pos + seqlen] = values
            keys = self.cache_k[:bsz, : start_pos + seqlen]
            values = self.cache_v[:bsz, : start_pos + seqlen]
        keys = keys[:, :, :, None, :].expand(-1, -1, -1, 2, -1).reshape(bsz, -1, 4, self.head_dim)
        values = values[:, :, :, None, :].expand(-1, -1, -1, 2, -1).reshape(bsz, -1, 4, self.head_dim)
        q, k, v = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(q)
        x = x + self.wo(torch.matmul(scores, v).transpose(1, 2).contiguous().view(bsz, seqlen, -1))
        h = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Llama(nn.Module):
    """Meta's llama: `freqs_cis` is a plain attribute and no buffer."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(LlamaBlock(16, cached) for _ in range(2))
        self.norm, self.output = RMSNorm(16), nn.Linear(16, 20, bias=False)
        self.freqs_cis = precompute_freqs_cis(4, 32)

    def forward(self, tokens: Tensor, start_pos: int = 0) -> Any:
        _, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        self.freqs_cis = self.freqs_cis.to(h.device)
        freqs_cis = self.freqs_cis[start_pos : start_pos + seqlen]
        mask = None
        if seqlen > 1:
            mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device)
            mask = torch.triu(mask, diagonal=1)
            mask = torch.hstack([torch.zeros((seqlen, start_pos), device=tokens.device), mask]).type_as(h)
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, mask)
        return self.output(self.norm(h)).float()


def next_word(logits: Tensor, y: Tensor) -> Any:
    """Cross entropy over positions that are not ignored."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)


@case
def llama() -> Case:
    return Case(Llama(cached=False), words, next_word)


@case
def llama_with_cache() -> Case:
    model = Llama(cached=True)
    return Case(model, lambda n: words(n)[:1], trains=False)
