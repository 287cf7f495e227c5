"""A small byte-level GPT: a plain `nn.Module` that knows nothing of graphpar."""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each with a residual connection."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, time, width) to the same shape."""
        b, t, c = x.shape
        q, k, v = self.qkv(self.ln_1(x)).view(b, t, 3, self.heads, c // self.heads).unbind(2)
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(b, t, c)))
        result: torch.Tensor = x + self.drop(self.down(F.gelu(self.up(self.ln_2(x)))))
        return result


class GPT(nn.Module):
    """Predicts the next byte; returns the loss when given targets."""

    def __init__(
        self, width: int = 192, layers: int = 6, heads: int = 6, length: int = 128, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, ids: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, time, 256), or the mean loss over all targets that are not -100."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.token(ids) + self.position(places)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.ln(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.view(-1, 256), targets.view(-1))


def example_inputs(batch_size: int, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and targets, each (batch_size, seq_len)."""
    ids = torch.randint(0, 256, (batch_size, seq_len + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
