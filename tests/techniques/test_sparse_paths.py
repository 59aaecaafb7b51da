"""Sparse paths: the sum over paths, gradients, initialisation, numbering, size."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.numerics import paths as sequence
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.testing import MockTarget


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        parts += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def applied(model: nn.Module, x: Tensor, **options: Any) -> tuple[nn.Module, bs.Plan]:
    plan = bs.sparse_paths(model, x, **options)
    return bs.apply(model, plan, [(x, None)]), plan


@pytest.mark.parametrize("signs", ["free", "fixed"])
@pytest.mark.parametrize("generator", ["sobol", "random"])
def test_the_network_is_the_sum_over_its_paths(generator: Any, signs: Any) -> None:
    """a_{l+1}[idx_{l+1}[i]] += w_l[i] a_l[idx_l[i]] over paths i, each edge once, in float64."""
    model, count = mlp(20, 16, 8, 5), 40
    x = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    plan = bs.sparse_paths(model, x, paths=count, seed=2, generator=generator, signs=signs)
    plan = plan.replace(prepare=())  # with the weights that the model has
    net = bs.apply(model, plan, [(x, None)])
    a = x.double().numpy()
    for depth, name in enumerate(("0", "2", "4")):
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        weight, bias = (t.detach().double().numpy() for t in (layer.weight, layer.bias))
        source = sequence.neurons(count, weight.shape[1], depth, 2, generator).tolist()
        target = sequence.neurons(count, weight.shape[0], depth + 1, 2, generator).tolist()
        sign = sequence.signs(count, 1, 2)[:, 0].tolist()
        out = np.tile(bias, (3, 1))
        seen: set[tuple[int, int]] = set()
        for i in range(count):
            if (source[i], target[i]) in seen:
                continue
            seen.add((source[i], target[i]))
            w = weight[target[i], source[i]]
            w = abs(w) * sign[i] if signs == "fixed" else w
            out[:, target[i]] += w * a[:, source[i]]
        a = out if name == "4" else np.maximum(out, 0)
    with torch.no_grad():
        np.testing.assert_allclose(net(x).numpy(), a, rtol=1e-4, atol=1e-5)


def test_a_convolution_has_whole_kernels_on_its_paths() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    x = torch.randn(2, 6, 9, 9)
    technique = bs.SparsePaths(12, (3, 1), seed=4)
    net = bs.apply(nn.Sequential(model), bs.Plan({"0": technique}), [(x, None)])
    source = sequence.neurons(12, 6, 3, 4).tolist()
    target = sequence.neurons(12, 8, 1, 4).tolist()
    wanted = model.bias.detach().double().reshape(1, -1, 1, 1).repeat(2, 1, 5, 5)
    for a, b in set(zip(source, target, strict=True)):
        kernel = model.weight[b : b + 1, a : a + 1].detach().double()
        wanted[:, b : b + 1] += F.conv2d(x[:, a : a + 1].double(), kernel, stride=2, padding=1)
    with torch.no_grad():
        torch.testing.assert_close(net(x), wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("signs", ["free", "fixed"])
def test_gradients_reach_weights_on_the_paths_only(signs: Any) -> None:
    model = mlp(16, 16, 4)
    x = torch.randn(8, 16)
    net, plan = applied(model, x, paths=24, signs=signs)
    (net(x) * torch.randn(8, 4)).sum().backward()
    record = bs.sites(model, x)
    for name, technique in plan.sites.items():
        assert isinstance(technique, bs.SparsePaths)
        weight = net.get_parameter(f"{name}.weight")
        kept = technique.left(record[name]) != 0
        assert weight.grad is not None
        assert not weight.grad[~kept].any()
        assert weight.grad[kept].any()


@given(st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_signs_stay_fixed_whatever_the_weights_become(count: int, seed: int) -> None:
    model, x = mlp(8, 8), torch.randn(4, 8)
    net, plan = applied(model, x, paths=count, seed=seed, signs="fixed")
    technique = plan["0"]
    assert isinstance(technique, bs.SparsePaths)
    signs = technique.left(bs.sites(model, x)["0"])
    with torch.no_grad():
        weight, bias = net.get_parameter("0.weight"), net.get_parameter("0.bias")
        weight.normal_(generator=torch.Generator().manual_seed(seed))
        effective = (net(torch.eye(8)) - bias).T
    torch.testing.assert_close(effective.sign(), signs.float())


def test_training_from_the_deterministic_start_learns() -> None:
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    y = (x[:, :8].sum(1) > x[:, 8:].sum(1)).long()
    model = mlp(16, 64, 64, 2)
    net, _ = applied(model, x, paths=128)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = bs.finetune(net, [(x, y)], F.cross_entropy, steps=150, lr=0.01)
    with torch.no_grad():
        assert float((trained(x).argmax(1) == y).float().mean()) > 0.95
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_start_is_the_same_for_every_model_and_scaled_by_fan_in() -> None:
    x = torch.randn(2, 16)
    nets = [applied(mlp(16, 32, 8, seed=seed), x, paths=64, seed=1) for seed in (0, 1)]
    (one, plan), (other, _) = nets
    for name in ("0", "2"):
        weight = one.get_parameter(f"{name}.weight").detach()
        assert torch.equal(weight, other.get_parameter(f"{name}.weight"))
        assert not one.get_parameter(f"{name}.bias").any()
        left = weight[weight != 0]
        technique = plan[name]
        assert isinstance(technique, bs.SparsePaths)
        assert len(left) == technique.weights(bs.sites(mlp(16, 32, 8), x)[name])
        fan_in = len(left) / len(weight)
        assert left.abs().tolist() == pytest.approx([math.sqrt(2 / fan_in)] * len(left))
        assert abs(float(left.sign().mean())) < 0.4


def test_the_start_of_a_kernel_counts_its_taps() -> None:
    x = torch.ones(1, 8, 9, 9)
    net, plan = applied(nn.Sequential(nn.Conv2d(8, 16, 3)), x, paths=32)
    technique = plan["0"]
    assert isinstance(technique, bs.SparsePaths)
    weight = net.get_parameter("0.weight").detach()
    assert int(weight.ne(0).sum()) == 9 * 32  # the first two components share no edge
    size = math.sqrt(2 / (9 * 32 / 16))
    torch.testing.assert_close(weight, size * technique.left(bs.sites(nn.Sequential(nn.Conv2d(8, 16, 3)), x)["0"]))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.left, self.right = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)
        self.single = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        x = x + self.right(torch.relu(self.left(self.depth(x))))
        x = x + self.single(x)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def test_channels_that_are_added_have_one_component() -> None:
    x = torch.randn(2, 3, 8, 8)
    plan = bs.sparse_paths(Residual().eval(), x, paths=64)
    found = {name: technique.components for name, technique in plan.sites.items()}  # type: ignore[attr-defined]
    assert "depth" not in found
    trunk = found["stem"][1]
    assert found["stem"][0] != trunk
    assert found["left"][0] == trunk
    assert found["left"][1] == found["right"][0] != trunk
    assert found["right"][1] == trunk
    # a sum of its own input: paths must not all lead back to where they came from
    assert found["single"][0] == trunk != found["single"][1]
    assert found["head"][0] == trunk
    assert len({c for pair in found.values() for c in pair}) == 5


def test_only_the_sites_that_were_named() -> None:
    x = torch.randn(2, 16)
    plan = bs.sparse_paths(mlp(16, 8, 8, 4), x, paths=8, sites=["2"])
    assert {name: t.components for name, t in plan.sites.items()} == {"2": (1, 2)}  # type: ignore[attr-defined]
    with pytest.raises(bs.UnknownSiteError, match="no site"):
        bs.sparse_paths(mlp(16, 8), x, paths=8, sites=["o"])
    with pytest.raises(ValueError, match="relu is no convolution"):
        bs.sparse_paths(mlp(16, 8, 4), x, paths=8, sites=["1"])
    with pytest.raises(ValueError, match="no linear layer"):
        bs.sparse_paths(nn.ReLU(), x, paths=8)


def test_the_model_is_not_touched() -> None:
    model, x = mlp(16, 8, 4), torch.randn(2, 16)
    before = copy.deepcopy(model.state_dict())
    applied(model, x, paths=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_size_is_that_of_the_weights_that_are_left() -> None:
    site = bs.sites(mlp(64, 64), torch.zeros(1, 64))["0"]
    left = 32 * 256
    sobol, control = bs.SparsePaths(256), bs.SparsePaths(256, generator="random")
    assert sobol.weights(site) == 256  # no two of these paths share an edge
    assert sobol.bits(site) == left + 2 * 30 * 31
    assert control.bits(site) == control.weights(site) * (32 + 12)
    depthwise = bs.sites(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), torch.zeros(1, 4, 5, 5))["0"]
    assert bs.SparsePaths().bits(depthwise) == 4 * 9 * 32


def test_it_is_not_scored_untrained() -> None:
    model, x = mlp(16, 8, 4), torch.randn(16, 16)
    task = bs.Task(*([(x, torch.zeros(16, dtype=torch.long))] for _ in range(2)), metric=bs.metrics.top1)
    profile = bs.profile(model, task, [bs.SparsePaths(8), bs.Int(8, 8)], MockTarget())
    refused = [row.refused for row in profile.rows if row.technique == bs.SparsePaths(8)]
    assert len(refused) == 2
    assert all("needs training" in str(reason) for reason in refused)


def test_it_stands_beside_integers_and_ships(tmp_path: Any) -> None:
    model, x = mlp(16, 32, 8, 4), torch.randn(4, 16)
    plan = bs.sparse_paths(model, x, paths=64, sites=["0", "2"])
    plan = plan.replace(sites={**plan.sites, "4": bs.Int(8, 8)})
    net = bs.apply(model, bs.Plan.from_json(plan.to_json()), [(x, None)])
    target = OnnxRuntime(threads=1)
    artifact = bs.export(net, target, tmp_path / "net.onnx", x, batch=4)
    graph = onnx.load(str(artifact.path)).graph
    weights = [numpy_helper.to_array(t) for t in graph.initializer if tuple(t.dims) in ((32, 16), (16, 32))]
    assert len(weights) == 1  # masked already, not beside a mask
    assert np.count_nonzero(weights[0]) == plan["0"].weights(bs.sites(model, x)["0"])  # type: ignore[attr-defined]
    (got,) = target.run(artifact, [x.numpy()])
    with torch.no_grad():
        np.testing.assert_allclose(got, net(x).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"paths": 0}, "paths=0"),
        ({"components": (1, 1)}, "two different"),
        ({"components": (-1, 1)}, "from 0"),
        ({"generator": "halton"}, "halton"),
        ({"signs": "plus"}, "plus"),
    ],
)
def test_impossible_settings(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bs.SparsePaths(**options)


def test_the_start_needs_paths_and_weights_of_their_own() -> None:
    model, x = mlp(16, 16), torch.randn(2, 16)
    with pytest.raises(bs.PrepareError, match="no site of the plan"):
        bs.apply(model, bs.Plan({"0": bs.Int(8, 8)}, (bs.InitialisePaths(),)), [(x, None)])
    tied = mlp(16, 16, 16)
    tied[2].weight = tied[0].weight  # type: ignore[assignment]
    with pytest.raises(bs.PrepareError, match="no weight of its own"):
        applied(tied, x, paths=8)
    with pytest.raises(ValueError, match="gain"):
        bs.InitialisePaths(0.0)
