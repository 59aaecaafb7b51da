"""Degree-Quant on PyTorch Geometric's own layers: what is seen, what is protected, and by which probability."""

from __future__ import annotations

import copy
import dataclasses
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitsmith as bs
from bitsmith.numerics.running import RunningQuantizer
from bitsmith.zoo.graphs import Gcn

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torch.jit.script when it is imported
        from torch_geometric.nn import GATConv, GCNConv, GINConv, global_add_pool, global_mean_pool
        from torch_geometric.utils import to_torch_csr_tensor
except ModuleNotFoundError:
    pytest.skip('needs PyTorch Geometric: pip install "bitsmith[graphs]"', allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:Sparse", "ignore:.*jit.*:DeprecationWarning")

NODES, FEATURES = 12, 6
PLAIN = bs.DegreeQuant(high=0.0, percentile=None, gradient="ste")


def random_graph(seed: int = 0, nodes: int = NODES, edges: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Without self-loops, and with two nodes that no edge names."""
    draw = torch.Generator().manual_seed(seed)
    pairs = torch.randint(0, nodes - 2, (2, edges), generator=draw)
    return torch.randn(nodes, FEATURES, generator=draw), pairs[:, pairs[0] != pairs[1]].unique(dim=1)


def mlp(features: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(features, 8), nn.ReLU(), nn.Linear(8, outputs))


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "GCN":
            self.first, self.second = GCNConv(FEATURES, 8), GCNConv(8, 3)
        elif kind == "GIN":
            self.first, self.second = GINConv(mlp(FEATURES, 8)), GINConv(mlp(8, 3), train_eps=True)
        else:
            self.first = GATConv(FEATURES, 4, heads=2)
            self.second = GATConv(8, 3, heads=2, concat=False)

    def forward(self, x, edge_index):
        x = F.dropout(torch.relu(self.first(x, edge_index)), 0.3, self.training)
        return self.second(x, edge_index)


class Pooled(nn.Module):
    def __init__(self, pool=global_add_pool) -> None:
        super().__init__()
        self.layer, self.head, self.pool = GINConv(mlp(FEATURES, 8)), nn.Linear(8, 2), pool

    def forward(self, x, edge_index, batch):
        return self.head(self.pool(torch.relu(self.layer(x, edge_index)), batch))


def make(kind: str) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(kind)


def applied(model, technique, inputs, *, softmax=False, seed=0):
    plan = technique.plan(bs.sites(model, inputs), softmax=softmax)
    return bs.apply(model, plan, [(inputs, None)], seed=seed)


def quantizers(net) -> dict[str, RunningQuantizer]:
    return {name: module for name, module in net.named_modules() if isinstance(module, RunningQuantizer)}


def cells(net):
    return [cell for cell in net._bitsmith.cells.values() if isinstance(cell, bs.Cell)]


def fused(x, edges):
    return x, to_torch_csr_tensor(edges.flip(0), size=(len(x), len(x)))


WANTED = {
    ("GCN", False): {"linear": 2, "mul": 2, "scatter_add": 2},
    ("GCN", True): {"linear": 2, "spmm": 2},
    ("GIN", False): {"linear": 4, "add": 2, "scatter_add": 2},
    ("GIN", True): {"linear": 4, "add": 2, "spmm": 2},
    ("GAT", False): {"linear": 2, "add": 2, "mul": 2, "scatter_add": 2, "mean": 1},
    ("GAT", True): {"linear": 2, "add": 2, "mul": 2, "scatter_add": 2, "mean": 1},
}
"""Sites under the plan by kind: features, coefficients with messages, sums, update."""


@pytest.mark.parametrize("high", [0.0, 0.5])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("kind", "sparse"), list(WANTED))
def test_every_quantizer_sees_data(kind: str, sparse: bool, softmax: bool, high: float) -> None:
    inputs = random_graph()
    inputs = fused(*inputs) if sparse else inputs
    model = make(kind)
    before = copy.deepcopy(model.state_dict())
    technique = bs.DegreeQuant(8, 8, high=high)
    plan = technique.plan(bs.sites(model, inputs), softmax=softmax)
    sites = bs.sites(model, inputs)
    found = [sites[name].kind for name in plan.sites]
    if not softmax:
        assert {one: found.count(one) for one in found} == WANTED[kind, sparse]
    else:
        assert set(found) >= set(WANTED[kind, sparse])
        assert ("sub" in found) == (kind == "GAT")
    net = bs.apply(model, plan, [(inputs, None)])
    made = quantizers(net)
    assert len(made) >= len(plan.sites)
    assert all(int(one.seen) == 0 for one in made.values())
    net.train()
    for _ in range(2):
        net(*inputs).square().sum().backward()
    assert {name: int(one.seen) for name, one in made.items()} == dict.fromkeys(made, 2)
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["GCN", "GIN", "GAT"])
def test_eight_bits_are_close_to_float_and_eval_protects_nothing(kind: str, sparse: bool) -> None:
    inputs = random_graph()
    inputs = fused(*inputs) if sparse else inputs
    model = make(kind).eval()
    net = applied(model, bs.DegreeQuant(8, 8, low=1.0, high=1.0, percentile=None), inputs)
    for module in net.modules():  # dropout off, protection of all: float to the weights
        module.training = not isinstance(module, (nn.Dropout, Net))
    with torch.no_grad():
        wanted = model(*inputs)
        spared = net(*inputs)
        rounded = net.eval()(*inputs)
    scale = wanted.abs().max()
    assert (spared - wanted).abs().max() < 0.02 * scale  # weights alone are rounded
    assert 0 < (rounded - wanted).abs().max() < 0.1 * scale


def test_messages_and_nodes_share_the_draw_of_the_node() -> None:
    """Every message of a protected node is exact, and of no other: told from GCN's layer by layer."""
    x, edges = random_graph()
    net = applied(make("GCN"), bs.DegreeQuant(2, 2, low=0.3, high=0.9, percentile=None), (x, edges))
    net.train()
    net(x, edges)
    masks = [cell._mask for cell in cells(net)]
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert 0 < int(masks[0].sum()) < NODES
    message = next(cell for cell in cells(net) if cell.kind == "mul")
    others = edges[0] != edges[1]
    source = torch.cat((edges[0][others], torch.arange(NODES)))  # as gcn_norm appends loops
    target = torch.cat((edges[1][others], torch.arange(NODES)))
    rows = torch.randn(len(source), 8)
    assert torch.equal(message._protected("1", rows, {}), masks[0][source])
    assert torch.equal(message._protected("1", torch.randn(NODES, 8), {}), masks[0])
    assert message._protected("1", torch.randn(5, 8), {}) is None
    summed = next(cell for cell in cells(net) if cell.kind == "scatter_add")
    index = target[:, None].expand(-1, 8)
    assert torch.equal(summed._protected("1", rows, {"dim": 0, "index": index}), masks[0][source])
    with pytest.raises(ValueError, match="order of the edges"):
        summed._protected("1", rows, {"dim": 0, "index": index.flip(0)})


def test_the_fused_path_adds_loops_where_they_are_sorted() -> None:
    x, adjacency = fused(*random_graph())
    net = applied(make("GAT"), bs.DegreeQuant(8, 8, low=0.5, high=0.5), (x, adjacency))
    net.train()
    net(x, adjacency)  # a wrong order is an error at the sums
    summed = next(cell for cell in cells(net) if cell.kind == "scatter_add")
    source, target = summed._graph.messages[1]
    order = [(b, a) for a, b in zip(source.tolist(), target.tolist(), strict=True)]
    assert order == sorted(order)


def test_nodes_of_many_edges_are_protected_more_often() -> None:
    x = torch.randn(6, FEATURES)
    edges = torch.tensor([[1, 2, 3, 4, 5, 0, 2], [0, 0, 0, 0, 0, 1, 1]])  # in-degrees 5, 2, 0, 0, 0, 0
    net = applied(make("GIN"), bs.DegreeQuant(8, 8, low=0.1, high=0.7), (x, edges))
    net.train()
    counts, draws = torch.zeros(6), 3000
    cell = cells(net)[0]
    for _ in range(draws):
        cell.observe({"x": x, "edge_index": edges})
        counts += cell._mask
    quantiles = np.array([1.0, 5 / 6, 4 / 6, 4 / 6, 4 / 6, 4 / 6])
    np.testing.assert_allclose(counts.numpy() / draws, 0.1 + 0.6 * quantiles, atol=0.035)
    assert int(cell.forwards) == draws


def test_degrees_are_compared_within_each_graph() -> None:
    x, edges = random_graph()
    both = torch.cat((x, x[:3])), torch.cat((edges, torch.tensor([[NODES], [NODES + 1]])), 1)
    batch = torch.tensor([0] * NODES + [1] * 3)
    net = applied(Pooled(), bs.DegreeQuant(8, 8, batch="batch"), (*both, batch))
    net.train()
    net(*both, batch)
    got = cells(net)[0]._graph.quantiles
    alone = applied(make("GIN"), bs.DegreeQuant(8, 8), (x, edges)).train()
    alone(x, edges)
    assert torch.equal(got[:NODES], cells(alone)[0]._graph.quantiles)
    np.testing.assert_allclose(got[NODES:].numpy(), [2 / 3, 1.0, 2 / 3])


@pytest.mark.parametrize("pool", [global_add_pool, global_mean_pool])
def test_pooled_graphs_see_data_too(pool) -> None:
    x, edges = random_graph()
    inputs = (x, edges, torch.tensor([0] * 5 + [1] * 7))
    net = applied(Pooled(pool), bs.DegreeQuant(8, 8, batch="batch", high=0.5), inputs).train()
    net(*inputs).sum().backward()
    assert all(int(one.seen) == 1 for one in quantizers(net).values())


def test_a_seed_and_a_counter_say_what_is_drawn() -> None:
    inputs = random_graph()
    technique = bs.DegreeQuant(4, 4, low=0.2, high=0.6)

    def masks(net, count):
        found = []
        for _ in range(count):
            net(*inputs)
            found.append(cells(net)[0]._mask)
        return torch.stack(found)

    first = masks(applied(make("GCN"), technique, inputs, seed=1).train(), 4)
    again = applied(make("GCN"), technique, inputs, seed=1).train()
    assert torch.equal(masks(again, 2), first[:2])
    resumed = applied(make("GCN"), technique, inputs, seed=1).train()
    resumed.load_state_dict(again.state_dict())
    assert torch.equal(masks(resumed, 2), first[2:])
    assert not torch.equal(masks(applied(make("GCN"), technique, inputs, seed=2).train(), 4), first)


def test_one_layer_is_the_equation() -> None:
    """GCN in evaluation, written plainly in float64 with the ranges that were tracked."""
    x, edges = random_graph()
    model = GCNConv(FEATURES, 5)
    net = applied(model, dataclasses.replace(PLAIN, w=4, a=6), (x, edges)).train()
    net(x, edges)
    net.eval()
    with torch.no_grad():
        got = net(x, edges).double().numpy()

    def grid(value, quantizer):
        scale, zero = float(quantizer.grid.scale), int(quantizer.grid.zero_point)
        return (np.clip(np.rint(value / scale) + zero, 0, 63) - zero) * scale

    by_kind = {cell.kind: cell.ranges for cell in cells(net)}
    weight = model.lin.weight.detach().double().numpy()
    step = np.abs(weight).max() / 7
    features = grid(x.double().numpy(), by_kind["linear"]["0"]) @ (np.rint(weight / step) * step).T
    source, target = np.concatenate((edges.numpy(), np.tile(np.arange(NODES), (2, 1))), 1)
    degree = np.bincount(target, minlength=NODES) ** -0.5
    coefficients = grid((degree[source] * degree[target])[:, None], by_kind["mul"]["0"])
    message = grid(coefficients * grid(features[source], by_kind["mul"]["1"]), by_kind["scatter_add"]["1"])
    total = np.zeros((NODES, 5))
    np.add.at(total, target, message)
    wanted = grid(total, by_kind["scatter_add"]["out"]) + model.bias.detach().double().numpy()
    # float32 beside a half step falls the other way now and then
    assert np.mean(np.abs(got - wanted) < 1e-5) > 0.9
    assert np.abs(got - wanted).max() < 2.5 * float(by_kind["scatter_add"]["out"].grid.scale)


def test_gcn_by_index_add_is_quantized_as_well() -> None:
    inputs = random_graph()
    net = applied(Gcn(FEATURES, 3, hidden=8), bs.DegreeQuant(8, 8, high=0.5), inputs).train()
    net(*inputs).sum().backward()
    assert all(int(one.seen) == 1 for one in quantizers(net).values())


def test_training_lowers_the_loss_under_finetune() -> None:
    x, edges = random_graph(nodes=30, edges=120)
    y = (x[:, 0] > 0).long()
    model = make("GCN")
    net = applied(model, bs.DegreeQuant(4, 4, low=0.1, high=0.2, percentile=1.0, momentum=0.1), (x, edges))

    def loss(one):
        with torch.no_grad():
            return float(F.cross_entropy(one.eval()(x, edges), y))

    trained = bs.finetune(net, [((x, edges), y)], F.cross_entropy, steps=60, lr=0.02)
    assert loss(trained) < 0.8 * loss(net)


@pytest.mark.parametrize("kind", ["GCN", "GIN", "GAT"])
def test_an_exported_network_runs_what_is_simulated(kind: str, tmp_path) -> None:
    x, edges = random_graph()
    model, target = make(kind), bs.targets.OnnxRuntime(threads=1)
    plan = bs.DegreeQuant(8, 8, high=0.0).plan(bs.sites(model, (x, edges)))
    net = bs.apply(model, plan, [((x, edges), None)]).train()
    net(x, edges)
    net.eval()
    artifact = bs.export(net, target, tmp_path / "net.onnx", (x, edges), batch=None)
    (got,) = target.run(artifact, [x.numpy(), edges.numpy()])
    with torch.no_grad():
        wanted = net(x, edges)
    step = max(float(one.grid.scale) for one in quantizers(net).values())
    assert np.abs(got - wanted.numpy()).max() < 2 * step  # a value on the edge of a level may fall the other way
    assert np.mean(np.abs(got - wanted.numpy()) < 1e-5) > 0.9
    assert b"DequantizeLinear" in artifact.path.read_bytes()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kind", ["GCN", "GIN", "GAT"])
def test_a_graph_without_edges_runs(kind: str, sparse: bool) -> None:
    inputs = random_graph()
    net = applied(make(kind), bs.DegreeQuant(8, 8, high=0.5), fused(*inputs) if sparse else inputs).train()
    x, none = inputs[0], torch.zeros(2, 0, dtype=torch.int64)
    given = fused(x, none) if sparse else (x, none)
    out = net(*given)
    assert out.isfinite().all()
    out.sum().backward()
    assert net.eval()(*given).isfinite().all()


def test_isolated_nodes_have_degree_zero() -> None:
    x, edges = random_graph()
    net = applied(make("GCN"), bs.DegreeQuant(8, 8), (x, edges)).train()
    assert net(x, edges).isfinite().all()
    quantiles = cells(net)[0]._graph.quantiles
    assert quantiles[-1] == quantiles[-2] == quantiles.min()


def test_edges_that_are_no_input_are_an_error() -> None:
    inputs = random_graph()
    net = applied(make("GCN"), bs.DegreeQuant(8, 8, edges="edges"), inputs)
    for _ in (net.train(), net.eval()):
        with pytest.raises(
            ValueError, match=r"edges='edges'.*no input tensor of that name; its inputs are x, edge_index"
        ):
            net(*inputs)
    again = applied(make("GCN"), bs.DegreeQuant(8, 8, batch="batch"), inputs)
    with pytest.raises(ValueError, match=r"batch='batch'.*graph of each node"):
        again(*inputs)
    applied(make("GCN"), bs.DegreeQuant(8, 8, high=0.0, edges="none"), inputs)(*inputs)


def test_an_input_that_holds_no_edges_is_an_error() -> None:
    inputs = random_graph()
    net = applied(make("GCN"), bs.DegreeQuant(8, 8, edges="x"), inputs).train()
    with pytest.raises(ValueError, match="no other input tells how many nodes"):
        net(*inputs)
    pooled = applied(Pooled(), bs.DegreeQuant(8, 8, batch="batch"), (*inputs, torch.zeros(NODES, dtype=torch.int64)))
    with pytest.raises(ValueError, match="from 0 to"):
        pooled.train()(*inputs, torch.zeros(3, dtype=torch.int64))


def test_loops_in_another_order_are_an_error() -> None:
    x, edges = random_graph()
    loops = torch.arange(NODES).expand(2, -1)
    first = torch.cat((loops, edges), 1)
    net = applied(make("GCN"), bs.DegreeQuant(8, 8), (x, first)).train()
    with pytest.raises(ValueError, match="add_remaining_self_loops"):
        net(x, first)
    net(x, torch.cat((edges, loops), 1))


def test_what_is_not_finite_names_the_site() -> None:
    x, edges = random_graph()
    net = applied(make("GCN"), bs.DegreeQuant(8, 8), (x, edges)).train()
    with pytest.raises(ValueError, match=r"'first.lin', operand 0: it holds NaN or infinity"):
        net(x * float("inf"), edges)


@pytest.mark.parametrize(
    "settings",
    [
        {"w": 1},
        {"a": 16},
        {"low": 0.3, "high": 0.2},
        {"high": 1.5},
        {"percentile": 50.0},
        {"momentum": 0.0},
        {"gradient": "soft"},
        {"sample": -1},
    ],
)
def test_settings_that_cannot_be(settings) -> None:
    with pytest.raises(ValueError, match=f"DegreeQuant.*{next(iter(settings))}"):
        bs.DegreeQuant(**settings)


def test_what_it_refuses() -> None:
    sites = bs.sites(make("GCN"), random_graph())
    technique = bs.DegreeQuant()
    assert "degrees" in str(technique.fits(sites["first:mul"]))
    assert "float" in str(technique.fits(sites[":relu"]))
    assert technique.bits(sites["first.lin"]) == 8 * FEATURES * 8 + 32
    assert repr(bs.DegreeQuant(4, 4, percentile=1.0)) == "DegreeQuant(w=4, a=4, percentile=1.0)"
