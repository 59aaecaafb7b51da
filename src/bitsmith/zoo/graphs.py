"""Graph networks by gather and ``index_add``: GCN and GIN, without a library of their own.

``x`` (nodes, features) float; ``edge_index`` (2, edges) int64, from row 0 to row 1, both directions for an undirected
graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import build


def gather_sum(x: Tensor, edge_index: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum, at each node, of what its incoming edges bring: row j is the sum of ``weight * x[i]`` over edges i -> j.

    >>> gather_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0, 1, 2], [2, 2, 0]])).flatten()
    tensor([4., 0., 3.])
    """
    messages = x.index_select(0, edge_index[0])
    if weight is not None:
        messages = messages * weight.unsqueeze(-1)
    return torch.zeros_like(x).index_add(0, edge_index[1], messages)


class GcnLayer(nn.Module):
    """D^-1/2 (A + I) D^-1/2 x W + b: Kipf and Welling 2016, arXiv:1609.02907, eq. 2."""

    def __init__(self, features_in: int, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features_in, features, bias=False)
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        ones = torch.ones(edge_index.shape[1], dtype=x.dtype, device=x.device)
        degree = torch.ones(len(x), dtype=x.dtype, device=x.device).index_add(0, edge_index[1], ones)
        scale = degree.rsqrt()
        x = self.linear(x)
        weight = scale.index_select(0, edge_index[0]) * scale.index_select(0, edge_index[1])
        # the node itself is its own neighbour, with weight 1 / degree
        return gather_sum(x, edge_index, weight) + x * scale.square().unsqueeze(-1) + self.bias


class Gcn(nn.Module):
    """Two layers with a ReLU and dropout: (nodes, features), (2, edges) -> (nodes, num_classes) logits."""

    def __init__(self, features: int, num_classes: int, hidden: int = 16, dropout: float = 0.5) -> None:
        super().__init__()
        self.layer1, self.layer2 = GcnLayer(features, hidden), GcnLayer(hidden, num_classes)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = self.relu(self.layer1(self.dropout(x), edge_index))
        out: Tensor = self.layer2(self.dropout(x), edge_index)
        return out


class GinLayer(nn.Module):
    """MLP((1 + eps) x + sum of the neighbours): Xu et al. 2018, arXiv:1810.00826, eq. 4.1, with a learned eps."""

    def __init__(self, features_in: int, features: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(
            nn.Linear(features_in, features), nn.BatchNorm1d(features), nn.ReLU(), nn.Linear(features, features)
        )

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.mlp((1 + self.eps) * x + gather_sum(x, edge_index))
        return F.relu(out)


class Gin(nn.Module):
    """Layers, then a linear readout: (nodes, features), (2, edges) -> (nodes, num_classes) logits.

    With ``graph``, (graphs, nodes) float of ones where a node belongs to a graph, the nodes of each graph are summed
    before the readout (arXiv:1810.00826, eq. 4.2, of the last layer): -> (graphs, num_classes) logits.
    """

    def __init__(self, features: int, num_classes: int, hidden: int = 32, layers: int = 3) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"Gin(layers={layers}): must be at least 1")
        self.layers = nn.ModuleList(GinLayer(hidden if index else features, hidden) for index in range(layers))
        self.readout = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor, edge_index: Tensor, graph: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(x, edge_index)
        logits: Tensor = self.readout(x if graph is None else graph @ x)
        return logits


def gcn(features: int, num_classes: int, hidden: int = 16, seed: int = 0) -> Gcn:
    """A two-layer GCN of random weights, in evaluation mode. For Cora: features=1433, num_classes=7."""
    return build(lambda: Gcn(features, num_classes, hidden), seed)


def gin(features: int, num_classes: int, hidden: int = 32, layers: int = 3, seed: int = 0) -> Gin:
    """A GIN of random weights, in evaluation mode. Raises ``ValueError`` for no layers."""
    return build(lambda: Gin(features, num_classes, hidden, layers), seed)
