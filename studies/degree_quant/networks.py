"""The networks, from PyTorch Geometric's own layers, and how each is trained."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.zoo.graph_sets import Graph, collate

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script, which it calls when it is imported
        from torch_geometric.nn import GATConv, GCNConv, GINConv, global_add_pool
except ModuleNotFoundError:
    raise SystemExit('this study needs PyTorch Geometric: pip install -c constraints.txt ".[graphs]"') from None

MOMENTUM = 0.1
"""Of the ranges. The paper has 0.01, for thousands of steps where these trainings have 40 to 200."""

RECIPE = 1
"""To be counted up with every change of what is computed: what is stored is then computed again."""

SAMPLE = 16384
"""Elements of a tensor that a percentile is taken of."""


def qat(bits: int, **more: Any) -> bs.DegreeQuant:
    """Plain training for integers: extremes, no node protected, the gradient passes everywhere."""
    plain: dict[str, Any] = {"high": 0.0, "percentile": None, "gradient": "ste", "momentum": MOMENTUM}
    return bs.DegreeQuant(bits, bits, **{**plain, **more})


def dq(bits: int, **more: Any) -> bs.DegreeQuant:
    """As the paper's best on Reddit-Binary: 0 to 0.1 and 0.1 % at 8 bits, 0.1 to 0.2 and 1 % at 4."""
    low, high, percentile = (0.0, 0.1, 0.1) if bits == 8 else (0.1, 0.2, 1.0)
    chosen: dict[str, Any] = {"low": low, "high": high, "percentile": percentile, "momentum": MOMENTUM}
    return bs.DegreeQuant(bits, bits, **{**chosen, "sample": SAMPLE, **more})


SETTINGS: Mapping[str, bs.DegreeQuant | None] = {
    "fp32": None,
    "QAT INT8": qat(8),
    "DQ INT8": dq(8),
    "QAT INT4": qat(4),
    "DQ INT4": dq(4),
    "DQ INT4, no mask": dq(4, low=0.0, high=0.0),
    "DQ INT4, no percentile": dq(4, percentile=None),
}


class NodeNet(nn.Module):
    """Two layers with a ReLU and dropout between: logits by node. ``edges``: (2, E), or sparse for the fused path."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.first(x, edges)), 0.5, self.training)
        logits: Tensor = self.second(x, edges)
        return logits


class GraphNet(nn.Module):
    """GIN layers, then the sum of each graph's nodes and a linear layer: logits by graph."""

    def __init__(self, features: int, outputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            GINConv(_mlp(hidden if k else features, hidden, hidden, True)) for k in range(layers)
        )
        self.readout = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x, edges))
        logits: Tensor = self.readout(global_add_pool(x, batch))
        return logits


def _mlp(features: int, hidden: int, outputs: int, norm: bool) -> nn.Sequential:
    between = [nn.BatchNorm1d(hidden), nn.ReLU()] if norm else [nn.ReLU()]
    return nn.Sequential(nn.Linear(features, hidden), *between, nn.Linear(hidden, outputs))


def node_net(kind: str, features: int, classes: int) -> NodeNet:
    """GCN and GIN of 16 hidden features, GAT of 8 heads of 8."""
    if kind == "GCN":
        return NodeNet(GCNConv(features, 16), GCNConv(16, classes))
    if kind == "GIN":
        first, second = _mlp(features, 16, 16, False), _mlp(16, 16, classes, False)
        return NodeNet(GINConv(first), GINConv(second))
    return NodeNet(GATConv(features, 8, heads=8), GATConv(64, classes, heads=1, concat=False))


def applied(model: nn.Module, technique: bs.DegreeQuant | None, inputs: Any, seed: int) -> nn.Module:
    """The model under the technique at every site that it fits, all in float without one."""
    if technique is None:
        return model
    return bs.apply(model, technique.plan(bs.sites(model, inputs)), [(inputs, None)], seed=seed)


@dataclass(frozen=True)
class Trained:
    """The network at its best on validation, and its ``metric`` on validation and test."""

    net: nn.Module
    validation: float
    test: float


def train_nodes(
    kind: str, technique: bs.DegreeQuant | None, data: Mapping[str, Tensor], edges: Tensor, seed: int, epochs: int
) -> Trained:
    """Full batches, Adam 0.01, weight decay 5e-4; the epoch of the best validation accuracy, looked at every third."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inputs = data["x"], edges
        net = applied(node_net(kind, data["x"].shape[1], 7), technique, inputs, seed)
        optimiser = torch.optim.Adam(net.parameters(), 0.01, weight_decay=5e-4)
        best = Trained(net, -1.0, -1.0)
        for epoch in range(epochs):
            net.train()
            loss = F.cross_entropy(net(*inputs)[data["train"]], data["y"][data["train"]])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if epoch % 3 == 2 or epoch == epochs - 1:
                right = outputs(net, [inputs])[0].argmax(1) == data["y"]
                found = [float(right[data[part]].double().mean()) for part in ("val", "test")]
                if found[0] >= best.validation:
                    best = Trained(copy.deepcopy(net), *found)
    return best


def train_graphs(
    graphs: Sequence[Graph],
    technique: bs.DegreeQuant | None,
    metric: Callable[[Tensor, Tensor], float],
    seed: int,
    epochs: int,
    hidden: int = 32,
    layers: int = 3,
    size: int = 128,
) -> Trained:
    """Adam 0.005, of which half is left after half of the epochs. 80 % of the graphs train, 10 % choose the epoch, 10 %
    are the test, drawn by the seed. Graphs without a class (targets that are floats) train with one logit by task."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        order = torch.randperm(len(graphs)).tolist()
        tenth = len(graphs) // 10
        parts = [order[2 * tenth :], order[:tenth], order[tenth : 2 * tenth]]
        held = [
            [collate(graphs[k] for k in part[at : at + 256]) for at in range(0, len(part), 256)] for part in parts[1:]
        ]
        binary = graphs[0].y.is_floating_point()
        width = len(graphs[0].y) if binary else 1 + max(int(graph.y) for graph in graphs)
        model = GraphNet(graphs[0].x.shape[1], width, hidden, layers)
        net = applied(model, technique, held[0][0][0], seed)
        optimiser = torch.optim.Adam(net.parameters(), 0.005)
        schedule = torch.optim.lr_scheduler.StepLR(optimiser, max(1, epochs // 2), 0.5)
        best = Trained(net, -1.0, -1.0)
        for _ in range(epochs):
            net.train()
            shuffled = [parts[0][k] for k in torch.randperm(len(parts[0])).tolist()]
            for at in range(0, len(shuffled), size):
                inputs, y = collate(graphs[k] for k in shuffled[at : at + size])
                out = net(*inputs)
                loss = F.binary_cross_entropy_with_logits(out, y) if binary else F.cross_entropy(out, y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            schedule.step()
            found = [
                metric(torch.cat(outputs(net, [x for x, _ in part])), torch.cat([y for _, y in part])) for part in held
            ]
            if found[0] >= best.validation:
                best = Trained(copy.deepcopy(net), *found)
    return best


def outputs(net: nn.Module, inputs: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """In evaluation, without gradients."""
    net.eval()
    with torch.no_grad():
        return [net(*one) for one in inputs]


def accuracy(out: Tensor, y: Tensor) -> float:
    return float((out.argmax(1) == y).double().mean())


def auroc(out: Tensor, y: Tensor) -> float:
    """The mean over tasks of the part of the pairs (positive, negative) that are in order, a tie as half."""
    found = []
    for logits, truth in zip(out.T.double(), y.T, strict=True):
        positive, negative = logits[truth == 1], logits[truth == 0]
        if len(positive) and len(negative):
            gap = positive[:, None] - negative[None]
            found.append(float((gap > 0).double().mean() + 0.5 * (gap == 0).double().mean()))
    return sum(found) / len(found) if found else 0.5
