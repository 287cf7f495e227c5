"""Points, graphs, tables, fields and functions."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from zoo.case import Case, case, ids, normal


class TNet(nn.Module):
    """PointNet's transform: the maximum over points, and an identity from NumPy."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k, self.conv, self.bn = k, nn.Conv1d(k, 8, 1), nn.BatchNorm1d(8)
        self.fc1, self.fc2, self.bn2 = nn.Linear(8, 8), nn.Linear(8, k * k), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Any:
        batchsize = x.size()[0]
        x = F.relu(self.bn(self.conv(x)))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 8)
        x = self.fc2(F.relu(self.bn2(self.fc1(x))))
        iden = torch.from_numpy(np.eye(self.k).flatten().astype(np.float32)).view(1, self.k**2)
        iden = iden.repeat(batchsize, 1).to(x.dtype)
        return (x + iden).view(-1, self.k, self.k)


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stn, self.fstn = TNet(3), TNet(8)
        self.conv1, self.conv2 = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 12, 1)
        self.fc, self.dropout = nn.Linear(12, 5), nn.Dropout(p=0.3)

    def forward(self, x: Tensor) -> Any:
        trans = self.stn(x)
        x = torch.bmm(x.transpose(2, 1), trans).transpose(2, 1)
        x = F.relu(self.conv1(x))
        trans_feat = self.fstn(x)
        x = torch.bmm(x.transpose(2, 1), trans_feat).transpose(2, 1)
        x, _ = torch.max(self.conv2(x), 2)
        return F.log_softmax(self.fc(self.dropout(x)), dim=1), trans, trans_feat


def pointnet_loss(out: tuple[Tensor, Tensor, Tensor], y: Tensor) -> Any:
    """With the regulariser that keeps transforms orthogonal."""
    pred, _, trans = out
    d = trans.size()[1]
    eye = torch.eye(d)[None, :, :].to(trans)
    reg = torch.mean(torch.norm(torch.bmm(trans, trans.transpose(2, 1)) - eye, dim=(1, 2)))
    return F.nll_loss(pred, y) + reg * 0.001


@case
def pointnet() -> Case:
    return Case(PointNet(), lambda n: (normal(n, 3, 10), ids(n, high=5)), pointnet_loss)


class EdgeConv(nn.Module):
    """DGCNN: nearest neighbours by topk, gathered from the batch laid flat."""

    def __init__(self, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.conv1 = nn.Sequential(nn.Conv2d(6, 8, 1, bias=False), nn.GroupNorm(2, 8), nn.LeakyReLU(0.2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 8, 1, bias=False), nn.GroupNorm(2, 8), nn.LeakyReLU(0.2))
        self.fc = nn.Linear(32, 5)

    def graph_feature(self, x: Tensor) -> Tensor:
        batch_size, num_dims, num_points = x.size()
        inner = -2 * torch.matmul(x.transpose(2, 1), x)
        xx = torch.sum(x**2, dim=1, keepdim=True)
        idx = (-xx - inner - xx.transpose(2, 1)).topk(k=self.k, dim=-1)[1]
        idx_base = torch.arange(0, batch_size, device=x.device).view(-1, 1, 1) * num_points
        idx = (idx + idx_base).view(-1)
        x = x.transpose(2, 1).contiguous()
        feature = x.view(batch_size * num_points, -1)[idx, :].view(
            batch_size, num_points, self.k, num_dims
        )
        x = x.view(batch_size, num_points, 1, num_dims).repeat(1, 1, self.k, 1)
        return torch.cat((feature - x, x), dim=3).permute(0, 3, 1, 2).contiguous()

    def forward(self, x: Tensor) -> Any:
        batch_size = x.size(0)
        x1 = self.conv1(self.graph_feature(x)).max(dim=-1, keepdim=False)[0]
        x2 = self.conv2(self.graph_feature(x1)).max(dim=-1, keepdim=False)[0]
        x = torch.cat((x1, x2), dim=1)
        p1 = F.adaptive_max_pool1d(x, 1).view(batch_size, -1)
        p2 = F.adaptive_avg_pool1d(x, 1).view(batch_size, -1)
        return self.fc(torch.cat((p1, p2), 1))


@case
def dgcnn() -> Case:
    return Case(EdgeConv(), lambda n: (normal(n, 3, 8), ids(n, high=5)), nn.CrossEntropyLoss())


class GCN(nn.Module):
    """Graph convolutions over fixed edges in buffers, by index_add and scatter, on features of nodes."""

    def __init__(self) -> None:
        super().__init__()
        src = torch.tensor([0, 1, 2, 3, 4, 0, 2, 1, 3])
        dst = torch.tensor([1, 2, 3, 4, 0, 2, 4, 4, 1])
        self.register_buffer("edge_index", torch.stack([src, dst]))
        deg = torch.zeros(5).scatter_add_(0, dst, torch.ones(len(dst)))
        self.register_buffer("norm", deg[src].rsqrt().nan_to_num(posinf=0.0) * deg[dst].rsqrt())
        self.lin1, self.lin2 = nn.Linear(4, 8), nn.Linear(8, 8)
        self.att, self.head = nn.Linear(16, 1), nn.Linear(8, 3)

    def propagate(self, x: Tensor) -> Tensor:
        row, col = self.edge_index
        out = torch.zeros_like(x)
        out.index_add_(1, col, x[:, row] * self.norm[:, None])
        return out

    def attend(self, x: Tensor) -> Tensor:
        row, col = self.edge_index[0], self.edge_index[1]
        e = F.leaky_relu(self.att(torch.cat([x[:, row], x[:, col]], -1)).squeeze(-1), 0.2)
        index = col.expand_as(e)
        top = torch.full((x.shape[0], 5), -1e9).to(e).scatter_reduce(1, index, e, reduce="amax")
        e = (e - top.gather(1, index).detach()).exp()
        total = torch.zeros(x.shape[0], 5).to(e).scatter_add(1, index, e)
        alpha = e / (total.gather(1, index) + 1e-16)
        return torch.zeros_like(x).index_add(1, col, alpha.unsqueeze(-1) * x.index_select(1, row))

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.propagate(self.lin1(x)))
        x = self.attend(self.lin2(x))
        return F.log_softmax(self.head(x), dim=-1)


def labelled_nodes(out: Tensor, y: Tensor) -> Any:
    """Only some nodes of each graph have labels."""
    return F.nll_loss(out.transpose(1, 2), y, ignore_index=-1)


@case
def gcn_attention() -> Case:
    return Case(GCN(), lambda n: (normal(n, 5, 4), ids(n, 5, low=-1, high=3)), labelled_nodes)


class BigGraph(nn.Module):
    """PyG's batches: nodes of all graphs in one list, edges and the graph of each node as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor) -> Any:
        h = self.lin(x).relu()
        h = h + torch.zeros_like(h).index_add_(0, edge_index[1], h[edge_index[0]])
        graphs = 3
        pooled = h.new_zeros(graphs, h.size(1)).scatter_add_(0, batch.unsqueeze(1).expand_as(h), h)
        return self.head(pooled / torch.bincount(batch, minlength=graphs).clamp(min=1).unsqueeze(1))


@case
def batched_graphs() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        return (
            normal(2 * n, 4),
            ids(2, 3 * n, high=2 * n),
            torch.arange(2 * n) * 3 // (2 * n),
            ids(3, high=3),
        )

    return Case(BigGraph(), batch, nn.CrossEntropyLoss())


class DLRM(nn.Module):
    """Facebook's: bags with offsets, dots of all pairs below the diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(n, 4, mode="sum") for n in (7, 9))
        self.bot = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())

    def forward(self, dense_x: Tensor, lS_o: Tensor, lS_i: Tensor) -> Any:  # noqa: N803
        x = self.bot(dense_x)
        ly = [e(i, o) for e, i, o in zip(self.emb_l, lS_i.unbind(1), lS_o.unbind(1), strict=True)]
        T = torch.cat([x, *ly], dim=1).view((x.shape[0], -1, x.shape[1]))  # noqa: N806
        Z = torch.bmm(T, torch.transpose(T, 1, 2))  # noqa: N806
        _, ni, nj = Z.shape
        li = torch.tensor([i for i in range(ni) for j in range(i)])
        lj = torch.tensor([j for i in range(nj) for j in range(i)])
        return self.top(torch.cat([x, Z[:, li, lj]], dim=1))


@case
def dlrm() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        offsets = torch.arange(n)[:, None].expand(n, 2)
        return normal(n, 5), offsets, ids(n, 2, high=7), ids(n, 1, high=2).float()

    return Case(DLRM(), batch, nn.BCELoss())


class WideAndDeep(nn.Module):
    """Bags of equal length, wide crosses, factorisation, and a deep part; inputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 4, mode="mean", padding_idx=0)
        self.wide = nn.EmbeddingBag(20, 1, mode="sum", padding_idx=0)
        self.fields = nn.ModuleDict({"city": nn.Embedding(5, 4), "job": nn.Embedding(6, 4)})
        self.deep = nn.Sequential(
            nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, features: dict[str, Tensor]) -> Any:
        parts = [self.bag(features["words"]), *(m(features[k]) for k, m in self.fields.items())]
        stacked = torch.stack(parts, 1)
        fm = 0.5 * (stacked.sum(1).pow(2) - stacked.pow(2).sum(1)).sum(1, keepdim=True)
        return (self.wide(features["words"]) + self.deep(torch.cat(parts, 1)) + fm + self.bias).squeeze(
            -1
        )


@case
def wide_and_deep() -> Case:
    def batch(n: int) -> tuple[Any, ...]:
        features = {"words": ids(n, 4), "city": ids(n, high=5), "job": ids(n, high=6)}
        return features, ids(n, high=2).float()

    return Case(WideAndDeep(), batch, nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)))
