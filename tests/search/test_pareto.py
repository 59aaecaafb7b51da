"""Multi-objective search: against every plan, stopped and gone on with, shared, and with storages that fail."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitsmith.plan import Budget, Plan
from bitsmith.profile import EdgeRow, Profile, Row
from bitsmith.search import BudgetError, Evaluation, Point, Result, search
from bitsmith.search import storage as storages
from bitsmith.search.base import SearchInterrupted
from bitsmith.search.hypervolume import hypervolume, non_dominated
from bitsmith.search.pareto import front
from bitsmith.search.storage import StudyError
from bitsmith.searches import Exact, Pareto, RandomPlans
from formulas import FLOAT, Bits

optuna = pytest.importorskip("optuna", reason='needs Optuna: pip install "bitsmith[explore]"')

MIB = 2**20
ANY = Budget(drop=1e9)


def chain(sites: int, seed: int = 0) -> Profile:
    """A chain of float, 8-bit and 4-bit layers, with a conversion wherever formats differ."""
    rng = random.Random(seed)
    rows, edges = [], []
    for i in range(sites):
        ms, size = rng.uniform(0.5, 1.5), rng.uniform(0.5, 2) * MIB
        for bits, kind in ((32, "float"), (8, "u8"), (4, "u8")):
            loss = 0.0 if bits == 32 else rng.uniform(0.5, 2) * 2.0**-bits
            costs = (ms * (bits / 32) ** 0.5, size * bits / 32, ms * bits)
            rows.append(Row(f"s{i:02}", Bits(bits), loss, *costs, reads=(kind,), writes=kind))
        if i:
            for a, b in (("float", "u8"), ("u8", "float")):
                edges.append(EdgeRow(f"s{i - 1:02}", f"s{i:02}", 0, a, b, 0.1))
    return Profile(tuple(rows), tuple(edges))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where that can be: SQLite waits for the disk after every trial."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def every_plan(profile: Profile) -> list[Plan]:
    options = profile.options()
    return [Plan({row.site: row.technique for row in rows}) for rows in itertools.product(*options.values())]


class Bench:
    """Measures by formula (the drop is not the loss), remembers what was asked, and fails at one moment."""

    def __init__(self, profile: Profile, stop: BaseException | None = None, at: int = -1) -> None:
        self.profile, self.stop, self.at = profile, stop, at
        self.asked: list[Plan] = []

    def truth(self, plan: Plan) -> tuple[float, float, float]:
        """Drop, ms, mib."""
        got = self.profile.predict(plan)
        first = isinstance(plan["s00"], Bits) and plan["s00"].bits_ == 4
        return got["loss"] * (3.0 if first else 1.0), got["ms"], round(got["bytes"]) / MIB

    def __call__(self, plan: Plan) -> Evaluation:
        if len(self.asked) == self.at and self.stop is not None:
            raise self.stop
        assert plan not in self.asked, "measured twice"
        self.asked.append(plan)
        drop, ms, mib = self.truth(plan)
        return Evaluation(plan, drop=drop, drop_interval=(drop / 2, drop), ms=ms, bytes=round(mib * MIB), samples=10)


class StagedBench(Bench):
    """The drop costs extra."""

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.costed: list[Plan] = []

    def costs(self, plan: Plan) -> Evaluation:
        assert plan not in self.costed, "costs measured twice"
        self.costed.append(plan)
        _, ms, mib = self.truth(plan)
        return Evaluation(plan, ms=ms, bytes=round(mib * MIB))

    def decide(self, plan: Plan, limit: float, chance: float = 0.0) -> Evaluation:
        raise AssertionError("a frontier needs whole evaluations")

    def bound(self, plan: Plan, candidates: int) -> float | None:
        return None

    def check(self, limit: float, candidates: int | None) -> str:
        return ""


def true_front(bench: Bench, which: tuple[int, ...]) -> set[tuple[float, ...]]:
    values = [tuple(bench.truth(plan)[k] for k in which) for plan in every_plan(bench.profile)]
    return {values[k] for k in non_dominated(values)}


def values(points: list[Point], objectives: tuple[str, ...]) -> set[tuple[float, ...]]:
    return {tuple(point.value(name) for name in objectives) for point in points}


def plans(result: Result) -> list[Plan]:
    return [point.plan for point in result.frontier]


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
@pytest.mark.parametrize(("objectives", "which"), [(("drop", "ms"), (0, 1)), (("ms", "drop"), (1, 0))])
def test_with_enough_trials_the_frontier_is_the_true_one(
    sampler: Any, objectives: tuple[str, ...], which: tuple[int, ...]
) -> None:
    profile = chain(4)
    bench = Bench(profile)
    result = search(profile, ANY, method=Pareto(objectives, sampler, trials=100), evaluate=bench)
    found = front(result.frontier, objectives)
    assert values(found, objectives) == true_front(bench, which)
    assert list(result.frontier[: len(found)]) == sorted(found, key=lambda p: p.value("ms"))
    # no plan twice, and it ends once all were measured
    assert result.evaluations == len(bench.asked) == 81 == len(result.frontier)
    assert (result.candidates, result.label, result.samples) == (None, "evaluated", 800)
    assert result.best.value("ms") == min(bench.truth(plan)[1] for plan in every_plan(profile))


def test_three_objectives() -> None:
    profile = chain(3)
    bench = Bench(profile)
    result = search(profile, ANY, "mib", Pareto(("drop", "ms", "mib"), trials=40), bench)
    found = front(result.frontier, ("drop", "ms", "mib"))
    assert values(found, ("drop", "ms", "mib")) == true_front(bench, (0, 1, 2))
    assert result.best.value("mib") == min(point.value("mib") for point in found)


def test_float_and_the_guided_plans_come_first_ends_before_middles() -> None:
    profile = chain(8)
    bench = Bench(profile)
    search(profile, ANY, method=Pareto(trials=30), evaluate=bench)
    guided = Exact().search(profile, ANY, "ms").frontier
    assert set(bench.asked[0].sites.values()) == {FLOAT}
    ladder = [point.plan for point in sorted(guided, key=lambda p: p.loss)]
    assert set(map(str, bench.asked[: len(ladder)])) == set(map(str, ladder))
    assert bench.asked[1] == ladder[-1]
    alone = Bench(profile)
    search(profile, ANY, method=Pareto(trials=30, seeds=None), evaluate=alone)
    assert set(alone.asked[0].sites.values()) == {FLOAT}
    assert alone.asked[1] != ladder[-1]


def test_guided_plans_are_parents_of_what_is_tried_next() -> None:
    """Optuna leaves enqueued trials out of NSGA-II's population unless they are given a generation."""
    profile = chain(12)
    bench = Bench(profile)
    search(profile, ANY, method=Pareto(trials=60), evaluate=bench)
    guided, sought = bench.asked[:24], bench.asked[36:]

    def away(plan: Plan) -> int:
        return min(sum(plan[s] != other[s] for s in plan) for other in guided)

    # children of two parents and a mutation; plans drawn at random are further off: 12 sites of 3 techniques each
    assert np.mean([away(plan) for plan in sought]) < 4.0
    drawn = random.Random(0)
    loose = [Plan({s: Bits(drawn.choice((4, 8, 32))) for s in guided[0]}) for _ in range(24)]
    assert np.mean([away(plan) for plan in loose]) > 4.5


def test_it_betters_random_plans() -> None:
    profile = chain(12)
    box = (1.0, profile.predict(Plan(dict.fromkeys(profile.options(), FLOAT)))["ms"])

    def volume(method: Any) -> float:
        result = search(profile, ANY, method=method, evaluate=Bench(profile))
        return hypervolume([(p.value("drop"), p.value("ms")) for p in result.frontier if p.evaluation is not None], box)

    control = [volume(RandomPlans(plans=60, seed=seed)) for seed in range(3)]
    for sampler in ("nsga2", "tpe"):
        assert max(control) < min(volume(Pareto(sampler=sampler, seed=seed)) for seed in range(2))
    # without the guided plans 60 trials suffice TPE only; NSGA-II is then no better than the control
    assert np.mean(control) < np.mean([volume(Pareto(sampler="tpe", seeds=None, seed=seed)) for seed in range(3)])


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_same_seed_same_result_and_another_seed_another(sampler: Any) -> None:
    profile = chain(8)
    tried = []
    for seed in (3, 3, 4):
        bench = Bench(profile)
        search(profile, ANY, method=Pareto(sampler=sampler, seed=seed, trials=40), evaluate=bench)
        tried.append(bench.asked)
    assert tried[0] == tried[1]
    assert tried[0] != tried[2]


SMALL: dict[str, Any] = {"population": 5, "seeds": Exact(points=6)}


def test_gone_on_with_it_measures_nothing_twice_and_more_trials_continue_it(folder: Path) -> None:
    profile = chain(6)
    short, more = (Pareto(trials=n, storage=folder / "study.db", **SMALL) for n in (13, 19))
    assert short.left() == 13
    first = search(profile, ANY, method=short, evaluate=Bench(profile))
    assert (short.left(), more.left()) == (0, 6)
    bench = Bench(profile)
    again = search(profile, ANY, method=short, evaluate=bench)
    assert bench.asked == []
    assert again == first
    longer = search(profile, ANY, method=more, evaluate=bench)
    assert len(bench.asked) == 6
    assert longer == search(profile, ANY, method=Pareto(trials=19, **SMALL), evaluate=Bench(profile))
    assert not list(folder.glob("*.db-journal"))


@pytest.mark.parametrize("at", [8, 13])
def test_killed_and_continued_equals_uninterrupted(at: int, folder: Path) -> None:
    profile = chain(6)
    method = Pareto(trials=15, storage=folder / "study.db", **SMALL)
    broken = Bench(profile, RuntimeError("the power went"), at)
    with pytest.raises(RuntimeError, match="power"):
        search(profile, ANY, method=method, evaluate=broken)
    assert method.left() == 15 - at
    rest = Bench(profile)
    result = search(profile, ANY, method=method, evaluate=rest)
    assert not {str(plan) for plan in rest.asked} & {str(plan) for plan in broken.asked}
    whole = Bench(profile)
    assert result == search(profile, ANY, method=Pareto(trials=15, **SMALL), evaluate=whole)
    assert len(whole.asked) == len(rest.asked) + len(broken.asked)


def test_a_batch_may_be_measured_at_once() -> None:
    profile = chain(6)
    alone = search(profile, ANY, method=Pareto(trials=30), evaluate=Bench(profile))
    inside, most, lock = [0], [0], threading.Lock()
    bench = Bench(profile)

    def evaluate(plan: Plan) -> Evaluation:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        time.sleep(0.01)
        with lock:
            inside[0] -= 1
            return bench(plan)

    with ThreadPoolExecutor(4) as executor:
        found = search(profile, ANY, method=Pareto(trials=30), evaluate=evaluate, executor=executor)
    assert found == alone
    assert most[0] > 1


def named(plan: Plan) -> str:
    return str(sorted(map(str, plan.sites.items())))


class Logged(Bench):
    """Writes a line for each plan, takes its time, and dies at one moment as from a power cut."""

    def __init__(self, profile: Profile, log: Path, killed: int, seconds: float) -> None:
        super().__init__(profile)
        self.log, self.killed, self.seconds = log, killed, seconds

    def __call__(self, plan: Plan) -> Evaluation:
        if len(self.asked) == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        with self.log.open("a") as file:
            file.write(named(plan) + "\n")
        time.sleep(self.seconds)
        return super().__call__(plan)


def _job(folder: Path, log: str, killed: int, seconds: float) -> None:
    profile = chain(6)
    bench = Logged(profile, folder / log, killed, seconds)
    result = search(profile, ANY, method=Pareto(trials=30, storage=folder / "study.db"), evaluate=bench)
    (folder / f"{log}.result").write_text("\n".join(map(named, plans(result))))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked: importing torch in each takes too long")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_one_process_is_killed_two_share_the_rest_and_it_equals_one_alone(folder: Path) -> None:
    def started(log: str, killed: int = -1, seconds: float = 0.0) -> Any:
        process = multiprocessing.get_context("fork").Process(target=_job, args=(folder, log, killed, seconds))
        process.start()
        return process

    first = started("first", killed=17)
    first.join(60)
    assert first.exitcode == -signal.SIGKILL
    assert Pareto(trials=30, storage=folder / "study.db").left() == 13
    both = [started(log, seconds=0.2) for log in ("one", "other")]
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    profile = chain(6)
    alone = search(profile, ANY, method=Pareto(trials=30), evaluate=Bench(profile))
    for log in ("one", "other"):
        assert (folder / f"{log}.result").read_text().splitlines() == list(map(named, plans(alone)))
    begun, one, other = ((folder / log).read_text().splitlines() for log in ("first", "one", "other"))
    assert not {*one, *other} & set(begun)
    # both worked; an idle one may repeat what the other has begun, and all the rest is measured once
    assert min(len(one), len(other)) > 2
    assert len({*one, *other}) == 13 <= len(one) + len(other) <= 18


def test_a_trial_that_another_process_ended_meanwhile_is_left_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at a trial and its end: then optuna refuses to end it again."""
    profile, ended = chain(6), optuna.study.Study.tell

    def twice(*given: Any, **named: Any) -> Any:
        ended(*given, **named)
        return ended(*given, **named)

    alone = search(profile, ANY, method=Pareto(trials=8), evaluate=Bench(profile))
    monkeypatch.setattr(optuna.study.Study, "tell", twice)
    method = Pareto(trials=8, storage=folder / "study.db")
    assert plans(search(profile, ANY, method=method, evaluate=Bench(profile))) == plans(alone)


def test_an_interrupt_carries_the_best_so_far_and_the_study_stays(folder: Path) -> None:
    profile = chain(6)
    method = Pareto(trials=30, storage=f"sqlite:///{folder / 'study.db'}", seeds=Exact(points=6))
    with pytest.raises(SearchInterrupted) as stopped:
        search(profile, Budget(drop=0.1), method=method, evaluate=Bench(profile, KeyboardInterrupt(), 20))
    best = stopped.value.best
    assert (best.evaluations, best.missed) == (20, {})
    assert best.best.value("drop") <= 0.1
    found = front(best.frontier, method.objectives)
    assert list(best.frontier[: len(found)]) == sorted(found, key=lambda p: p.value("ms"))
    with pytest.raises(SearchInterrupted) as at_once:
        search(profile, Budget(drop=0.1), method=method, evaluate=Bench(profile, KeyboardInterrupt(), 0))
    assert at_once.value.best == best  # what an earlier run measured counts
    bench = Bench(profile)
    search(profile, Budget(drop=0.1), method=method, evaluate=bench)
    assert len(bench.asked) == 10


def test_the_time_may_be_limited(folder: Path) -> None:
    profile = chain(6)
    method = Pareto(trials=30, storage=folder / "study.db", seconds=0.0)
    search(profile, ANY, method=Pareto(trials=5, storage=folder / "study.db"), evaluate=Bench(profile))
    bench = Bench(profile)
    result = search(profile, ANY, method=method, evaluate=bench)
    assert (len(bench.asked), result.evaluations) == (0, 5)


def test_limits_are_kept_and_plans_beyond_them_get_no_drop() -> None:
    profile = chain(8)
    bench = StagedBench(profile)
    whole = profile.predict(Plan(dict.fromkeys(profile.options(), FLOAT)))["ms"]
    budget = Budget(ms=0.6 * whole)
    result = search(profile, budget, "drop", Pareto(trials=60), bench)
    assert len(bench.costed) == 60
    assert result.best.value("ms") <= 0.6 * whole
    dropped = [point.plan for point in result.frontier if point.evaluation and point.evaluation.drop is not None]
    assert all(profile.predict(plan)["ms"] <= 0.6 * whole for plan in dropped)
    assert {str(plan) for plan in dropped} == {str(plan) for plan in bench.asked}
    assert 0 < len(bench.asked) < 60
    # the constraint draws later trials inside
    inside = [profile.predict(plan)["ms"] <= 0.6 * whole for plan in bench.costed[36:]]
    assert np.mean(inside) > 0.6
    assert all(
        p.evaluation is not None and p.evaluation.drop is not None for p in front(result.frontier, ("drop", "ms"))
    )


def test_where_no_drop_is_asked_none_is_measured() -> None:
    profile = chain(5)
    bench = StagedBench(profile)
    result = search(profile, Budget(ms=1e9), "mib", Pareto(("ms", "mib"), trials=20), bench)
    assert (len(bench.costed), bench.asked, result.evaluations) == (20, [], 20)


def test_an_unmet_budget_carries_the_closest() -> None:
    profile = chain(4)
    with pytest.raises(BudgetError) as error:
        search(profile, Budget(ms=0.01), "drop", Pareto(trials=20), Bench(profile))
    assert error.value.best.label == "evaluated"
    assert error.value.best.missed["ms"] > 0


def test_without_measuring_the_numbers_are_predictions(folder: Path) -> None:
    profile = chain(4)
    method = Pareto(trials=100, storage=folder / "study.db")
    result = search(profile, Budget(mib=100.0), "ms", method)
    assert (result.label, result.evaluations) == ("predicted", 0)
    truth = [profile.predict(plan) for plan in every_plan(profile)]
    pairs = [(costs["loss"], costs["ms"]) for costs in truth]
    assert values(front(result.frontier, method.objectives), method.objectives) == {
        pairs[k] for k in non_dominated(pairs)
    }
    assert not list(folder.iterdir())
    with pytest.raises(BudgetError):
        search(profile, Budget(mib=0.001), "ms", method)


def test_energy_needs_a_profile_with_it() -> None:
    profile = chain(3)
    result = search(profile, Budget(mib=100.0), "mj", Pareto(("drop", "mj"), trials=30))
    assert result.best.predicted("mj") == min(point.predicted("mj") for point in result.frontier)
    rows = [Row(row.site, row.technique, row.loss, row.ms, row.bytes) for row in profile.rows]
    with pytest.raises(ValueError, match="no energy"):
        search(Profile(tuple(rows)), Budget(mib=100.0), "ms", Pareto(("drop", "mj")))


def test_a_study_of_another_search_is_not_mixed_in(folder: Path) -> None:
    profile = chain(4)
    storage = folder / "study.db"
    search(profile, ANY, method=Pareto(trials=3, storage=storage), evaluate=Bench(profile))
    for other, said in (
        (Pareto(sampler="tpe", storage=storage), "sampler 'nsga2', not 'tpe'"),
        (Pareto(("drop", "mib"), storage=storage), "objectives"),
        (Pareto(seed=1, storage=storage), "seed 0, not 1"),
    ):
        with pytest.raises(StudyError, match=said) as error:
            search(profile, ANY, method=other, evaluate=Bench(profile))
        assert "study.db" in str(error.value)
    with pytest.raises(StudyError, match="limits"):
        search(profile, Budget(drop=0.5), method=Pareto(storage=storage), evaluate=Bench(profile))
    with pytest.raises(StudyError, match="decisions"):
        search(chain(5), ANY, method=Pareto(storage=storage), evaluate=Bench(chain(5)))
    # another name is another study
    bench = Bench(chain(5))
    search(chain(5), ANY, method=Pareto(trials=3, storage=storage, study="other"), evaluate=bench)
    assert len(bench.asked) == 3
    address = f"sqlite:///{folder / 'foreign.db'}"
    foreign = optuna.storages.RDBStorage(address)
    optuna.create_study(study_name="bitsmith", storage=foreign).add_trial(optuna.create_trial(value=1.0))
    foreign.remove_session()
    foreign.engine.dispose()
    with pytest.raises(StudyError, match="Bitsmith did not make it"):
        search(profile, ANY, method=Pareto(storage=address), evaluate=Bench(profile))


def test_a_locked_storage_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "TIMEOUT_S", 0.1)
    profile, path = chain(4), folder / "study.db"
    method = Pareto(trials=30, storage=path)
    search(profile, ANY, method=Pareto(trials=3, storage=path), evaluate=Bench(profile))
    lock = sqlite3.connect(path)
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StudyError, match=r"study\.db is locked by another process: let it finish"):
        search(profile, ANY, method=method, evaluate=Bench(profile))
    with pytest.raises(StudyError, match="locked"):
        method.left()
    lock.rollback()
    lock.close()

    class Locking(Bench):
        lock: sqlite3.Connection

        def __call__(self, plan: Plan) -> Evaluation:
            if len(self.asked) == 4:
                self.lock = sqlite3.connect(path)
                self.lock.execute("BEGIN EXCLUSIVE")
            return super().__call__(plan)

    bench = Locking(profile)
    with pytest.raises(StudyError, match=r"locked.*What was measured is kept"):
        search(profile, ANY, method=method, evaluate=bench)
    bench.lock.rollback()
    bench.lock.close()
    assert method.left() == 23


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: path, "is a folder"),
        (lambda path: path / "text.db", "cannot be used .*not a database.*: check"),
        (lambda path: "nonsense://x/y", "cannot be used .*nonsense"),
        (lambda path: "http//:://", "is a folder|cannot"),
    ],
)
def test_a_storage_that_is_none_is_told(make: Callable[[Path], Any], said: str, folder: Path) -> None:
    (folder / "text.db").write_text("this is a long enough text that is no database at all " * 100)
    with pytest.raises((StudyError, OSError), match=said):
        Pareto(storage=make(folder)).left()


def test_a_server_that_does_not_answer_is_told_and_the_password_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "TIMEOUT_S", 2)
    method = Pareto(storage="postgresql+psycopg2://me:secret@127.0.0.1:1/plans")
    with pytest.raises(StudyError) as error:
        search(chain(3), ANY, method=method, evaluate=Bench(chain(3)))
    assert "me:***@127.0.0.1:1/plans" in str(error.value)
    assert "secret" not in str(error.value)
    if importlib.util.find_spec("psycopg2") is None:
        assert "pip install psycopg2-binary" in str(error.value)
    else:
        assert "refused" in str(error.value)


def test_without_optuna_the_line_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "bitsmith\[explore\]"'):
        search(chain(3), ANY, method=Pareto(), evaluate=Bench(chain(3)))


def test_optuna_says_nothing_and_is_left_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    search(chain(3), ANY, method=Pareto(trials=15, sampler="tpe"), evaluate=Bench(chain(3)))
    assert optuna.logging.get_verbosity() == optuna.logging.INFO
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "bad",
    [
        {"objectives": ("drop",)},
        {"objectives": ("drop", "drop")},
        {"objectives": ("drop", "bytes")},
        {"sampler": "random"},
        {"trials": 0},
        {"population": 1},
    ],
)
def test_settings_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Pareto(**bad)


grid = st.integers(0, 6)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4).flatmap(lambda d: st.lists(st.tuples(*[grid] * d), max_size=12).map(lambda p: (d, p))))
def test_hypervolume_equals_counting_unit_cubes(case: tuple[int, list[tuple[int, ...]]]) -> None:
    size, points = case
    reference = (5,) * size
    # the cube with its lower corner at c is covered if a point is nowhere above c
    cubes = itertools.product(range(5), repeat=size)
    covered = sum(any(all(a <= c for a, c in zip(p, cube, strict=True)) for p in points) for cube in cubes)
    assert hypervolume(points, reference) == pytest.approx(covered)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(grid, grid, grid), max_size=12))
def test_dominated_points_add_nothing_and_the_front_is_as_defined(points: list[tuple[int, ...]]) -> None:
    kept = [points[k] for k in non_dominated(points)]
    assert hypervolume(kept, (6, 6, 6)) == hypervolume(points, (6, 6, 6))
    for point in points:
        betters = [o for o in points if o != point and all(a <= b for a, b in zip(o, point, strict=True))]
        assert (point in kept) == (not betters)


def test_hypervolume_of_what_is_unknown_is_nothing_and_wrong_shapes_are_errors() -> None:
    assert hypervolume([(float("nan"), 1.0), (float("inf"), 0.0)], (2.0, 2.0)) == 0.0
    assert non_dominated([(float("nan"), 0.0), (1.0, 1.0)]) == [1]
    with pytest.raises(ValueError, match="as many numbers"):
        hypervolume([(1.0,)], (2.0, 2.0))
    with pytest.raises(ValueError, match="finite"):
        hypervolume([(1.0,)], (float("inf"),))
