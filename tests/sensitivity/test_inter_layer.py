from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.bench import Bench
from bitsmith.sensitivities import InterLayer
from bitsmith.sensitivity._gates import gated
from bitsmith.sensitivity.base import Pair, Scores
from bitsmith.task import TaskError
from bitsmith.testing import MockTarget
from smallnet import small, task


def opened(model: nn.Module, asked: bs.Task) -> Bench:
    """A bench whose ranges stay min/max, so that plans here and in it are the same."""
    bench = Bench.open(model, asked, MockTarget())
    bench.choose = False
    return bench


def pairs_of(bench: Bench, *techniques: bs.Technique) -> list[Pair]:
    sites = bench.net.record.sites
    return [(n, t) for t in techniques for n, s in sites.items() if s.role == "integer" and t.fits(s)]


def scored(bench: Bench, asked: bs.Task, pairs: list[Pair], **settings: Any) -> Scores:
    return InterLayer(**settings)(bench.model, asked, pairs, bench.simulate)


def test_closed_gates_leave_the_float_network_whatever_hosts_them() -> None:
    asked = task()
    bench = opened(small(), asked)
    x = asked.calibration[0][0]  # type: ignore[index]
    for techniques in ([bs.Int(4, 4)], [bs.Float("bfloat16"), bs.Int(8, 8), bs.Int(4, 4)]):
        network = gated(pairs_of(bench, *techniques), bench.simulate)
        network.gates.open(len(x))
        with torch.no_grad():
            assert torch.equal(network.net(x), bench.model(x))


def test_an_open_gate_computes_the_technique_and_only_there() -> None:
    asked = task()
    bench = opened(small(), asked)
    x = asked.calibration[0][0]  # type: ignore[index]
    pairs = pairs_of(bench, bs.Float("bfloat16"), bs.Int(4, 4))
    network = gated(pairs, bench.simulate)
    for index, (site, technique) in enumerate(pairs):
        gates = network.gates.open(len(x))
        with torch.no_grad():
            gates[:, index] = 1.0
            expected = bench.simulate(bs.Plan({site: technique}))(x)
            # written at the site itself, the tensor of a plan is seen by nobody else in a network with one reader
            torch.testing.assert_close(network.net(x), expected, rtol=1e-4, atol=1e-4)


def test_pairs_score_alike_together_and_apart() -> None:
    asked = task()
    bench = opened(small(), asked)
    techniques = (bs.Float("bfloat16"), bs.Int(8, 8), bs.Int(4, 4))
    together = scored(bench, asked, pairs_of(bench, *techniques), mu=0.0).losses
    for technique in techniques:
        alone = scored(bench, asked, pairs_of(bench, technique), mu=0.0).losses
        for pair, loss in alone.items():
            assert together[pair] == pytest.approx(loss, rel=1e-4)


def slopes(bench: Bench, x: Tensor, pairs: list[Pair]) -> np.ndarray[Any, Any]:
    """d output / d gate of every sample, [samples, outputs, pairs], by finite differences of the gated network."""
    network = gated(pairs, bench.simulate)
    found = []
    for index in range(len(pairs)):
        ends = []
        for step in (1e-2, -1e-2):
            gates = network.gates.open(len(x))
            with torch.no_grad():
                gates[:, index] = step
                ends.append(network.net(x).double())
        found.append(((ends[0] - ends[1]) / 2e-2).numpy())
    return np.stack(found, -1)


def test_gauss_newton_of_the_output_is_the_jacobians_square() -> None:
    asked = task()
    bench = opened(small(), asked)
    pairs = pairs_of(bench, bs.Int(4, 4))
    x = torch.cat([x for x, _ in asked.calibration])
    jacobian = slopes(bench, x, pairs)
    with torch.no_grad():
        power = float(bench.model(x).double().square().sum())
    exact = np.einsum("sop,soq->pq", jacobian, jacobian) / power
    got = scored(bench, asked, pairs, draws=2000, shrink=False, samples=len(x))
    for j, one in enumerate(pairs):
        assert got.losses[one] == pytest.approx(exact[j, j], rel=0.1)
        for k in range(j):
            bound = 0.1 * np.sqrt(exact[j, j] * exact[k, k])
            assert got.cross[one, pairs[k]] == pytest.approx(2 * exact[j, k], abs=2 * bound)


def test_gauss_newton_of_cross_entropy_is_the_fisher_matrix() -> None:
    asked = dataclasses.replace(task(), loss=F.cross_entropy)
    bench = opened(small(), asked)
    pairs = pairs_of(bench, bs.Int(4, 4))
    x = torch.cat([x for x, _ in asked.calibration])
    jacobian = slopes(bench, x, pairs)
    with torch.no_grad():
        p = torch.softmax(bench.model(x).double(), -1).numpy()
    inner = np.einsum("so,oq->soq", p, np.eye(p.shape[1])) - np.einsum("so,sq->soq", p, p)
    exact = 0.5 * np.einsum("sop,soq,sqr->pr", jacobian, inner, jacobian) / len(x)
    got = scored(bench, asked, pairs, of="loss", draws=2000, shrink=False, samples=len(x))
    for j, one in enumerate(pairs):
        assert got.losses[one] == pytest.approx(exact[j, j], rel=0.1)


class Tanh(nn.Module):
    """Smooth, so that its Hessian is all there is to second order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return found


def smooth() -> tuple[nn.Module, bs.Task]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Tanh().eval()
        data = [(torch.randn(20, 6), torch.randint(0, 3, (20,))) for _ in range(2)]
    return model, bs.Task(calibration=data, validation=data, metric=bs.metrics.top1, loss=F.cross_entropy)


def test_hessian_form_is_the_second_derivative_by_the_gates() -> None:
    model, asked = smooth()
    bench = opened(model, asked)
    pairs = pairs_of(bench, bs.Int(4, 8))
    network = gated(pairs, bench.simulate)

    def loss(gates: Tensor) -> Tensor:
        network.gates.value = gates
        total = torch.zeros(())
        for x, y in asked.calibration:
            total = total + F.cross_entropy(network.net(x), y, reduction="sum")
        return total / 40

    exact = torch.autograd.functional.hessian(loss, torch.zeros(len(pairs))).numpy()
    got = scored(bench, asked, pairs, form="hessian", samples=40)
    rounding = 1e-4 * float(np.abs(exact).max())
    for j, one in enumerate(pairs):
        assert got.losses[one] == pytest.approx(0.5 * exact[j, j], rel=1e-3, abs=rounding)
        for k in range(j):
            assert got.cross[one, pairs[k]] == pytest.approx(exact[j, k], rel=1e-3, abs=rounding)
    assert got.spent.forwards == 40 * 2
    assert got.spent.backwards == 40 + 2 * 40 * len(pairs)


def test_mu_weights_the_cross_terms_and_nothing_else() -> None:
    asked = task()
    bench = opened(small(), asked)
    pairs = pairs_of(bench, bs.Int(4, 4))
    full, half, none = (scored(bench, asked, pairs, mu=mu) for mu in (1.0, 0.5, 0.0))
    assert full.losses == half.losses == none.losses
    assert not none.cross
    assert half.cross == {key: pytest.approx(0.5 * value) for key, value in full.cross.items()}
    assert all(one[0] != other[0] for one, other in full.cross)


def test_shrinking_keeps_the_diagonal_and_moves_cross_terms_towards_zero() -> None:
    asked = task()
    bench = opened(small(), asked)
    pairs = pairs_of(bench, bs.Int(4, 4))
    raw, shrunk = (scored(bench, asked, pairs, shrink=shrink) for shrink in (False, True))
    assert raw.losses == shrunk.losses
    assert all(abs(shrunk.cross[key]) <= abs(value) + 1e-18 for key, value in raw.cross.items())
    assert any(shrunk.cross[key] == 0.0 for key in raw.cross)


class Sequence(nn.Module):
    """Works on [time, samples, features]: the samples are not along the first axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.relu(self.inner(x.transpose(0, 1))).mean(0))
        return found


def test_samples_that_are_not_along_the_first_axis_are_taken_one_by_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x, y = Sequence().eval(), torch.randn(6, 3, 4), torch.zeros(6, dtype=torch.long)
    whole = bs.Task(calibration=[(x, y)], validation=[(x, y)], metric=bs.metrics.top1)
    single = dataclasses.replace(whole, calibration=[(x[k : k + 1], y[k : k + 1]) for k in range(6)])
    bench = opened(model, whole)
    pairs = [(name, bs.Int(4, 4)) for name in ("inner", "head")]
    got = scored(bench, whole, pairs, mu=0.0, draws=200)
    expected = scored(bench, single, pairs, mu=0.0, draws=200)
    for pair in pairs:
        assert got.losses[pair] == pytest.approx(expected.losses[pair], rel=0.3)


@pytest.mark.parametrize("form", ["gauss_newton", "hessian"])
def test_the_model_stays_as_it_was(form: Any) -> None:
    asked = dataclasses.replace(task(), loss=F.cross_entropy)
    bench = opened(small(), asked)
    before = {key: value.clone() for key, value in bench.model.state_dict().items()}
    bench.model.train()
    scored(bench, asked, pairs_of(bench, bs.Int(8, 8)), form=form)
    assert bench.model.training
    assert all(torch.equal(value, before[key]) for key, value in bench.model.state_dict().items())
    assert all(parameter.grad is None for parameter in bench.model.parameters())


def test_every_kind_of_site_has_a_score_and_its_cost_is_told() -> None:
    asked = task()
    bench = opened(small(), asked)
    pairs = pairs_of(bench, bs.Int(8, 8), bs.Int(4, 4))
    got = scored(bench, asked, pairs, samples=24, draws=3)
    assert set(got.losses) == set(pairs)
    assert {":add", ":mean", "stem", "head"} <= {site for site, _ in got.losses}
    assert (got.spent.forwards, got.spent.backwards) == (24 * 3, 24 * 3)
    assert got.spent.passes == 24 * 9


def test_a_profile_takes_scores_and_cross_terms_and_keeps_them(tmp_path: Any) -> None:
    calls: list[int] = []

    @dataclasses.dataclass(frozen=True)
    class Watched:
        def __call__(
            self, model: nn.Module, task: bs.Task, pairs: list[Pair], simulate: Callable[[bs.Plan], nn.Module]
        ) -> Scores:
            calls.append(len(pairs))
            found = InterLayer()(model, task, pairs, simulate)
            skipped = {pairs[0]: "for the test"}
            losses = {pair: loss for pair, loss in found.losses.items() if pair != pairs[0]}
            return dataclasses.replace(found, losses=losses, skipped=skipped)

    first, second = (
        bs.profile(small(), task(), [bs.Int(8, 8)], MockTarget(), store=tmp_path / "runs.db", sensitivity=Watched())
        for _ in range(2)
    )
    assert calls == [6]
    assert first.rows == second.rows
    assert first.cross == second.cross
    assert first.cross
    assert first.spent.passes == second.spent.passes > 0
    rows = {row.site: row for row in first.rows if row.technique == bs.Int(8, 8)}
    assert rows["stem"].loss == max(row.loss for row in rows.values())
    assert "stem" in first.notes["not scored"]
    assert bs.Profile.from_json(first.to_json()) == first
    everything = bs.Plan({name: bs.Int(8, 8) for name in rows})
    assert first.predict(everything)["loss"] == pytest.approx(
        sum(row.loss for row in rows.values()) + sum(loss for *_, loss in first.cross)
    )


def test_what_it_needs_is_said() -> None:
    asked = dataclasses.replace(task(), loss=None)
    bench = opened(small(), asked)
    pairs = pairs_of(bench, bs.Int(8, 8))
    for settings in ({"form": "hessian"}, {"of": "loss"}):
        with pytest.raises(TaskError, match="loss"):
            scored(bench, asked, pairs, **settings)
    for bad in ({"form": "exact"}, {"of": "input"}, {"samples": 0}, {"draws": 0}, {"mu": -1.0}):
        with pytest.raises(ValueError, match="InterLayer"):
            InterLayer(**bad)  # type: ignore[arg-type]
    assert InterLayer()(bench.model, asked, [], bench.simulate) == Scores({})
    with pytest.raises(ValueError, match="nothing to score"):
        gated([], bench.simulate)
