"""Models that sample or quantise: autoencoders, discriminators, flows, mixtures."""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from zoo.case import Case, case, ids, normal, seeded


class VAE(nn.Module):
    """Kingma and Welling's, as PyTorch's examples write it: noise is drawn in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc21, self.fc22 = nn.Linear(16, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.fc3, self.fc4 = nn.Linear(4, 12), nn.Linear(12, 16)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if not self.training:
            return mu
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return eps.mul(std).add_(mu)

    def forward(self, x: Tensor) -> Any:
        h1 = F.relu(self.fc1(x.view(-1, 16)))
        mu, logvar = self.fc21(h1), self.fc22(h1)
        z = self.reparameterize(mu, logvar)
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z)))), mu, logvar


def elbo(out: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Any:
    """Sums over everything, as the example has them."""
    recon_x, mu, logvar = out
    bce = F.binary_cross_entropy(recon_x, x.view(-1, 16), reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


@case
def vae() -> Case:
    return Case(VAE(), lambda n: (torch.rand(n, 1, 4, 4, generator=seeded(n)),) * 2, elbo)


class NormalVAE(VAE):
    """The same with torch.distributions."""

    def forward(self, x: Tensor) -> Any:
        h1 = F.elu(self.fc1(x.flatten(1)))
        q = torch.distributions.Normal(self.fc21(h1), F.softplus(self.fc22(h1)))
        p = torch.distributions.Normal(torch.zeros_like(q.loc), torch.ones_like(q.scale))
        z = q.rsample() if self.training else q.mean
        logits = self.fc4(F.elu(self.fc3(z)))
        likelihood = torch.distributions.Independent(
            torch.distributions.Bernoulli(logits=logits, validate_args=False), 1
        )
        kl = torch.distributions.kl_divergence(q, p).sum(-1)
        return {"loss": (kl - likelihood.log_prob(x.flatten(1))).mean(), "kl": kl}


@case
def vae_distributions() -> Case:
    return Case(NormalVAE(), lambda n: (torch.rand(n, 1, 4, 4, generator=seeded(n)),))


class VectorQuantizer(nn.Module):
    """The straight-through VQ-VAE of zalandoresearch, with its perplexity."""

    def __init__(self, codes: int = 6, dim: int = 4) -> None:
        super().__init__()
        self._embedding = nn.Embedding(codes, dim)
        self.codes, self.dim, self._commitment_cost = codes, dim, 0.25

    def forward(self, inputs: Tensor) -> Any:
        inputs = inputs.permute(0, 2, 3, 1).contiguous()
        shape = inputs.shape
        flat = inputs.view(-1, self.dim)
        distances = (
            torch.sum(flat**2, dim=1, keepdim=True)
            + torch.sum(self._embedding.weight**2, dim=1)
            - 2 * torch.matmul(flat, self._embedding.weight.t())
        )
        indices = torch.argmin(distances, dim=1).unsqueeze(1)
        encodings = torch.zeros(indices.shape[0], self.codes, device=inputs.device)
        encodings.scatter_(1, indices, 1)
        quantized = torch.matmul(encodings, self._embedding.weight).view(shape)
        e_latent = F.mse_loss(quantized.detach(), inputs)
        q_latent = F.mse_loss(quantized, inputs.detach())
        loss = q_latent + self._commitment_cost * e_latent
        quantized = inputs + (quantized - inputs).detach()
        avg_probs = torch.mean(encodings, dim=0)
        perplexity = torch.exp(-torch.sum(avg_probs * torch.log(avg_probs + 1e-10)))
        return loss, quantized.permute(0, 3, 1, 2).contiguous(), perplexity


class VQVAE(nn.Module):
    def __init__(self, vq: nn.Module) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1), nn.ReLU(True), nn.Conv2d(8, 4, 1))
        self.vq, self.decoder = (
            vq,
            nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 2, 1)),
        )

    def forward(self, x: Tensor) -> Any:
        vq_loss, z, perplexity = self.vq(self.encoder(x))
        recon = self.decoder(z)
        return {"loss": F.mse_loss(recon, x) / 0.06 + vq_loss, "recon": recon, "perplexity": perplexity}


@case
def vq_vae() -> Case:
    return Case(VQVAE(VectorQuantizer()), lambda n: (normal(n, 3, 8, 8),))


class QuantizerEMA(nn.Module):
    """rosinality's: codes follow an average in buffers, written through `.data`."""

    def __init__(self, codes: int = 6, dim: int = 4) -> None:
        super().__init__()
        self.n_embed, self.dim, self.decay, self.eps = codes, dim, 0.9, 1e-5
        embed = torch.randn(dim, codes)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(codes))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, inputs: Tensor) -> Any:
        x = inputs.permute(0, 2, 3, 1)
        flatten = x.reshape(-1, self.dim)
        dist = (
            flatten.pow(2).sum(1, keepdim=True)
            - 2 * flatten @ self.embed
            + self.embed.pow(2).sum(0, keepdim=True)
        )
        _, embed_ind = (-dist).max(1)
        embed_onehot = F.one_hot(embed_ind, self.n_embed).type(flatten.dtype)
        embed_ind = embed_ind.view(*x.shape[:-1])
        quantize = F.embedding(embed_ind, self.embed.transpose(0, 1))
        if self.training:
            embed_onehot_sum = embed_onehot.sum(0)
            embed_sum = flatten.transpose(0, 1) @ embed_onehot
            self.cluster_size.data.mul_(self.decay).add_(embed_onehot_sum, alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_(embed_sum.detach(), alpha=1 - self.decay)
            n = self.cluster_size.sum()
            cluster_size = (self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n
            embed_normalized = self.embed_avg / cluster_size.unsqueeze(0)
            self.embed.data.copy_(embed_normalized)
        diff = (quantize.detach() - x).pow(2).mean()
        quantize = x + (quantize - x).detach()
        return diff, quantize.permute(0, 3, 1, 2), embed_ind.float().mean()


@case
def vq_vae_ema() -> Case:
    return Case(VQVAE(QuantizerEMA()), lambda n: (normal(n, 3, 8, 8),))


@case
def spectral_discriminator() -> Case:
    sn = parametrizations.spectral_norm
    model = nn.Sequential(
        sn(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2, inplace=True), sn(nn.Conv2d(8, 8, 4, 2, 1)),
        nn.LeakyReLU(0.2, inplace=True), nn.Flatten(), sn(nn.Linear(32, 1)),
    )  # fmt: skip
    return Case(model, lambda n: (normal(n, 3, 8, 8), (ids(n, 1, high=2) * 2 - 1).float()), hinge)


def hinge(out: Tensor, sign: Tensor) -> Any:
    """The discriminator's hinge loss over real and fake samples in one batch."""
    return F.relu(1.0 - sign * out).mean()


@case
def old_spectral_norm() -> Case:
    sn = nn.utils.spectral_norm
    model = nn.Sequential(sn(nn.Linear(6, 8)), nn.LeakyReLU(0.2), sn(nn.Linear(8, 1)))
    return Case(model, lambda n: (normal(n, 6), (ids(n, 1, high=2) * 2 - 1).float()), hinge)
