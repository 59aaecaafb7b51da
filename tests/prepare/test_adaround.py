"""AdaRound against the paper's equations in float64; the integers it chose all the way into the exported file."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.model.apply import additions_of, build, materialised
from bitsmith.model.keys import encode_key
from bitsmith.model.network import Network, network
from bitsmith.prepare._layers import layers
from bitsmith.prepare._sequential import Matrix, Problem, Rounded, patches, positions, spread
from bitsmith.prepare.adaround import AdaRound, _Rounding, descend, output_error
from bitsmith.site import Format
from bitsmith.targets import OnnxRuntime
from bitsmith.technique import PrepareError
from smallnet import batches, small

LOW = bs.Int(3, 8)
SHORT = AdaRound(iterations=100, rows=1024, batch=128)


def problem(seed: int, out: int = 6, width: int = 10, rows: int = 64, relu: bool = True, bits: int = 3) -> Problem:
    """A linear layer whose inputs, correlated as those of images are, differ from the float network's by noise."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) / width**0.5 + torch.ones(width, width) / width
    original = torch.randn(1, rows, width, generator=generator) @ mixing
    x = original + 0.05 * torch.randn(1, rows, width, generator=generator)
    weight, bias = torch.randn(1, out, width, generator=generator), torch.randn(1, out, generator=generator)
    layer = layers(network(nn.Linear(width, out), original[0]).record)[":linear"]
    # no weight lies on a level exactly, where float32 and float64 round another way
    scale = 1.01 * weight.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    limits = (0.0, float("inf")) if relu else None
    fmt = Format(bits, signed=True, symmetric=True)
    matrix = Matrix(layer, weight, scale, torch.zeros_like(scale), bias, limits, fmt)
    return Problem(matrix, x, torch.baddbmm(bias[:, None], original, weight.mT))


def objective(task: Problem, integers: Tensor) -> float:
    """Eq. 25 without its regularisation, in float64."""
    matrix = task.matrix
    y = task.x[0].double() @ (integers[0].double() * matrix.scale[0].double()).T + matrix.bias[0].double()
    goal = task.target[0].double()
    if matrix.limits is not None:
        y, goal = F.relu(y), F.relu(goal)
    return float((y - goal).square().sum(1).mean())


# -- the relaxation ----------------------------------------------------------------------------------------------


def test_the_learned_rounding_follows_the_equations_in_float64() -> None:
    """Eq. 22 to 25 by autograd and torch's own Adam, both phases, against the updates that are written out."""
    task = problem(0)
    matrix, steps, warm = task.matrix, 60, 20
    least = objective(task, matrix.nearest)
    x, goal = task.x[0].double(), F.relu(task.target[0].double())
    scale, bias = matrix.scale[0].double(), matrix.bias[0].double()
    down = torch.floor(matrix.weight[0].double() / scale).clamp(-4, 2)
    rest = (matrix.weight[0].double() / scale - down).clamp(0, 1)
    v = torch.log((rest + 0.1) / (1.1 - rest)).requires_grad_()
    adam = torch.optim.Adam([v], lr=0.02, eps=1e-12)
    rounding = _Rounding(matrix)
    for step in range(steps):
        h = torch.clip(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)
        y = F.relu(x @ (scale * (down + h)).T + bias)
        loss = (y - goal).square().sum(1).mean() / least
        beta = None if step < warm else 20 - 18 * (step - warm) / (steps - warm)
        if beta is not None:
            loss = loss + 0.5 * (1 - (2 * h - 1).abs() ** beta).mean()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]

        soft = torch.baddbmm(matrix.bias[:, None], task.x, rounding.weight.mT)
        off = (soft.clamp_min(0) - task.target.clamp_min(0)) * (soft > 0)
        gradient = torch.bmm(off.mT, task.x) * (2 / (task.x.shape[1] * least))
        rounding.update(gradient, step + 1, 0.02, 0.5 / matrix.weight.numel(), beta)
        adam.step()
    torch.testing.assert_close(rounding.v.view_as(v), v.detach().float(), atol=2e-3, rtol=2e-3)
    assert (rounding.v.view_as(v) - torch.log((rest + 0.1) / (1.1 - rest))).abs().max() > 0.3  # it moved


def test_every_rounding_ends_down_or_up() -> None:
    task = problem(1)
    integers, scale, _ = AdaRound(iterations=300, batch=32)._solve(task)
    down = torch.floor(task.matrix.weight / task.matrix.scale).clamp(-4, 2)
    assert set(torch.unique(integers - down).tolist()) <= {0.0, 1.0}
    assert torch.equal(scale, task.matrix.scale)


@pytest.mark.parametrize("method", ["relaxation", "descent"])
def test_the_objective_falls_and_comes_near_the_best_there_is(method: Any) -> None:
    """More than half of what the best of 2^8 roundings gains over nearest, over twelve layers of one output."""
    totals = np.zeros(3)
    for seed in range(12):
        task = problem(seed, out=1, width=8, relu=False)
        nearest = objective(task, task.matrix.nearest)
        down = torch.floor(task.matrix.weight / task.matrix.scale).clamp(-4, 2)
        choices = [down + torch.tensor(up, dtype=torch.float32) for up in itertools.product((0, 1), repeat=8)]
        best = min(objective(task, choice) for choice in choices)
        found = objective(task, AdaRound(iterations=300, batch=64, method=method)._solve(task)[0])
        assert found <= nearest * (1 + 1e-6)
        totals += nearest, found, best
    assert totals[0] - totals[1] > 0.5 * (totals[0] - totals[2])


def test_nearest_is_kept_where_it_is_exact() -> None:
    task = problem(2)
    integers = torch.randint(-3, 4, task.matrix.weight.shape).float()
    integers[..., 0] = 3.0
    exact = dataclasses.replace(task.matrix, weight=integers * 0.25, scale=torch.full((1, 6, 1), 0.25), limits=None)
    target = torch.baddbmm(exact.bias[:, None], task.x, exact.weight.mT)
    assert torch.equal(SHORT._solve(Problem(exact, task.x, target))[0], integers)


def test_the_error_is_that_of_the_output_behind_the_activation() -> None:
    for relu in (True, False):
        task = problem(3, relu=relu)
        assert output_error(task, task.matrix.nearest) == pytest.approx(objective(task, task.matrix.nearest), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), width=st.integers(1, 150), bits=st.integers(2, 4))
def test_descent_ends_where_no_single_change_helps(seed: int, width: int, bits: int) -> None:
    task = problem(seed, out=2, width=width, rows=40, relu=False, bits=bits)
    found = descend(task, 200)
    low, high = task.matrix.format.levels
    assert low <= found.min()
    assert found.max() <= high
    x, weight, scale = (t[0].double() for t in (task.x, task.matrix.weight, task.matrix.scale))
    gram = x.T @ x
    gram += 0.01 * gram.diagonal().mean() * torch.eye(width)
    offset = (x @ weight.T + task.matrix.bias[0] - task.target[0].double()).T @ x

    def half(q: Tensor) -> Tensor:
        """The damped objective of each row, up to a constant."""
        off = q.double() * scale - weight
        return ((off @ gram) * off).sum(1) / 2 + (off * offset).sum(1)

    # two hundred sweeps end by themselves; one weight in ten thousand is none here
    at = half(found[0])
    for k in range(width):
        for change in (-1.0, 1.0):
            other = found[0].clone()
            other[:, k] = (other[:, k] + change).clamp(low, high)
            assert (half(other) >= at - 1e-4 * at.abs() - 1e-6).all()


# -- rows of a layer's input -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    dilation=st.integers(1, 2),
    share=st.sampled_from([0.3, 2.0]),
)
def test_patches_times_weights_are_the_convolution(
    dims: int, groups: int, kernel: int, stride: int, padding: Any, dilation: int, share: float
) -> None:
    torch.manual_seed(0)
    if padding == "same":  # torch warns of even kernels there
        stride, kernel = 1, kernel // 2 * 2 + 1
    kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    conv = kind(4, 8, kernel, stride, padding, dilation, groups)
    x = torch.randn(3, 4, *range(6, 6 + dims))
    site = network(conv, x).record.sites[f":conv{dims}d"]
    want = conv(x).detach().movedim(1, -1).reshape(-1, 8)
    at = positions(site, x, int(share * len(want)) + 1, torch.Generator().manual_seed(1))
    assert len(torch.unique(at)) == len(at) == min(len(want), int(share * len(want)) + 1)
    rows = patches(site, x, at)
    got = torch.bmm(rows, conv.weight.detach().reshape(groups, 8 // groups, -1).mT).transpose(0, 1).reshape(-1, 8)
    torch.testing.assert_close(got + conv.bias.detach(), want[at], atol=1e-5, rtol=1e-5)


# -- in a network ------------------------------------------------------------------------------------------------


def low_plan(model: nn.Module, x: Any, technique: bs.Technique = LOW) -> bs.Plan:
    found = bs.sites(model, x).values()
    return bs.Plan({site.name: technique for site in found if technique.fits(site)})


def distance(net: nn.Module, model: nn.Module, data: Any) -> float:
    with torch.no_grad():
        return sum(float((net(x) - model(x)).square().sum()) for x, _ in data)


def test_a_network_comes_closer_to_float_and_stays_untouched() -> None:
    model, data, fresh = small(), batches(4, seed=2), batches(8, seed=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = low_plan(model, data[0][0])
    nearest = distance(bs.apply(model, plan, data), model, fresh)
    for step in (SHORT, AdaRound(method="descent")):
        net = bs.apply(model, plan.replace(prepare=(step,)), data)
        assert distance(net, model, fresh) < 0.6 * nearest
        again = bs.apply(model, plan.replace(prepare=(step,)), data)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert bs.Plan.from_json(plan.replace(prepare=(SHORT,)).to_json()).prepare == (SHORT,)


class Recorded:
    """What a step chose for each site."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: type) -> None:
        self.chosen: dict[str, Tensor] = {}
        solve = step._solve  # type: ignore[attr-defined]

        def recording(this: Any, task: Problem) -> Rounded:
            rounded: Rounded = solve(this, task)
            self.chosen[task.matrix.layer.site.name] = rounded.integers + spread(
                rounded.zero, rounded.integers.shape[-1]
            )
            return rounded

        monkeypatch.setattr(step, "_solve", recording)


def assert_ships(net: nn.Module, chosen: dict[str, Tensor], x: Any) -> None:
    """The cells of the materialised network hold exactly those integers."""
    shipped = additions_of(materialised(net, lambda replica: replica(x))).cells
    for name, integers in chosen.items():
        buffers = dict(shipped[encode_key(name)].named_buffers())
        held = buffers.get("weight_q", buffers.get("weight_q4"))
        assert held is not None
        assert torch.equal(held.reshape(integers.shape).float(), integers), name


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("weight_bits", [2, 4, 8])
def test_the_chosen_integers_are_shipped(
    granularity: Any, weight_bits: int, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = small(), batches(2, seed=2)
    with torch.no_grad():  # a normalisation with a dead channel, a negative and a tiny one
        model.norm.weight[:3] = torch.tensor([0.0, -0.7, 1e-4])
    recorded = Recorded(monkeypatch, AdaRound)
    technique = bs.Int(weight_bits, 8, granularity=granularity, affine_weights=affine)
    net = bs.apply(model, low_plan(model, data[0][0], technique).replace(prepare=(SHORT,)), data)
    assert set(recorded.chosen) == {"stem", "left", "right", "head"}
    assert_ships(net, recorded.chosen, data[0][0])
    nearest = bs.apply(model, low_plan(model, data[0][0], technique), data)
    for name in recorded.chosen:
        ours, plain = (additions_of(n).cells[encode_key(name)].get_buffer("weight_scale") for n in (net, nearest))
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)


def test_symmetric_reconstruction_leaves_the_drift_of_the_inputs_alone() -> None:
    for seed in range(5):
        task = problem(seed, rows=256, relu=False)
        own = Problem(task.matrix, task.x, torch.baddbmm(task.matrix.bias[:, None], task.x, task.matrix.weight.mT))
        step = AdaRound(iterations=200, batch=64, asymmetric=False)
        found = step._solve(Problem(task.matrix, task.x, torch.empty(0)))  # the float network is not asked
        assert torch.equal(found.integers, step._solve(task).integers)
        assert objective(own, found.integers) < objective(own, task.matrix.nearest)
    model, data = small(), batches(2, seed=2)
    plan = low_plan(model, data[0][0], LOW)
    one, other = (
        bs.apply(model, plan.replace(prepare=(dataclasses.replace(SHORT, asymmetric=asked),)), data).state_dict()
        for asked in (True, False)
    )
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_exported_file_computes_the_same(tmp_path: Path) -> None:
    model, data, target = small(), batches(2, seed=2), OnnxRuntime()
    net = network(model, data[0][0])
    plan = target.adapt(low_plan(model, data[0][0], bs.Int(4, 8)), net.record).replace(prepare=(SHORT,))
    applied = bs.apply(model, plan, data)
    x = data[1][0]
    artifact = bs.export(applied, target, tmp_path / "net.onnx", (x,), batch=len(x))
    with torch.no_grad():
        want = applied(x).numpy()
    np.testing.assert_allclose(target.run(artifact, [x.numpy()])[0], want, atol=0.02 * np.abs(want).max())


class Words(nn.Module):
    """An embedding tied to the output, a layer that is called twice, and two that are not, on a mapping of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.twice, self.once = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) * mask[..., None]
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        x = self.conv(self.once(x).mT).mT
        out: Tensor = F.linear(x, self.words.weight)
        return out


def sentences() -> list[Any]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for length in (5, 9, 7):
        ids = torch.randint(0, 11, (6, length), generator=generator)
        found.append(({"ids": ids, "mask": (ids > 1).float()}, torch.zeros(6)))
    return found


def words() -> Words:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Words().eval()


def test_shared_weights_and_repeated_layers_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = words(), sentences()
    plan = low_plan(model, data[0][0])
    assert {"words", "twice", ":linear"} <= set(plan.sites)
    recorded = Recorded(monkeypatch, AdaRound)
    net = bs.apply(model, plan.replace(prepare=(SHORT,)), data)
    assert set(recorded.chosen) == {"once", "conv"}
    plain, state = model.state_dict(), net.state_dict()
    assert {name for name in plain if not torch.equal(plain[name], state[name])} == {"once.weight", "conv.weight"}
    with torch.no_grad():
        for item, _ in data:
            assert torch.isfinite(net(**item)).all()


def prepared(model: nn.Module, plan: bs.Plan, data: Any, step: bs.Step) -> Network:
    return step.prepare(network(copy.deepcopy(model), data[0][0], names=plan.sites), plan, data)


def test_only_sites_of_integer_weights_change() -> None:
    model, data = small(), batches(2, seed=2)
    plan = bs.Plan({"stem": dataclasses.replace(LOW, affine_weights=True), "left": LOW, "right": bs.Float("bfloat16")})
    net = prepared(model, plan, data, SHORT)
    assert set(net.record.grids) == {("stem", 1), ("left", 1)}
    assert net.record.grids["stem", 1][1].any()
    assert not net.record.grids["left", 1][1].any()
    changed = {n for n, t in net.model.state_dict().items() if not torch.equal(t, model.state_dict()[n])}
    assert changed == {"stem.weight", "left.weight"}
    with pytest.raises(PrepareError, match="AdaRound: the plan puts no integer technique"):
        prepared(model, bs.Plan({"right": bs.Float("bfloat16")}), data, SHORT)


def test_what_ran_while_rounding_is_what_is_built() -> None:
    """Ranges are not chosen again behind the step, so the built network is the one that the layers were rounded in."""
    model, data = small(), batches(2, seed=2)
    plan = low_plan(model, data[0][0])
    before = build(network(model, data[0][0]), plan, data)
    net = prepared(model, plan, data, SHORT)
    after = build(net, plan, data)
    for name, tensor in before.state_dict().items():
        if "|" in name:
            assert torch.equal(tensor, after.state_dict()[name]), name


class Breaks(nn.Module):
    """Runs on every batch but the last one's mark."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        if (
            not torch.is_grad_enabled()
            and threading.current_thread() is not threading.main_thread()
            and x.shape[0] == 3
        ):
            raise RuntimeError("no such batch")
        made: Tensor = self.two(x)
        return made


def test_an_error_in_one_forward_ends_all_of_them() -> None:
    torch.manual_seed(0)
    model, before = Breaks().eval(), threading.active_count()
    data = [(torch.randn(n, 4), torch.zeros(n)) for n in (2, 4, 3, 5)]
    plan = bs.Plan({"one": LOW, "two": LOW})
    with pytest.raises(bs.ModelRunError, match="no such batch"):
        prepared(model, plan, data, SHORT)
    assert threading.active_count() == before


def test_an_interruption_ends_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(this: Any, task: Problem) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdaRound, "_solve", interrupt)
    model, data, before = small(), batches(3, seed=2), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        prepared(model, low_plan(model, data[0][0]), data, SHORT)
    assert threading.active_count() == before


def test_no_more_samples_are_run_than_asked_for() -> None:
    seen: list[int] = []

    class Loader:
        def __len__(self) -> int:
            return 4

        def __iter__(self) -> Any:
            for item in batches(4, size=16, seed=2):
                seen.append(16)
                yield item

    model = small()
    net = network(copy.deepcopy(model), batches(1)[0][0])
    plan = low_plan(model, batches(1)[0][0])
    AdaRound(iterations=2, samples=32).prepare(net, plan, Loader())
    # all four for the ranges; two, and one that is too many, for the rounding
    assert sum(seen) in (7 * 16, 8 * 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations"),
        ({"lr": 0.0}, "lr"),
        ({"reg": -1.0}, "reg"),
        ({"beta": (20.0, 0.5)}, "beta"),
        ({"warmup": 2.0}, "warmup"),
        ({"method": "magic"}, "method"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaRound(**options)
