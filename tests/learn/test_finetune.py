"""Fine-tuning: what it recovers, what it calls, what it leaves alone, and that a seed decides everything."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.learn.finetune import divergence
from bitsmith.model.apply import computer_of
from smallnet import batches, small

WIDTH = 12
PLACES = ("0", "2", "4", "6")


@cache
def unbalanced() -> nn.Module:
    """Four trained convolutions whose channels differ by factors, hard for tiles in 8 bits: the same function."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for inputs in (3, WIDTH, WIDTH, WIDTH):
            layers += [nn.Conv2d(inputs, WIDTH, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTH, 4))
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for x, y in batches(80, seed=1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            for place in (0, 2, 4):
                factor = torch.exp(1.5 * torch.randn(WIDTH))
                model[place].weight.mul_(factor.view(-1, 1, 1, 1))
                model[place].bias.mul_(factor)
                model[place + 2].weight.div_(factor.view(1, -1, 1, 1))
    return model.eval()


def lost(net: nn.Module) -> tuple[float, float]:
    """Divergence from the float network in nats, and accuracy, on 480 samples that nothing was trained on."""
    with torch.no_grad():
        pairs = [(net(x), unbalanced()(x), y) for x, y in batches(30, seed=2)]
    ours, theirs, classes = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    return float(divergence(ours, theirs)), float((ours.argmax(1) == classes).float().mean())


@pytest.mark.parametrize("technique", [bs.Winograd(6), bs.Winograd(6, transforms="flex")], ids=repr)
def test_training_recovers_most_of_what_six_outputs_lose_in_8_bits(technique: bs.Technique) -> None:
    """The median of three: the last steps of one short training may move its divergence tenfold either way."""

    def left(seed: int) -> float:
        data = batches(60, seed=seed)
        net = bs.apply(unbalanced(), bs.Plan(dict.fromkeys(PLACES, technique)), data[:4])
        before, accuracy = lost(net)
        assert before > 0.1
        after, better = lost(bs.finetune(net, data, steps=60, teacher=unbalanced(), lr=1e-3))
        assert better > accuracy
        return after / before

    assert statistics.median(left(seed) for seed in (1, 11, 12)) < 0.25


def test_a_loss_alone_and_an_ordinary_model() -> None:
    model, data = small(steps=5), batches(40, seed=7)
    trained = bs.finetune(model, data, F.cross_entropy, steps=60, lr=0.01, freeze_norms=False)

    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            return sum(float(F.cross_entropy(net(x), y)) for x, y in batches(4, seed=8))

    assert loss(trained) < 0.5 * loss(model)
    assert not trained.training


def test_nothing_given_is_changed_and_the_seed_decides() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.drop = small(), nn.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(self.drop(x))
            return logits

    model, data = Dropping().eval(), batches(8)
    dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*data, strict=True)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    net = bs.apply(model, bs.Plan({"net.left": bs.Winograd()}), data)
    states = [{name: value.clone() for name, value in module.state_dict().items()} for module in (net, model)]
    noise = torch.get_rng_state()
    results = [
        bs.finetune(net, loader, F.cross_entropy, steps=5, teacher=model, seed=seed, lr=1e-3).state_dict()
        for seed in (3, 3, 4)
    ]
    assert torch.equal(noise, torch.get_rng_state())
    for module, state in zip((net, model), states, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert not all(torch.equal(value, results[2][name]) for name, value in results[0].items())
    assert bs.plan_of(net).sites == {"net.left": bs.Winograd()}


def test_norms_keep_their_statistics_unless_asked() -> None:
    model, data = small(), batches(4)
    net = bs.apply(model, bs.Plan({"left": bs.Winograd(2, 16)}), data)
    frozen = bs.finetune(net, data, F.cross_entropy, steps=3)
    usual = bs.finetune(net, data, F.cross_entropy, steps=3, freeze_norms=False)
    assert torch.equal(frozen.norm.running_mean, model.norm.running_mean)
    assert not torch.equal(usual.norm.running_mean, model.norm.running_mean)
    assert not torch.equal(frozen.norm.weight, model.norm.weight)
    again = bs.finetune(net.train(), data, F.cross_entropy, steps=1)
    assert again.training
    assert again.norm.training


@dataclass(frozen=True)
class Told(bs.Technique):
    """Notes what training calls, and settles on another value (a test)."""

    value: int = 0

    def fits(self, site: bs.Site) -> bool:
        return site.kind == "conv2d"

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return ToldCell(site)


class ToldCell(bs.Cell):
    def __init__(self, site: bs.Site) -> None:
        super().__init__(site)
        self.calls: list[Any] = []
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, *operands: Tensor, **rest: Any) -> Any:
        return self.op(*operands, **rest) * self.gate

    def step(self, done: int, total: int) -> None:
        self.calls.append((done, total))

    def reset(self) -> None:
        self.calls.append("reset")

    def penalty(self) -> Tensor:
        return 100 * self.gate.square()

    def settle(self) -> bs.Technique:
        return Told(7)


def test_cells_are_told_of_every_step_and_settle() -> None:
    data = batches(2)
    plan = bs.Plan({"left": Told(), "right": bs.Int(8, 8)})
    net = bs.apply(small(), plan, data)
    trained = bs.finetune(net, data, F.cross_entropy, steps=3, lr=0.01)
    cell = computer_of(trained).cells["left"]
    assert cell.calls == [(0, 3), "reset", (1, 3), "reset", (2, 3), "reset"]
    assert float(cell.gate.detach()) < 0.99  # the penalty pulls
    assert bs.plan_of(trained).sites == {"left": Told(7), "right": bs.Int(8, 8)}
    assert bs.plan_of(net).sites == plan.sites


def test_progress_is_told() -> None:
    class Steps:
        def __init__(self) -> None:
            self.total: int | None = None
            self.done = 0

        def start(self, task: str, total: int | None = None) -> None:
            self.total = total

        def advance(self, steps: int = 1) -> None:
            self.done += steps

        def note(self, text: str) -> None:
            return None

    progress = Steps()
    bs.finetune(small(), batches(2), F.cross_entropy, steps=5, progress=progress)
    assert (progress.total, progress.done) == (5, 5)


def test_an_optimizer_of_ones_own() -> None:
    given: list[Any] = []

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        given.extend(parameters)
        return torch.optim.SGD(parameters, 0.0)

    model = small()
    trained = bs.finetune(model, batches(1), F.cross_entropy, steps=2, optimizer=make)
    assert len(given) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True))


def test_what_cannot_be_trained_says_so() -> None:
    model, data = small(), batches(1)
    with pytest.raises(ValueError, match=r"steps=0"):
        bs.finetune(model, data, F.cross_entropy, steps=0)
    with pytest.raises(ValueError, match=r"a teacher, or both"):
        bs.finetune(model, data, steps=1)
    with pytest.raises(bs.TrainingError, match=r"no parameter"):
        bs.finetune(nn.Sequential(nn.ReLU()), [(torch.ones(1, 2), torch.zeros(1))], F.mse_loss, steps=1)
    with pytest.raises(bs.TrainingError, match=r"nan at step 1 of 2; a smaller lr"):
        bs.finetune(model, data, lambda output, target: output.sum() * float("nan"), steps=2)
    with pytest.raises(bs.DataError, match="training loader is empty"):
        bs.finetune(model, [], F.cross_entropy, steps=1)


def test_divergence_is_that_of_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 4, generator=generator), torch.randn(5, 4, generator=generator)
    p, q = b.double().softmax(1), a.double().softmax(1)
    assert float(divergence(a, b)) == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert float(divergence((a, a), (b, b))) == pytest.approx(2 * float(divergence(a, b)), rel=1e-6)
