"""Binary layers: what they compute, how they train beside others, what ships, what targets say of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.apply import computer_of
from bitsmith.testing import MockTarget
from smallnet import batches, small, task

CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)


class Layer(nn.Module):
    """One layer of ``dims`` axes, 0 for linear; its weights hold zeros."""

    def __init__(self, dims: int, groups: int = 1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(6, 4 // groups, *(3,) * dims, generator=generator) / 2
        weight.view(-1)[:3] = torch.tensor([0.0, -0.0, 1.5])
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.randn(6, generator=generator))
        self.dims, self.groups = dims, groups

    def forward(self, x: Tensor) -> Tensor:
        if not self.dims:
            return F.linear(x, self.weight, self.bias)
        found: Tensor = CONVOLUTIONS[self.dims - 1](x, self.weight, self.bias, padding=1, groups=self.groups)
        return found


def applied(model: nn.Module, technique: bs.Technique, x: Tensor, seed: int = 0) -> nn.Module:
    (name,) = bs.sites(model, x)
    return bs.apply(model, bs.Plan({name: technique}), [(x, None)], seed=seed)


def inputs(dims: int, seed: int = 1) -> Tensor:
    x = torch.randn(3, 4, *(5,) * dims, generator=torch.Generator().manual_seed(seed))
    x.view(-1)[:2] = torch.tensor([0.0, -0.0])
    return x


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("scaling", ["none", "xnor", "learned"])
@pytest.mark.parametrize("activations", [False, True])
def test_it_computes_the_equation(dims: int, scaling: Any, activations: bool) -> None:
    model, x = Layer(dims), inputs(dims)
    net = applied(model, bs.Binary(scaling, activations), x)
    w = model.weight.detach().double().numpy()
    bits = np.where(w >= 0, 1.0, -1.0)
    scale = np.ones(6) if scaling == "none" else np.abs(w).reshape(6, -1).mean(1)
    given = np.where(x.double().numpy() >= 0, 1.0, -1.0) if activations else x.double().numpy()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        exact.weight.copy_(torch.from_numpy(bits * scale.reshape(-1, *[1] * (w.ndim - 1))))
        wanted = exact(torch.from_numpy(given))
        np.testing.assert_allclose(net(x).numpy(), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_the_gradient_of_both_factors() -> None:
    """dL/dw_i = s g_i 1[|w_i| <= 1] + sign(w_i) / n sum_j g_j sign(w_j), and the input's is cancelled too."""
    model, x = Layer(0), inputs(0)
    net = applied(model, bs.Binary("xnor", activations=True), x).train()
    given = (1.3 * x).requires_grad_(True)
    net(given).square().sum().backward()
    w, v = model.weight.detach().double().numpy(), given.detach().double().numpy()
    bits, signed, scale = np.where(w >= 0, 1.0, -1.0), np.where(v >= 0, 1.0, -1.0), np.abs(w).mean(1)
    output = signed @ (bits * scale[:, None]).T + model.bias.detach().double().numpy()
    g = (2 * output).T @ signed
    wanted = g * scale[:, None] * (np.abs(w) <= 1) + np.sign(w) * (g * bits).mean(1, keepdims=True)
    found = dict(net.named_parameters())["weight"].grad
    assert found is not None
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        given.grad.numpy(), (2 * output) @ (bits * scale[:, None]) * (np.abs(v) <= 1), rtol=1e-4, atol=1e-4
    )


class Normed(nn.Module):
    """A layer and its normalisation, of which one channel is turned and one is constant."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layer = Layer(dims)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](6)
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.5, -0.7, 0.0, 1.0, 2.0, 0.3]))
            self.norm.bias.copy_(torch.randn(6, generator=generator))
            self.norm.running_mean.copy_(torch.randn(6, generator=generator))
            self.norm.running_var.copy_(torch.rand(6, generator=generator) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.layer(x))
        return found


def normed(dims: int, scaling: Any) -> tuple[Normed, nn.Module, Tensor]:
    model, x = Normed(dims).eval(), inputs(dims)
    plan = bs.Plan({next(iter(bs.sites(model, x))): bs.Binary(scaling, activations=True)})
    return model, bs.apply(model, plan, [(x, None)]), x


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@pytest.mark.parametrize("scaling", ["none", "xnor"])
def test_the_normalisation_behind_is_absorbed_in_eval(dims: int, scaling: Any) -> None:
    """(n + bias / s - mean / s) s gamma / sqrt(var + eps) + beta of an exact sum n, in float64."""
    model, net, x = normed(dims, scaling)
    (cell,) = (cell for cell in computer_of(net).cells.values() if hasattr(cell, "norm"))
    assert cell.norm
    exact = copy.deepcopy(model).double()
    w = exact.layer.weight.detach()
    scale = w.abs().flatten(1).mean(1).view(-1, *[1] * (w.dim() - 1)) if scaling == "xnor" else 1.0
    with torch.no_grad():
        exact.layer.weight.copy_(torch.where(w >= 0, 1.0, -1.0) * scale)
        wanted = exact(torch.where(x >= 0, 1.0, -1.0).double())
        np.testing.assert_allclose(net(x).numpy(), wanted.numpy(), rtol=1e-5, atol=1e-5)


def test_a_normalisation_in_eval_is_computed_in_training_too_with_its_gradients() -> None:
    model, net, x = normed(2, "xnor")
    net.train()
    with torch.no_grad():
        evaluated = net.eval()(x)
    net.train()
    cast_norm(net).eval()  # as finetune(freeze_norms=True) has it
    found = net(x)
    torch.testing.assert_close(found, evaluated, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    given = dict(net.named_parameters())
    exact = copy.deepcopy(model).double().eval()
    w = model.layer.weight.detach()
    scale = w.abs().flatten(1).mean(1).view(-1, 1, 1, 1)
    with torch.no_grad():
        exact.layer.weight.copy_((torch.where(w >= 0, 1.0, -1.0) * scale).double())
    exact(torch.where(x >= 0, 1.0, -1.0).double()).square().sum().backward()
    for name in ("norm.weight", "norm.bias", "layer.bias"):
        wanted = dict(exact.named_parameters())[name].grad
        np.testing.assert_allclose(given[name].grad.numpy(), wanted.numpy(), rtol=1e-4, atol=1e-4)  # type: ignore[union-attr]


def test_a_normalisation_in_training_runs_itself() -> None:
    model, net, x = normed(2, "none")
    net.train()
    w = model.layer.weight.detach()
    plain = copy.deepcopy(model).train()
    with torch.no_grad():
        plain.layer.weight.copy_(torch.where(w >= 0, 1.0, -1.0))
        wanted = plain(torch.where(x >= 0, 1.0, -1.0))
        torch.testing.assert_close(net(x), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cast_norm(net).running_mean, plain.norm.running_mean)


def cast_norm(net: nn.Module) -> Any:
    return net.get_submodule("norm")


def of(net: nn.Module) -> Any:
    ((_, cell),) = computer_of(net).cells.items()
    return cell


def test_clipping_begins_when_it_should() -> None:
    model, x = Layer(0), inputs(0)
    net = applied(model, bs.Binary("none", cancel_gradient=0.5, clip_weights=0.75), x).train()
    cell, seen = of(net), []
    weight = dict(net.named_parameters())["weight"]
    for done in range(4):
        cell.step(done, 4)
        with torch.no_grad():
            weight.fill_(3.0)
        weight.grad = None
        net(x).sum().backward()
        seen.append((float(weight.detach().max()), bool((weight.grad == 0).all()), cell.clipping))
    assert seen == [(3.0, False, False), (3.0, False, False), (3.0, True, False), (3.0, True, True)]
    cell.settle()  # what the last step moved
    assert float(weight.detach().max()) == 1.0
    never = applied(model, bs.Binary("none", cancel_gradient="never", clip_weights="never"), x).train()
    of(never).step(9, 10)
    assert not of(never).clipping
    assert not of(never).cancelling


def test_latent_weights_stay_within_one_in_training_and_no_other_network_is_touched() -> None:
    data = batches(4)
    model = small()
    with torch.no_grad():
        model.left.weight.mul_(30)
    net = bs.apply(model, bs.Plan({"left": bs.Binary()}), data)
    before = copy.deepcopy(net.state_dict())
    free = bs.Plan({"left": bs.Binary(clip_weights="never")})
    clipped = bs.finetune(net, data, F.cross_entropy, steps=3, lr=1e-2)
    loose = bs.finetune(bs.apply(model, free, data), data, F.cross_entropy, steps=3, lr=1e-2)
    assert float(clipped.left.weight.detach().abs().max()) <= 1.0  # type: ignore[union-attr, operator]
    assert float(loose.left.weight.detach().abs().max()) > 1.0  # type: ignore[union-attr, operator]
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())


def test_drawn_weights_differ_by_forward_and_not_by_network() -> None:
    model, x = Layer(2), inputs(2)
    nets = [applied(model, bs.Binary("none", stochastic=True), x, seed).train() for seed in (0, 0, 1)]
    first, second, other = ([net(x).detach() for _ in range(3)] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    # a copy goes on as the original does, from the state dict as well
    loaded = applied(model, bs.Binary("none", stochastic=True), x, seed=7).train()
    loaded.load_state_dict(nets[0].state_dict())
    assert torch.equal(loaded(x), nets[0](x))
    nets[0].eval()
    wanted = applied(model, bs.Binary("none"), x)
    assert torch.equal(nets[0](x), wanted(x))
    assert of(nets[0]).settle() == bs.Binary("none")


def test_a_drawn_weight_has_the_mean_of_the_clipped_one() -> None:
    layer = nn.Linear(3, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.6, 0.2, 2.0]]))
    net = applied(layer, bs.Binary("none", stochastic=True), torch.eye(3)).train()
    with torch.no_grad():
        mean = torch.stack([net(torch.eye(3))[:, 0] for _ in range(2000)]).mean(0)
    assert torch.allclose(mean, torch.tensor([-0.6, 0.2, 1.0]), atol=4 / 2000**0.5)


def test_signs_flip_at_the_rate_and_stay_flipped() -> None:
    layer, count = nn.Linear(200, 300, bias=False).eval(), 60_000
    nets = [applied(layer, bs.Binary("none", error_rate=rate), torch.eye(200), 4) for rate in (0.0, 0.01, 0.01, 1.0)]
    with torch.no_grad():
        clean, flipped, again, all_flipped = (net(torch.eye(200)) for net in nets)
        repeated = nets[1](torch.eye(200))
        other = applied(layer, bs.Binary("none", error_rate=0.01), torch.eye(200), 5)(torch.eye(200))
    part = float((clean != flipped).float().mean())
    assert abs(part - 0.01) < 5 * (0.01 * 0.99 / count) ** 0.5
    assert torch.equal(flipped, again)
    assert torch.equal(flipped, repeated)
    assert not torch.equal(flipped, other)
    assert torch.equal(clean, -all_flipped)


def test_binary_and_four_bit_sites_train_at_once() -> None:
    data = batches(40, seed=5)
    sites = {"stem": bs.Int(4, 8), "left": bs.Binary(), "right": bs.Binary("learned", activations=True)}
    plan = bs.Plan({**sites, "head": bs.Binary("xnor", stochastic=True, clip_weights=0.5)})
    net = bs.apply(small(), plan, data[:4])

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(F.cross_entropy(net(x), y)) for x, y in batches(6, seed=6)) / 6

    trained = bs.finetune(net, data, F.cross_entropy, steps=80, lr=5e-3, freeze_norms=False)
    assert loss(trained) < 0.5 * loss(net)
    assert bs.plan_of(trained).sites == {**plan.sites, "head": bs.Binary("xnor", clip_weights=0.5)}
    assert trained.state_dict()["_bitsmith.cells.right.scale"].shape == (8,)


def test_a_winograd_site_stands_beside_them() -> None:
    data = batches(30, seed=5)
    plan = bs.Plan({"left": bs.Winograd(2), "right": bs.Binary(), "head": bs.Int(4, 8)})
    net = bs.apply(small(), plan, data[:4])

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(F.cross_entropy(net(x), y)) for x, y in batches(6, seed=6)) / 6

    assert loss(bs.finetune(net, data, F.cross_entropy, steps=60, lr=3e-3)) < loss(net)


def test_a_forward_that_is_checkpointed_has_the_gradient_of_its_own_draw() -> None:
    from torch.utils.checkpoint import checkpoint

    class Net(nn.Module):
        def __init__(self, again: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.again = nn.Linear(8, 8), again

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(self.layer, x, use_reentrant=False) if self.again else self.layer(x)
            return found

    grads = []
    for again in (False, True):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
        model = Net(again)
        net = bs.apply(model, bs.Plan({"layer": bs.Binary("none", stochastic=True)}), [(x, None)], seed=2).train()
        given = x.clone().requires_grad_(True)
        for _ in range(2):
            net(given).square().sum().backward()
        grads.append(given.grad)
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does
def test_training_compiles_in_one_graph_and_still_clips() -> None:
    model, x = Layer(2), inputs(2)
    technique = bs.Binary("xnor", activations=True, stochastic=True)
    net = applied(model, technique, x).train()
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(x), net(x), atol=1e-5)
    for one in (net, twin):
        of(one).step(0, 1)
        assert float(dict(one.named_parameters())["weight"].detach().max()) <= 1.0


def test_what_ships_is_what_is_simulated_in_float(tmp_path: Path) -> None:
    data = batches(2)
    sites = {"left": bs.Binary("none"), "right": bs.Binary("xnor", activations=True), "head": bs.Binary("learned")}
    net = bs.apply(small(), bs.Plan(sites), data)
    x = data[0][0]
    with torch.no_grad():
        wanted = net(x).numpy()
    for target in (bs.targets.OnnxRuntime(threads=1), bs.targets.OpenVino(threads=1)):
        artifact = bs.export(
            net, target, tmp_path / f"net{'.xml' if 'vino' in target.name else '.onnx'}", x, batch=len(x)
        )
        (got,) = target.run(artifact, [x.numpy()])
        np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)
        realised = target.inspect(artifact)
        # OpenVINO merges the first with the normalisation behind it, under whose name it then runs, in float
        merged = {"left"} if target.name == "openvino" else set()
        assert {realised[name].precision for name in sites.keys() - merged} == {"size only"}, target.name
        assert not any(value.precision.startswith("int") for value in realised.values())


def test_targets_refuse_it_with_the_reason() -> None:
    site = bs.sites(small(), batches(1)[0][0])["left"]
    for target in (bs.targets.OnnxRuntime(), bs.targets.OpenVino()):
        for technique in (bs.Binary(), bs.Binary("none", activations=True)):
            verdict = target.supports(technique, site)
            assert isinstance(verdict, bs.No)
            assert "float" in str(verdict)


def test_a_profile_leaves_it_out_with_its_size() -> None:
    found = bs.profile(small(), task(), [bs.Binary("none"), bs.Int(8, 8)], MockTarget())
    row = next(row for row in found.rows if row.site == "left" and row.technique == bs.Binary("none"))
    assert "profile(trained=[Binary(scaling='none')])" in row.refused
    assert row.bytes == 8 * 8 * 9 / 8


def test_a_profile_scores_it_where_the_weights_were_trained_under_it() -> None:
    found = bs.profile(small(), task(), [bs.Int(8, 8)], MockTarget(), trained=[bs.Binary("none")])
    row = next(row for row in found.rows if row.site == "left" and row.technique == bs.Binary("none"))
    assert not row.refused
    assert row.loss > 0
    assert found.notes["trained"].startswith("Binary(scaling='none'): scored with the weights as they were given")
    assert "trained" not in bs.profile(small(), task(), [bs.Int(8, 8)], MockTarget()).notes


def test_what_it_does_not_fit() -> None:
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(F.linear(x, 2 * self.w))

    sites = bs.sites(Computed(), torch.randn(2, 4))
    linear = next(site for site in sites.values() if site.kind == "linear")
    relu = next(site for site in sites.values() if site.kind == "relu")
    assert "computed from parameters" in str(bs.Binary().fits(linear))
    assert bs.Binary(clip_weights="never").fits(linear) is True
    assert "no convolution" in str(bs.Binary().fits(relu))


@pytest.mark.parametrize(
    "values", [{"scaling": "mean"}, {"cancel_gradient": 1.5}, {"clip_weights": True}, {"error_rate": -0.1}]
)
def test_wrong_values_say_what_is_possible(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Binary\\({next(iter(values))}="):
        bs.Binary(**values)


def test_bits() -> None:
    site = bs.sites(small(), batches(1)[0][0])["left"]
    assert bs.Binary("none").bits(site) == 576
    assert bs.Binary().bits(site) == bs.Binary("learned").bits(site) == 576 + 8 * 32


def test_the_native_kernel_computes_what_is_simulated() -> None:
    kernels = pytest.importorskip("bitsmith_kernels")
    if not hasattr(kernels, "BinaryLinear"):
        pytest.skip("these bitsmith_kernels have no products of one bit")
    layer = nn.Linear(100, 30, bias=False).eval()
    x = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    net = applied(layer, bs.Binary("none", activations=True), x)
    with torch.no_grad():
        wanted = net(x).numpy()
    for isa in kernels.binary_isas():
        np.testing.assert_array_equal(kernels.BinaryLinear(layer.weight.detach().numpy(), isa=isa)(x.numpy()), wanted)
