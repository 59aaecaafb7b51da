"""Graph networks against their equations with a dense adjacency matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitsmith.zoo.data import cora, data_root
from bitsmith.zoo.graphs import Gcn, GcnLayer, Gin, GinLayer, gather_sum, gcn, gin


def graph(nodes: int, edges: int, seed: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Features, edges (repeated ones and loops included), and the dense matrix A[j, i] that counts edges i -> j."""
    rng = np.random.default_rng(seed)
    pairs = rng.integers(0, nodes, (2, edges))
    dense = np.zeros((nodes, nodes))
    np.add.at(dense, (pairs[1], pairs[0]), 1)
    return torch.from_numpy(rng.normal(size=(nodes, 5))), torch.from_numpy(pairs), dense


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gather_sum_is_the_adjacency_matrix(nodes: int, edges: int, seed: int) -> None:
    x, pairs, dense = graph(nodes, edges, seed)
    np.testing.assert_allclose(gather_sum(x, pairs).numpy(), dense @ x.numpy(), atol=1e-12)


@given(st.integers(2, 12), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_gcn_layer_is_equation_2(nodes: int, edges: int, seed: int) -> None:
    x, pairs, dense = graph(nodes, edges, seed)
    layer = GcnLayer(5, 3).double()
    torch.nn.init.normal_(layer.bias)
    looped = dense + np.eye(nodes)
    # D is the degree of the node that receives; for an undirected graph both ends'
    scale = np.diag(looped.sum(1) ** -0.5)
    want = scale @ looped @ scale @ x.numpy() @ layer.linear.weight.detach().numpy().T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x, pairs).detach().numpy(), want, atol=1e-12)


def test_gin_layer_is_equation_4_1() -> None:
    x, pairs, dense = graph(9, 20, 0)
    layer = GinLayer(5, 4).double().eval()
    torch.nn.init.constant_(layer.eps, 0.3)
    sums = torch.from_numpy(1.3 * x.numpy() + dense @ x.numpy())
    torch.testing.assert_close(layer(x, pairs), torch.relu(layer.mlp(sums)))


def test_gin_reads_out_nodes_or_graphs() -> None:
    x, pairs, _ = graph(6, 12, 0)
    model = gin(5, 3, hidden=8, layers=2).double()
    nodes = model(x, pairs)
    assert nodes.shape == (6, 3)
    # two copies of the graph side by side: each gives what it gives alone, and their order does not matter
    both, edges = torch.cat((x, x)), torch.cat((pairs, pairs + 6), 1)
    member = torch.zeros(2, 12, dtype=torch.float64)
    member[0, :6] = member[1, 6:] = 1
    whole = model(both, edges, member)
    torch.testing.assert_close(whole[0], whole[1])
    hidden = whole[0] - model.readout.bias
    torch.testing.assert_close(hidden, (nodes - model.readout.bias).sum(0))


@pytest.mark.parametrize("make", [lambda: gcn(5, 3), lambda: gin(5, 3)])
def test_renumbering_nodes_renumbers_the_output(make) -> None:
    x, pairs, _ = graph(8, 25, 3)
    model = make().double()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    place = torch.argsort(order)  # the new number of each old node
    torch.testing.assert_close(model(x[order], place[pairs]), model(x, pairs)[order])
    assert isinstance(model, (Gcn, Gin))


def test_no_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="layers=0"):
        gin(5, 3, layers=0)


@pytest.mark.data
def test_gcn_learns_cora() -> None:
    root = data_root()
    assert root is not None
    data = {name: torch.from_numpy(array) for name, array in cora(root).items()}
    model = gcn(1433, 7).train()
    # arXiv:1609.02907, section 5.2, fewer epochs
    optimiser = torch.optim.Adam(model.parameters(), 0.02, weight_decay=5e-4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(40):
            out = model(data["x"], data["edge_index"])
            loss = F.cross_entropy(out[data["train"]], data["y"][data["train"]])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        predicted = model.eval()(data["x"], data["edge_index"]).argmax(1)
    accuracy = (predicted == data["y"])[data["test"]].double().mean().item()
    assert accuracy > 0.78  # table 2 of the paper: 81.5 %
