"""The differentiable choice: its paths are plans, its gradient that of the expectation, and it weighs time and loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.learn.choice import _Choice
from bitsmith.model.apply import computer_of
from bitsmith.model.network import network
from bitsmith.model.supernet import SuperNetwork
from bitsmith.testing import MockTarget
from smallnet import Batch, batches, small, task

TRAIN, VALIDATION = batches(12, seed=5), batches(12, seed=6)
FLEX = bs.Winograd(4, transforms="flex")
WINAS = (bs.Float(), bs.Int(8, 8), bs.Winograd(2), bs.Winograd(4, 16), FLEX, bs.Winograd(6))
CONVS = ("stem", "left", "right")


def supernet(model: nn.Module, options: Mapping[str, Any], data: list[Batch] = TRAIN) -> SuperNetwork:
    return SuperNetwork(network(model, data[0][0], names=options), options, data)


def output(net: nn.Module, x: Tensor = VALIDATION[0][0]) -> Tensor:
    with torch.no_grad():
        found: Tensor = net(x)
    return found


def times(*by_technique: tuple[bs.Technique, float], sites: tuple[str, ...] = CONVS) -> dict[Any, float]:
    return {(site, technique): ms for site in sites for technique, ms in by_technique}


# -- paths -------------------------------------------------------------------------------------------------------------

PLANS = [
    dict.fromkeys(CONVS, bs.Int(8, 8)),
    dict(zip(CONVS, (bs.Float(), bs.Winograd(2), bs.Int(8, 8)), strict=True)),
    dict(zip(CONVS, (FLEX, bs.Float(), bs.Winograd(4, 16)), strict=True)),
    dict(zip(CONVS, (bs.Winograd(6), bs.Winograd(2), bs.Float()), strict=True)),
]


def test_a_path_computes_what_apply_makes_of_its_plan() -> None:
    model = small()
    paths = supernet(model, dict.fromkeys(CONVS, WINAS))
    for sites in (*PLANS, *reversed(PLANS)):
        paths.put(bs.Plan(sites))
        assert torch.equal(output(paths.module), output(bs.apply(model, bs.Plan(sites), TRAIN)))
    assert not torch.equal(output(paths.module), output(model))


def test_the_gradients_of_a_path_are_those_under_its_plan() -> None:
    model, (x, y) = small(), TRAIN[0]
    paths = supernet(model, dict.fromkeys(CONVS, WINAS))
    for sites in PLANS:
        paths.put(bs.Plan(sites))
        found = []
        for net in (paths.module, bs.apply(model, bs.Plan(sites), TRAIN)):
            weights = [net.get_parameter(name) for name, _ in model.named_parameters()]
            found.append(torch.autograd.grad(F.cross_entropy(net(x), y), weights))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("one", "other"), [(PLANS[1], PLANS[2]), (PLANS[2], PLANS[1]), (PLANS[0], PLANS[3])])
def test_a_gate_leads_from_one_path_to_another(one: dict[str, Any], other: dict[str, Any]) -> None:
    """At gate 0 the first plan, at -1 the second, site by site, whether or not they absorb the normalisation."""
    paths = supernet(small(), dict.fromkeys(CONVS, WINAS))
    for site in CONVS:
        mixed = {**one, site: other[site]}
        for gate, sites in ((0.0, one), (-1.0, mixed)):
            paths.put(bs.Plan(sites))
            wanted = output(paths.module)
            paths.put(bs.Plan(one), {site: (other[site], torch.tensor(gate))})
            torch.testing.assert_close(output(paths.module), wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(output(bs.apply(small(), bs.Plan(one), TRAIN)), wanted, rtol=1e-4, atol=1e-4)


def test_weights_are_shared_and_what_cells_learn_is_not() -> None:
    model = small()
    paths = supernet(model, dict.fromkeys(CONVS, WINAS))
    own = [cell for (_, technique), cell in paths.cells.items() if technique == FLEX]
    assert len(paths.parameters()) == len(list(model.parameters())) + 3 * len(own)
    paths.put(bs.Plan(dict.fromkeys(CONVS, bs.Winograd(2))))
    paths.module(TRAIN[0][0]).sum().backward()
    assert all(parameter.grad is None for cell in own for parameter in cell.parameters())
    assert paths.module.get_parameter("left.weight").grad is not None


# -- the logits --------------------------------------------------------------------------------------------------------


def test_expected_latency_and_cost_are_the_plain_sums() -> None:
    table = {"a": {bs.Float(): 4.0, bs.Int(8, 8): 1.0}, "b": {bs.Int(8, 8): 3.0}, "c": {bs.Int(8, 8): 2, bs.Float(): 7}}
    choice = _Choice(table, None, 0)
    with torch.no_grad():
        choice.logits["a"].copy_(torch.tensor([0.5, -1.0]))
        choice.logits["c"].copy_(torch.tensor([0.0, 2.0]))
    expected = 3.0 + (4 * math.exp(0.5) + math.exp(-1)) / (math.exp(0.5) + math.exp(-1))
    expected += (2 + 7 * math.exp(2)) / (1 + math.exp(2))
    assert float(choice.expected_ms().detach()) == pytest.approx(expected, rel=1e-6)
    assert choice.reference_ms == 4 + 3 + 2
    assert float(choice.cost(0.1, 5.0).detach()) == pytest.approx(0.1 * 5.25 + 5 * expected / 9, rel=1e-6)
    assert choice.likeliest().sites == {"a": bs.Float(), "b": bs.Int(8, 8), "c": bs.Float()}
    assert choice.probabilities()["b"] == {bs.Int(8, 8): 1.0}


def test_paths_are_drawn_from_the_probabilities() -> None:
    row = dict.fromkeys(WINAS[:4], 1.0)
    choice = _Choice({"a": row}, None, 0)
    logits = torch.tensor([1.0, 0.0, -1.0, 0.3])
    with torch.no_grad():
        choice.logits["a"].copy_(logits)
    p, draws = logits.double().softmax(0), 6000
    drawn = [choice.path().sites["a"] for _ in range(draws)]
    for technique, share in zip(row, p.tolist(), strict=True):
        assert drawn.count(technique) / draws == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / draws))
    # two without repetition, then one of them by the softmax of the two
    active = [0.0] * 4
    for i, j in itertools.permutations(range(4), 2):
        together = p[i] * p[j] / (1 - p[i])
        active[i] += float(together * p[i] / (p[i] + p[j]))
        active[j] += float(together * p[j] / (p[i] + p[j]))
    pairs = [choice.pair() for _ in range(draws)]
    assert all(plan.sites["a"] != others["a"][0] for plan, others in pairs)
    drawn = [plan.sites["a"] for plan, _ in pairs]
    for technique, share in zip(row, active, strict=True):
        assert drawn.count(technique) / draws == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / draws))


def test_a_probability_that_rounds_to_nothing_can_still_be_drawn_from() -> None:
    choice = _Choice({"a": dict.fromkeys(WINAS, 1.0)}, None, 0)
    with torch.no_grad():
        choice.logits["a"][2] = 1e4
    assert {choice.path().sites["a"] for _ in range(20)} == {WINAS[2]}
    assert {choice.pair()[0].sites["a"] for _ in range(20)} == {WINAS[2]}


def test_the_gradient_of_the_logits_is_that_of_the_expected_loss() -> None:
    """Two layers without an activation between, and a loss that is linear: then the gates are exact, and the mean over
    all four paths must be the derivative of the enumerated expectation."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).eval()
    x, direction = torch.randn(16, 6), torch.randn(16, 4)
    options = {"0": [bs.Float(), bs.Int(2, None)], "1": [bs.Int(3, None), bs.Float()]}
    paths = SuperNetwork(network(model, x), options, [(x, direction)])
    choice = _Choice({site: dict.fromkeys(row, 1.0) for site, row in options.items()}, None, 0)
    start = {"0": torch.tensor([0.4, -0.3]), "1": torch.tensor([-0.8, 0.2])}
    with torch.no_grad():
        for site, logits in start.items():
            choice.logits[site].copy_(logits)

    def loss(net: nn.Module) -> Tensor:
        return (net(x) * direction).sum()

    every = [bs.Plan(dict(zip(options, pair, strict=True))) for pair in itertools.product(*options.values())]
    values = []
    for plan in every:
        paths.put(plan)
        values.append(float(loss(paths.module).detach()))

    def chances(at: Mapping[str, Tensor]) -> list[float]:
        p = {site: logits.double().softmax(0).tolist() for site, logits in at.items()}
        return [math.prod(p[s][options[s].index(t)] for s, t in plan.sites.items()) for plan in every]

    def expected(at: Mapping[str, Tensor]) -> float:
        return sum(p * value for p, value in zip(chances(at), values, strict=True))

    sampled: dict[int, tuple[Tensor, ...]] = {}
    while len(sampled) < len(every):
        plan, others = choice.pair()
        paths.put(plan, others)
        index = next(k for k, one in enumerate(every) if one.sites == plan.sites)
        found = loss(paths.module)
        assert float(found.detach()) == pytest.approx(values[index], rel=1e-5)
        sampled[index] = torch.autograd.grad(found, [*choice.logits.values()])
    for k, site in enumerate(options):
        mean = torch.stack([p * sampled[index][k] for index, p in enumerate(chances(start))]).sum(0)
        for i in range(2):
            step = torch.eye(2, dtype=torch.float64)[i] * 1e-4
            above, below = (expected({**start, site: start[site] + sign * step}) for sign in (1, -1))
            slope = (above - below) / 2e-4
            assert float(mean[i]) == pytest.approx(slope, rel=1e-3)
            assert abs(slope) > 1e-3


# -- the search --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silence(bs.Technique):
    """A convolution that gives nothing (a test)."""

    def fits(self, site: bs.Site) -> bool:
        return site.kind == "conv2d"

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return SilentCell(site)


class SilentCell(bs.Cell):
    def forward(self, *operands: Tensor, **rest: Any) -> Any:
        return 0 * self.op(*operands, **rest)


@dataclass(frozen=True)
class Settling(bs.Technique):
    """Has a factor of its own and a penalty on it, and settles on another value (a test)."""

    value: int = 0

    def fits(self, site: bs.Site) -> bool:
        return site.kind == "conv2d"

    def build(self, site: bs.Site, record: bs.Record, rng: torch.Generator) -> bs.Cell:
        return SettlingCell(site)


class SettlingCell(bs.Cell):
    def __init__(self, site: bs.Site) -> None:
        super().__init__(site)
        self.factor = nn.Parameter(torch.ones(()))
        self.steps: list[tuple[int, int]] = []
        self.modes: list[bool] = []

    def forward(self, *operands: Tensor, **rest: Any) -> Any:
        self.modes.append(self.training)
        return self.op(*operands, **rest) * self.factor

    def step(self, done: int, total: int) -> None:
        self.steps.append((done, total))

    def penalty(self) -> Tensor:
        return 100 * self.factor.square()

    def settle(self) -> bs.Technique:
        return Settling(7)


def search(
    techniques: Any, latency: Any, *, model: nn.Module | None = None, steps: int = 25, **rest: Any
) -> bs.LearnedPlan:
    given: dict[str, Any] = {"logit_lr": 0.1, **rest}
    return bs.differentiable_search(
        model or small(), techniques, TRAIN, VALIDATION, latency, F.cross_entropy, steps=steps, **given
    )


def test_where_latency_is_all_the_fastest_is_chosen_at_every_site() -> None:
    fast = {"stem": bs.Winograd(4, 16), "left": bs.Float(), "right": bs.Int(8, 8)}
    some = (bs.Float(), bs.Int(8, 8), bs.Winograd(4, 16))
    latency = {(site, t): 1.0 if fast[site] == t else 1.5 for site in CONVS for t in some}
    found = search(some, latency, latency_weight=1e4, steps=15)
    assert dict(found.plan.sites) == fast
    assert found.ms == 3.0
    assert found.reference_ms == 1.5 + 1.0 + 1.5
    mean = sum(p * latency[s, t] for s, row in found.probabilities.items() for t, p in row.items())
    assert found.expected_ms == pytest.approx(mean, rel=1e-6)
    assert found.expected_ms == pytest.approx(found.history[-1].ms, rel=1e-6)
    assert found.history[-1].ms < found.history[0].ms < 4.0


def test_where_latency_is_nothing_what_breaks_the_network_is_avoided() -> None:
    latency = times((Silence(), 0.001), (bs.Winograd(2), 1.0))
    found = search((Silence(), bs.Winograd(2)), latency, latency_weight=0.0, steps=60)
    # the stem's silence costs everything; behind the addition the network can do without one branch
    assert found.plan.sites["stem"] == bs.Winograd(2)
    assert found.probabilities["stem"][Silence()] < 0.2
    assert search((Silence(), bs.Winograd(2)), latency, latency_weight=1e4, steps=10).plan.sites["stem"] == Silence()


def test_its_network_is_the_plan_applied_and_trains_on() -> None:
    model = small().train()
    found = search(WINAS, times(*((t, 1.0) for t in WINAS)), model=model, steps=6, lr=1e-3)
    assert found.net.training
    assert bs.plan_of(found.net).sites == found.plan.sites
    applied = bs.apply(model, found.plan, TRAIN)
    assert found.net.state_dict().keys() == applied.state_dict().keys()
    assert not torch.equal(found.net.get_parameter("stem.weight"), model.stem.weight)
    assert torch.equal(found.net.get_buffer("norm.running_mean"), model.norm.running_mean)
    again = bs.finetune(found.net.eval(), TRAIN, F.cross_entropy, steps=2)
    assert float(F.cross_entropy(output(again), VALIDATION[0][1])) < 1.0


def test_cells_are_told_of_every_step_and_settle() -> None:
    latency = {("left", Settling()): 1.0, ("left", bs.Float()): 2.0, ("right", Settling()): 1.0}
    some = (bs.Float(), Settling())
    latency["right", bs.Float()] = math.inf
    found = search(some, latency, steps=3, warmup=2, lr=0.01, latency_weight=1e4)
    assert found.plan.sites == {"left": Settling(), "right": Settling()}
    assert bs.plan_of(found.net).sites == {"left": Settling(7), "right": Settling(7)}
    cell = computer_of(found.net).cells["right"]
    assert isinstance(cell, SettlingCell)
    assert cell.steps == [(k, 5) for k in range(5)]
    assert cell.modes == [True, True, *[True, False] * 3]  # what cells see in training is no validation data
    assert float(cell.factor.detach()) < 0.99  # the penalty pulls
    assert found.probabilities["right"] == {Settling(): 1.0}
    assert [step.validation is None for step in found.history] == [True, True, False, False, False]
    assert found.history[1].ms == 1.5 + 1.0  # the warm-up leaves the logits alone


def test_nothing_given_is_changed_and_the_seed_decides() -> None:
    model, noise = small(), torch.get_rng_state()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = torch.utils.data.TensorDataset(*(torch.cat(parts) for parts in zip(*TRAIN, strict=True)))
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    some = (bs.Float(), bs.Winograd(2), FLEX)
    found = [
        bs.differentiable_search(
            *(model, some, loader, VALIDATION, times(*((t, 1.0) for t in some)), F.cross_entropy),
            steps=4,
            seed=seed,
        )
        for seed in (3, 3, 4)
    ]
    assert torch.equal(noise, torch.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found[0].history == found[1].history
    assert found[0].probabilities == found[1].probabilities
    assert found[0].plan == found[1].plan
    ours, theirs = found[0].net.state_dict(), found[1].net.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert found[0].history != found[2].history


def test_a_profile_gives_the_times_and_what_may_be_chosen() -> None:
    model, some = small(), [bs.Int(8, 8), bs.Int(4, 8), bs.Winograd(6)]
    profile = bs.profile(model, task(), some, MockTarget())
    refused = {(row.site, row.technique) for row in profile.rows if row.refused}
    assert any(technique == bs.Winograd(6) for _, technique in refused)
    found = search([bs.Float(), *some], profile, steps=2)
    measured = {(row.site, row.technique): row.ms for row in profile.rows if not row.refused}
    named = {(site, technique) for site, row in found.probabilities.items() for technique in row}
    assert named == set(measured)
    assert found.ms == pytest.approx(sum(measured[pair] for pair in found.plan.sites.items()))
    assert found.reference_ms == pytest.approx(sum(ms for (_, t), ms in measured.items() if t == bs.Float()))


def test_progress_is_told() -> None:
    told: list[Any] = []

    class Steps:
        def start(self, task: str, total: int | None = None) -> None:
            told.append(total)

        def advance(self, steps: int = 1) -> None:
            told.append(steps)

        def note(self, text: str) -> None:
            return None

    some = (bs.Float(), bs.Int(8, 8))
    search(some, times(*((t, 1.0) for t in some)), steps=2, warmup=1, progress=Steps())
    assert told == [3, 1, 1, 1]


def test_what_cannot_be_searched_says_so() -> None:
    some = (bs.Float(), bs.Winograd(2))
    latency = times((bs.Float(), 2.0), (bs.Winograd(2), 1.0))
    with pytest.raises(ValueError, match=r"steps=0, warmup=0"):
        search(some, latency, steps=0)
    given = (small(), some, TRAIN, TRAIN, latency, F.cross_entropy)
    with pytest.raises(ValueError, match=r"the same loader"):
        bs.differentiable_search(*given, steps=1)
    with pytest.raises(ValueError, match=r"no latency of Int\(w=8, a=8\) at 'stem'.*bs.profile.*math.inf"):
        search((*some, bs.Int(8, 8)), latency)
    with pytest.raises(ValueError, match=r"no latency of Winograd.* at 'left'"):
        search(some, {**latency, ("left", bs.Winograd(2)): math.nan})
    with pytest.raises(ValueError, match=r"no site has two of Float\(\), Winograd"):
        search(some, {**latency, **times((bs.Winograd(2), math.inf))})
    with pytest.raises(ValueError, match=r"no site has two of Winograd"):
        search((bs.Winograd(2),), latency)
    with pytest.raises(ValueError, match=r"takes 0 ms or less"):
        search(some, dict.fromkeys(latency, 0.0))
    with pytest.raises(bs.UnknownSiteError, match=r"no site is called 'steam'; closest: stem"):
        search(some, {**latency, ("steam", bs.Float()): 1.0})
    given = (small(), some, TRAIN, [], latency, F.cross_entropy)
    with pytest.raises(bs.DataError, match="validation loader is empty"):
        bs.differentiable_search(*given, steps=1)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        return output.sum() * float("nan")

    given = (small(), some, TRAIN, VALIDATION, latency, broken)
    with pytest.raises(bs.TrainingError, match=r"training loss is nan at step 1 of 3; a smaller lr"):
        bs.differentiable_search(*given, steps=3)
    later = iter([F.cross_entropy, broken])
    given = (small(), some, TRAIN, VALIDATION, latency, lambda output, target: next(later)(output, target))
    with pytest.raises(bs.TrainingError, match=r"validation loss is nan at step 1 of 3; leave out a technique"):
        bs.differentiable_search(*given, steps=3)
    frozen = small().requires_grad_(False)
    with pytest.raises(bs.TrainingError, match="no parameter of the network"):
        search(some, latency, model=frozen)
