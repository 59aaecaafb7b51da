"""An applied net is an ordinary module: state, copies, gradients, devices of torch, and an untouched original."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitsmith.data import ModelRunError
from bitsmith.model.apply import additions_of, apply, computer_of, materialised, plan_of
from bitsmith.model.calibrate import CalibrationError
from bitsmith.model.intercept import InterceptionError
from bitsmith.model.network import sites
from bitsmith.plan import Plan
from bitsmith.site import Format, Record, Site, UnknownSiteError
from bitsmith.technique import Cell, No, Technique
from bitsmith.techniques.float_ import Float
from bitsmith.techniques.int_ import Int


class Net(nn.Module):
    """A residual block and a head; ``predict`` is the user's own method."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv1(x)))
        z = F.relu(self.conv2(y) + y)
        return self.head(z.mean((2, 3)))

    def predict(self, x: Tensor) -> Tensor:
        return self(x).argmax(1)


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def trained() -> Net:
    torch.manual_seed(0)
    net = Net().train()
    net(images(32, 9))  # running statistics
    return net.eval()


def everything(model: nn.Module, x: Any, technique: Technique | None = None) -> Plan:
    return Plan({name: technique or Int(8, 8) for name, site in sites(model, x).items() if site.role == "integer"})


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    model, x = trained(), images()
    return model, apply(model, everything(model, x), [(x, None)]), x


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "versions": {k: v._version for k, v in (*model.named_parameters(), *model.named_buffers())},
        "training": {n: m.training for n, m in model.named_modules()},
        "grad": {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()},
        "hooks": {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
        "rng": torch.get_rng_state(),
    }


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_untouched(training: bool) -> None:
    model, x = trained().train(training), images()
    model.norm.eval()
    model.head.bias.requires_grad_(False)
    before = state_of(model)
    net = apply(model, everything(model, x), [(x, None)])
    with torch.no_grad():
        net(x)
        materialised(net, lambda n: n(x))
    after = state_of(model)
    for key in ("versions", "training", "grad", "hooks", "attributes"):
        assert after[key] == before[key], key
    assert all(torch.equal(a, b) for a, b in zip(before["state"].values(), after["state"].values(), strict=True))
    assert torch.equal(before["rng"], after["rng"])
    assert net.training == training
    assert not net.norm.training
    assert not net.head.bias.requires_grad


def test_state_dict_keeps_the_models_keys_and_round_trips(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, net, x = pair
    keys = list(net.state_dict())
    assert [k for k in keys if not k.startswith("_bitsmith.")] == list(model.state_dict())
    other = trained()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    fresh = apply(other, plan_of(net), [(images(4, 3), None)])
    with torch.no_grad():
        assert not torch.equal(fresh(x), net(x))
        fresh.load_state_dict(net.state_dict())
        assert torch.equal(fresh(x), net(x))


def test_empty_plan_and_float_plan_are_bitwise_the_model() -> None:
    model, x = trained(), images()
    with torch.no_grad():
        assert torch.equal(apply(model, Plan({}), [(x, None)])(x), model(x))
        floating = Plan({name: Float() for name in sites(model, x)})
        assert torch.equal(apply(model, floating, [(x, None)])(x), model(x))


def test_deepcopy_is_independent(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, x = pair
    with torch.no_grad():
        expected = net(x)
        other = copy.deepcopy(net)
        assert torch.equal(other(x), expected)
        other.conv1.weight.mul_(2.0)
        assert not torch.equal(other(x), expected)
        assert torch.equal(net(x), expected)
    assert computer_of(other).locator is computer_of(net).locator
    assert computer_of(other).record_sites is computer_of(net).record_sites
    assert computer_of(other).cells["conv1"] is additions_of(other).cells["conv1"]
    assert computer_of(other).cells["conv1"] is not computer_of(net).cells["conv1"]
    assert computer_of(other).folded["norm"] is other.norm


def test_methods_of_the_user(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, x = pair
    with torch.no_grad():
        assert torch.equal(net.predict(x), net(x).argmax(1))
        assert isinstance(net, Net)


def test_weights_changed_later_are_seen(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, x = pair
    with torch.no_grad():
        before = net(x)
        net.conv1.weight.add_(0.1)
        middle = net(x)
        assert not torch.equal(before, middle)
        net.conv1.weight.data = net.conv1.weight.data - 0.1
        assert not torch.equal(net(x), middle)
        net.norm.running_mean.add_(1.0)
        assert not torch.equal(net(x), before)


def test_gradients_train_the_net(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, x = pair
    net.train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    target = torch.tensor([0, 1, 2, 3])
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.85 * losses[0]
    assert all(p.grad is not None for p in net.parameters())


def test_straight_through_gradient_at_fine_resolution() -> None:
    """With 16-bit activations and 8-bit weights the gradient is nearly that of the float model."""
    model, x = trained(), images()
    net = apply(model, everything(model, x, Int(8, 16)), [(x, None)])
    for m in (model, net):
        m(x).square().sum().backward()
    ours = {k: p.grad for k, p in net.named_parameters()}
    for key, p in model.named_parameters():
        ratio = (ours[key] - p.grad).norm() / p.grad.norm().clamp_min(1e-3)
        assert ratio < 0.1, (key, float(ratio))
    model.zero_grad()


def test_batch_norm_in_training_is_the_models() -> None:
    model, x = trained(), images(16)
    net = apply(model, Plan({"conv2": Int(8, 8)}), [(x, None)])
    floating = copy.deepcopy(model).train()
    net.train()
    floating(x)
    net(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(net.norm, key), getattr(floating.norm, key)), key
    folded = apply(model, Plan({"conv1": Int(8, 8)}), [(x, None)]).train()
    folded(x)
    torch.testing.assert_close(folded.norm.running_mean, floating.norm.running_mean, rtol=0.05, atol=0.01)
    assert int(folded.norm.num_batches_tracked) == int(floating.norm.num_batches_tracked)


def test_unread_parameters_do_not_train() -> None:
    @dataclasses.dataclass(frozen=True)
    class Ones(Technique):
        """Weights of ones."""

        def fits(self, site: Site) -> bool | No:
            return site.kind == "linear"

        def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
            return _Ones(site)

    model, x = trained(), images()
    net = apply(model, Plan({"head": Ones()}), [(x, None)])
    assert not net.head.weight.requires_grad
    assert net.head.bias.requires_grad
    assert net.conv1.weight.requires_grad
    assert model.head.weight.requires_grad
    net(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


class _Ones(Cell):
    needs = ("input", "bias")

    def forward(self, x: Tensor, weight: Tensor, **rest: Any) -> Tensor:
        out: Tensor = self.op(x, torch.ones_like(weight), **rest)
        return out


def test_autocast(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, net, x = pair
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        torch.testing.assert_close(out.float(), model(x).float(), rtol=0.1, atol=0.1)
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = net(x).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in net.parameters())


def test_float64_says_what_to_do(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, x = pair
    with pytest.raises(TypeError, match=r"float\(\)"):
        net.double()(x.double())
    with torch.no_grad():
        assert net.float()(x).dtype == torch.float32


def test_four_threads(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, _ = pair
    batches = [images(4, seed) for seed in range(4)]
    with torch.no_grad():
        expected = [net(x) for x in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                if not torch.equal(net(batches[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_an_error_inside_leaves_the_net_usable(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, x = pair
    with torch.no_grad():
        expected = net(x)
        with pytest.raises(RuntimeError):
            net(torch.randn(1, 5, 8, 8))
        assert torch.equal(net(x), expected)
        with pytest.raises(RuntimeError):
            net.conv1(torch.randn(1, 5, 8, 8))
        assert torch.equal(net(x), expected)


def test_submodules_can_be_called_alone(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, net, x = pair
    with torch.no_grad():
        alone = net.conv1(x)
    assert not torch.equal(alone, model.conv1(x))
    assert (alone - model.norm(model.conv1(x))).abs().max() < 0.1  # with the normalisation that it absorbed


def test_data_parallel_training(pair: tuple[nn.Module, nn.Module, Tensor], tmp_path: Any) -> None:
    _, net, x = pair
    other = copy.deepcopy(net)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(net.train())
        parallel(x).square().sum().backward()
        other.train()(x).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)


def test_sequential_and_module_list_roots() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    net = apply(model, Plan({"0": Int(8, 8), "2": Int(8, 8)}), [(x, None)])
    with torch.no_grad():
        torch.testing.assert_close(net(x), model(x), rtol=0.1, atol=0.05)
        assert not torch.equal(net(x), model(x))

    class Layers(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self:
                x = layer(x)
            return x

    stack = Layers([nn.Linear(6, 6), nn.Linear(6, 2)]).eval()
    planned = apply(stack, Plan({"0": Int(8, 8), "1": Int(8, 8)}), [(x, None)])
    with torch.no_grad():
        torch.testing.assert_close(planned(x), stack(x), rtol=0.1, atol=0.05)
        assert not torch.equal(planned(x), stack(x))


# -- activation checkpointing ------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.a(x))) + x)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None, function: bool = False) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(6, 6), Block(), nn.Linear(6, 2)
        self.reentrant, self.function = reentrant, function

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.reentrant is None:
            y = self.block(x)
        elif self.function:
            y = checkpoint(self._run, x, use_reentrant=self.reentrant)
        else:
            y = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(y)

    def _run(self, x: Tensor) -> Tensor:
        return self.block(x) + x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_module_has_the_same_gradients(reentrant: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    plain, checkpointed = Checkpointed(None), Checkpointed(reentrant)
    checkpointed.load_state_dict(plain.state_dict())
    nets = [apply(m, everything(m, x, Int(3, 3)), [(x, None)]).train() for m in (plain, checkpointed)]
    outputs = [net(x) for net in nets]
    assert torch.equal(outputs[0], outputs[1])
    for out in outputs:
        out.square().sum().backward()
    floating = copy.deepcopy(plain)
    floating(x).square().sum().backward()
    differs = False
    for (key, p), q, f in zip(nets[0].named_parameters(), nets[1].parameters(), floating.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-7, msg=key)
        differs |= not torch.allclose(p.grad, f.grad, rtol=1e-3)
    assert differs


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_function_is_an_error(reentrant: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = Checkpointed(reentrant, function=True)
    net = apply(model, Plan({":add": Int(8, 8)}), [(x, None)])
    with torch.no_grad():
        assert net(x).shape == (8, 2)
    net.train()
    with pytest.raises(InterceptionError, match="checkpoint a module instead"):
        net(x)
    inside = apply(model, Plan({"block.a": Int(8, 8)}), [(x, None)]).train()
    inside(x).sum().backward()
    assert inside.block.a.weight.grad is not None


# -- a whole module as a site ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Halved(Technique):
    """Half of what the module computes."""

    def fits(self, site: Site) -> bool | No:
        return site.kind == "module" or No("only whole modules")

    def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
        return _Halved(site)

    def writes(self, site: Site) -> Format | None:
        return Format(8)


class _Halved(Cell):
    def forward(self, *args: Any, inner: Callable[..., Any], **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        return {k: v / 2 for k, v in output.items()} if isinstance(output, dict) else output / 2


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.block(x)}


def test_module_level_site() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = Checkpointed(None).eval()
    net = apply(model, Plan({"block": Halved()}), [(x, None)])
    assert list(computer_of(net).record_sites) == ["first", "block", "head"]
    site = computer_of(net).record_sites["block"]
    assert (site.kind, site.macs, site.calls) == ("module", 2 * 8 * 36, 1)
    seen: list[Tensor] = []
    net.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        net(x)
        expected = model.block(model.first(x)) / 2
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=float(expected.max()) / 50)
    assert len(seen[0].unique()) <= 256
    with pytest.raises(Exception, match="inside it"):
        Plan({"block": Halved(), "block:add": Int(8, 8)})


def test_module_level_site_with_a_mapping() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6)

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = Mapped(), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(x)["y"])

    model = Root().eval()
    net = apply(model, Plan({"inner": Halved(), "head": Int(8, 8)}), [(x, None)])
    with torch.no_grad():
        torch.testing.assert_close(net(x), model.head(model.inner(x)["y"] / 2), rtol=0.1, atol=0.05)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_unknown_site_offers_the_closest() -> None:
    model, x = trained(), images()
    with pytest.raises(UnknownSiteError, match="closest: conv1"):
        apply(model, Plan({"conv11": Int()}), [(x, None)])


def test_a_technique_that_does_not_fit() -> None:
    model, x = trained(), images()
    with pytest.raises(ValueError, match=r"norm.*computed in float"):
        apply(model, Plan({"norm": Int()}), [(x, None)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite(bad: float) -> None:
    model, x = trained(), images()
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.conv2.weight[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"conv2\.weight"):
        apply(broken, everything(model, x), [(x, None)])
    wrong = x.clone()
    wrong[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match="@x"):
        apply(model, everything(model, x), [(x, None), (wrong, None)])


def test_a_model_that_fails_on_the_example() -> None:
    model = trained()
    with pytest.raises(ModelRunError, match=r"(?s)Net\.forward.*Tensor\[4, 5, 8, 8\]"):
        apply(model, Plan({}), [(torch.randn(4, 5, 8, 8), None)])
    with pytest.raises(ModelRunError, match="float64"):
        apply(model, Plan({}), [(images().double(), None)])


def test_an_applied_net_is_refused(pair: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, net, x = pair
    with pytest.raises(InterceptionError, match="already carries a plan"):
        apply(net, Plan({}), [(x, None)])
    with pytest.raises(InterceptionError, match="carries no plan"):
        additions_of(trained())


def test_calibration_that_takes_another_branch() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, use: Tensor) -> Tensor:
            return self.a(x) if bool(use) else self.b(x)

    model, x = Branch(), torch.randn(2, 6)
    plan = Plan({"a": Int(8, 8, out=Format(8))})
    yes, no = ((x, torch.tensor(flag)) for flag in (True, False))
    net = apply(model, plan, [(yes, None), (no, None)])
    with torch.no_grad():
        assert torch.equal(net(*no), model(*no))
        assert materialised(net, lambda n: n(*no))(*no).shape == (2, 6)
    with pytest.raises(UnknownSiteError):
        apply(model, plan, [(no, None), (yes, None)])


def test_quantizers_that_are_shared_forget_between_forwards() -> None:
    """Memory under the input may be rewritten behind torch's back (a NumPy buffer): the next forward must see it."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    array = torch.randn(4, 6).numpy()
    x = torch.from_numpy(array)
    net = apply(Two().eval(), Plan(dict.fromkeys(["a", "b"], Int(8, 8))), [(x, None)])
    (shared,) = (part for part in computer_of(net).resets if part.shared)
    assert shared is computer_of(net).cells["a"].quantizers[0] is computer_of(net).cells["b"].quantizers[0]
    with torch.no_grad():
        before = net(x)
        array *= 0.5
        after = net(x)
        assert not torch.equal(before, after)
        assert torch.equal(after, net(x.clone()))
        other = copy.deepcopy(net)
        assert computer_of(other).resets[0] is computer_of(other).cells["a"].quantizers[0]


def test_cells_are_reset_once_for_each_top_level_forward() -> None:
    @dataclasses.dataclass(frozen=True)
    class Counted(Technique):
        """Counts its resets."""

        def fits(self, site: Site) -> bool | No:
            return True

        def build(self, site: Site, record: Record, rng: torch.Generator) -> Cell:
            return _Counted(site)

    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            return self(self.a(x), depth - 1) if depth else self.a(x)

    x = torch.randn(2, 6)
    net = apply(Recursive().eval(), Plan({"a": Counted()}), [(x, None)])
    cell = computer_of(net).cells["a"]
    net(x)
    net(x)
    assert (cell.resets, cell.calls) == (2, 6)


class _Counted(Cell):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.resets = self.calls = 0

    def reset(self) -> None:
        self.resets += 1

    def forward(self, *operands: Any, **rest: Any) -> Any:
        self.calls += 1
        return self.op(*operands, **rest)
