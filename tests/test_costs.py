"""The learned table of costs: it recovers known costs from noisy whole times, and foretells plans it never saw."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith import costs
from bitsmith.bench import Bench
from bitsmith.costs import Costs, Option
from bitsmith.profile import measure
from bitsmith.site import Edge, Operand, Site
from bitsmith.targets.base import SiteTimes
from bitsmith.testing import MockTarget

INT = bs.Int(8, 8)
NARROW = bs.Int(4, 8)


def options_of(names: Sequence[str], *techniques: bs.Technique) -> dict[str, list[Option]]:
    return {
        name: [Option(name, bs.Float(), ("float", "float"), "float")]
        + [Option(name, technique, ("u8", "float"), "u8") for technique in techniques]
        for name in names
    }


class Chain:
    """A made-up chain of layers whose costs are known: of three shapes, conversions between neighbours."""

    def __init__(self, length: int, seed: int) -> None:
        generator = random.Random(seed)
        self.names = [f"layer{i}" for i in range(length)]
        self.sites = {
            name: Site(
                name,
                "conv2d",
                name,
                "integer",
                (
                    Operand("input", f"t{i}", (1, 8 << i % 3, 16, 16), "float32"),
                    Operand("weight", "", (8 << i % 3, 8 << i % 3, 3, 3), "float32", True),
                ),
                (f"t{i + 1}",),
                ((1, 8 << i % 3, 16, 16),),
                macs=10**6 << i % 3,
            )
            for i, name in enumerate(self.names)
        }
        self.edges = [Edge(a, b, 0, f"t{i + 1}") for i, (a, b) in enumerate(itertools.pairwise(self.names))]
        self.options = options_of(self.names, INT)
        base = [0.05, 0.04, 0.08]
        self.float_ms = {n: base[i % 3] * generator.uniform(0.9, 1.1) for i, n in enumerate(self.names)}
        self.int_ms = {n: 0.4 * self.float_ms[n] * generator.uniform(0.9, 1.1) for n in self.names}
        self.down = {e: 0.006 * generator.uniform(0.5, 1.5) for e in self.edges}
        self.up = {e: 0.004 * generator.uniform(0.5, 1.5) for e in self.edges}
        self.fixed = 0.03

    def chosen(self, plan: bs.Plan) -> dict[str, Option]:
        return costs.chosen_options(plan, plan, self.options)

    def parts(self, plan: bs.Plan) -> SiteTimes:
        """What a perfect profiler would show."""
        spent = {n: self.int_ms[n] if n in plan else self.float_ms[n] for n in self.names}
        converted = {}
        for edge in self.edges:
            if (edge.producer in plan) != (edge.consumer in plan):
                converted[edge.tensor] = self.up[edge] if edge.producer in plan else self.down[edge]
        whole = sum(spent.values()) + sum(converted.values()) + self.fixed
        return SiteTimes(spent, converted, self.fixed, whole, "measured")

    def whole(self, plan: bs.Plan) -> float:
        return self.parts(plan).whole

    def fit(self, mixed: int, noise: float, profiles: Any = None, seed: int = 0) -> Costs:
        plans = costs.probe_plans(self.options, mixed, seed)
        generator = np.random.default_rng(seed)
        wholes = [self.whole(plan) * float(np.exp(noise * generator.standard_normal())) for plan in plans]
        seen = [self.parts(plan) for plan in plans[:6]] if profiles is None else profiles(plans)
        return costs.fit(self.sites, self.options, self.edges, [self.chosen(plan) for plan in plans], seen, wholes)

    def predicted(self, table: Costs, plan: bs.Plan) -> float:
        """The sum of site rows and edge rows, written out apart from the code under test."""
        total = table.fixed
        for name in self.names:
            total += table.sites[name, INT if name in plan else bs.Float()]
        for edge in self.edges:
            formats = ("u8" if edge.producer in plan else "float", "u8" if edge.consumer in plan else "float")
            total += table.edges.get((edge, *formats), 0.0)
        return total

    def errors(self, table: Costs, count: int = 40) -> list[float]:
        """Relative errors against the true times of random plans that no probe held."""
        generator = random.Random(999)
        found = []
        for index in range(count):
            share = (index + 0.5) / count
            plan = bs.Plan({n: INT for n in self.names if generator.random() < share})
            found.append(abs(self.predicted(table, plan) / self.whole(plan) - 1))
        return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_noisy_whole_times_are_averaged_not_repeated(seed: int) -> None:
    chain = Chain(20, seed)
    table = chain.fit(mixed=48, noise=0.02, seed=seed)
    assert statistics.median(chain.errors(table)) < 0.02 * 0.8
    assert max(chain.errors(table)) < 0.02 * 4


@pytest.mark.parametrize("mixed", [12, 48])
def test_whole_times_mend_a_profile_that_is_wrong(mixed: int) -> None:
    """A profiler that adds a microsecond-like overhead to every kernel, sees no conversion and mistakes one layer."""
    chain = Chain(20, 3)

    def wrong(plans: Sequence[bs.Plan]) -> list[SiteTimes]:
        found = []
        for plan in plans[:2]:
            true = chain.parts(plan)
            spent = {name: ms + 0.01 for name, ms in true.sites.items()}
            spent["layer7"] += 0.3
            found.append(SiteTimes(spent, {}, 0.0, true.whole, "measured"))
        return found

    naive = []
    for index in range(40):
        plan = bs.Plan(dict.fromkeys(random.Random(index).sample(chain.names, 10), INT))
        naive.append(abs(sum(wrong([plan])[0].sites.values()) / chain.whole(plan) - 1))
    table = chain.fit(mixed, noise=0.01, profiles=wrong)
    assert statistics.median(naive) > 0.25
    assert statistics.median(chain.errors(table)) < 0.025


def test_without_noise_and_with_enough_probes_the_sum_is_exact() -> None:
    chain = Chain(8, 4)
    table = chain.fit(mixed=80, noise=0.0)
    assert max(chain.errors(table)) < 2e-3
    assert table.probes == 82
    assert table.whole_float_ms == pytest.approx(chain.whole(bs.Plan()))


def test_a_few_probes_go_far_where_layers_are_alike() -> None:
    """40 layers and 78 changes of format from 14 whole times: entries of one shape move together."""
    chain = Chain(40, 5)
    blank = SiteTimes(dict.fromkeys(chain.names, 0.0), {}, 0.0, 0.0, "measured")
    table = chain.fit(mixed=12, noise=0.005, profiles=lambda plans: [blank])
    assert statistics.median(chain.errors(table)) < 0.03


def test_the_reported_error_is_that_of_plans_left_out() -> None:
    chain = Chain(20, 6)
    noisy, clean = chain.fit(48, noise=0.05), chain.fit(48, noise=0.002)
    assert clean.fit_error < 0.01
    assert 0.02 < noisy.fit_error < 0.12


def test_what_is_fused_behind_a_site_counts_as_its_own() -> None:
    chain = Chain(6, 7)
    relus = {f"relu{i}": Site(f"relu{i}", "relu", "", "float", (), (), ()) for i in range(6)}
    heads = {
        name: dataclasses.replace(site, epilogue=(f"relu{i}",)) for i, (name, site) in enumerate(chain.sites.items())
    }
    chain.sites = {**heads, **relus}

    def split(plans: Sequence[bs.Plan]) -> list[SiteTimes]:
        found = []
        for plan in plans[:2]:
            true = chain.parts(plan)
            inner = {name: 0.25 * ms for name, ms in true.sites.items()}
            fused = {f"relu{i}": 0.75 * true.sites[name] for i, name in enumerate(chain.names)}
            found.append(dataclasses.replace(true, sites={**inner, **fused}))
        return found

    table = chain.fit(mixed=12, noise=0.0, profiles=split)
    for name in chain.names:
        assert table.sites[name, bs.Float()] == pytest.approx(chain.float_ms[name], rel=0.05)


# -- probe plans -------------------------------------------------------------------------------------------------------


def shares(plans: Sequence[bs.Plan], sites: int) -> list[float]:
    return sorted(len(plan) / sites for plan in plans)


@pytest.mark.parametrize("count", [6, 12, 48])
def test_the_shares_of_every_beginning_are_spread_evenly(count: int) -> None:
    options = options_of([f"s{i}" for i in range(30)], INT)
    mixed = costs.probe_plans(options, 48, seed=0)[2 : 2 + count]
    spread = [0.0, *shares(mixed, 30), 1.0]
    assert max(b - a for a, b in itertools.pairwise(spread)) <= 2 / count + 1 / 30
    assert statistics.mean(spread) == pytest.approx(0.5, abs=0.08)


def test_probes_are_float_each_technique_everywhere_then_scattered_and_in_runs() -> None:
    names = [f"s{i}" for i in range(30)]
    options = {**options_of(names, INT, NARROW), "only": options_of(["only"], NARROW)["only"], **options_of(["no"])}
    plans = costs.probe_plans(options, 24, seed=3)
    assert len(plans[0]) == 0
    assert plans[1] == bs.Plan(dict.fromkeys(names, INT))
    assert plans[2] == bs.Plan(dict.fromkeys([*names, "only"], NARROW))
    assert len(plans) == 27
    assert all("no" not in plan for plan in plans)
    assert all(plan["only"] == NARROW for plan in plans if "only" in plan)

    def changes(plan: bs.Plan) -> int:
        return sum((a in plan) != (b in plan) for a, b in itertools.pairwise(names))

    middle = [plan for plan in plans[3:] if 8 <= len(plan) <= 23]
    runs = [changes(plan) for plan in middle if plans.index(plan) % 2 == 1]
    scattered = [changes(plan) for plan in middle if plans.index(plan) % 2 == 0]
    assert statistics.mean(runs) < 0.75 * statistics.mean(scattered)
    used = {technique for plan in plans[3:] for technique in plan.sites.values()}
    assert used == {INT, NARROW}


def test_equal_seeds_give_equal_probes_and_other_seeds_others() -> None:
    options = options_of([f"s{i}" for i in range(12)], INT)
    assert costs.probe_plans(options, 12, 5) == costs.probe_plans(options, 12, 5)
    assert costs.probe_plans(options, 12, 5)[2:] != costs.probe_plans(options, 12, 6)[2:]
    assert costs.probe_plans(options, 40, 5)[:14] == costs.probe_plans(options, 12, 5)


@pytest.mark.parametrize("sites", [1, 2, 3])
def test_tiny_networks_have_probes(sites: int) -> None:
    plans = costs.probe_plans(options_of([f"s{i}" for i in range(sites)], INT), 12, 0)
    assert len(plans) == 14
    assert all(1 <= len(plan) <= sites for plan in plans[1:])


# -- end to end --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Eight convolutions in four residual blocks, [n, 8, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.second = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = torch.relu(second(torch.relu(first(x))) + x)
        return x


def opened(target: bs.Target, seed: int = 0, store: Any = None) -> Bench:
    torch.manual_seed(0)
    data = [(torch.randn(4, 8, 12, 12), torch.zeros(4, dtype=torch.long))]
    task = bs.Task(data, data, metric=lambda output, target: output.flatten(1).mean(1))
    return Bench.open(Residual().eval(), task, target, seed=seed, store=store)


def no_losses(model: nn.Module, task: bs.Task, pairs: Sequence[Any], simulate: Any) -> Iterator[float]:
    return iter([0.0] * len(pairs))


def relative_errors(bench: Bench, profile: bs.Profile, seed: int) -> list[float]:
    """Predicted against measured whole times of random plans."""
    sites = [site for site, rows in profile.options().items() if len(rows) > 1]
    generator = random.Random(seed)
    plans = [bs.Plan(dict.fromkeys(generator.sample(sites, 1 + i % (len(sites) - 1)), INT)) for i in range(12)]
    true = [timing.ms for timing in bench.times([bench.target.adapt(plan, bench.net.record) for plan in plans])]
    return [abs(profile.predict(plan)["ms"] / ms - 1) for plan, ms in zip(plans, true, strict=True)]


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.01), (0.05, 0.03)])
def test_mock_target_end_to_end(noise: float, allowed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_EXPORT_S", 0.0)
    target = MockTarget(noise=noise)
    bench = opened(target)
    profile = measure(bench, [INT], no_losses)
    assert target.calls["export"] == 2 + costs._FEWEST, (
        "the float plan, the one technique everywhere, and the fewest mixed ones"
    )
    assert statistics.median(relative_errors(bench, profile, seed=77)) < allowed
    assert float(profile.notes["fit error"]) < max(3 * noise, 0.02)


def test_equal_measurements_give_equal_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_EXPORT_S", 0.0)
    first, second, other = (measure(opened(MockTarget(), seed), [INT], no_losses) for seed in (0, 0, 1))
    assert (first.rows, first.edges, first.fixed_ms) == (second.rows, second.edges, second.fixed_ms)
    assert first.rows != other.rows, "another seed takes other probes"


def test_a_resumed_run_takes_the_same_probes_and_times_nothing_again(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "_EXPORT_S", 0.0)
    measure(opened(MockTarget(), store=tmp_path / "store.db"), [INT], no_losses)
    monkeypatch.setattr(costs, "_EXPORT_S", 1e9)  # a quicker machine would now export more
    target = MockTarget()
    profile = measure(opened(target, store=tmp_path / "store.db"), [INT], no_losses)
    assert target.calls["measure"] == target.calls["site_times"] == 0
    assert target.calls["export"] == 1, "only the float file, whose size the profile states"
    assert profile.notes["probes"] == str(2 + costs._FEWEST)


def test_parts_of_large_files_are_timed_apart_and_brought_to_one_level(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = opened(Drifting())
    options = options_by_site(bench)
    plans = [bench.target.adapt(plan, bench.net.record) for plan in costs.probe_plans(options, 4, 0)]
    weights = sum(tensor.nbytes for tensor in bench.model.state_dict().values())
    monkeypatch.setattr(costs, "_OPEN_BYTES", 2 * weights)
    apart = costs._wholes(bench, plans, float_ms=1.0)
    true = [timing.ms for timing in MockTarget().measure([bench.artifact(plan) for plan in plans])]
    assert len(apart) == len(plans) == 6
    assert [ms / apart[0] for ms in apart] == pytest.approx([ms / true[0] for ms in true])


@dataclasses.dataclass(frozen=True)
class Drifting(MockTarget):
    """A machine that is slower at every further call."""

    def measure(self, artifacts: Any, rounds: int = 30) -> list[Any]:
        factor = 1.0 + 0.1 * self.calls["measure"]
        return [
            dataclasses.replace(timing, samples=tuple(factor * ms for ms in timing.samples))
            for timing in super().measure(artifacts, rounds)
        ]


def options_by_site(bench: Bench) -> Mapping[str, Sequence[Option]]:
    return options_of([name for name, site in bench.net.record.sites.items() if site.kind == "conv2d"], INT)


@dataclasses.dataclass(frozen=True)
class Disturbed(MockTarget):
    """Other work doubles the time of two rounds in three."""

    def measure(self, artifacts: Any, rounds: int = 30) -> list[Any]:
        return [
            dataclasses.replace(t, samples=tuple(ms if i % 3 == 0 else 2.0 * ms for i, ms in enumerate(t.samples)))
            for t in super().measure(artifacts, rounds)
        ]


def test_other_work_on_the_machine_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_EXPORT_S", 0.0)
    quiet = opened(MockTarget())
    true = quiet.times([bs.Plan()])[0].ms
    disturbed = opened(Disturbed())
    assert disturbed.times([bs.Plan()])[0].ms == pytest.approx(2 * true)
    profile = measure(disturbed, [INT], no_losses)
    assert profile.predict(bs.Plan())["ms"] == pytest.approx(true, rel=0.06)
    assert statistics.median(relative_errors(quiet, profile, seed=5)) < 0.06
