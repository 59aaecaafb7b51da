"""Many workers: the same plan, samples and losses as in one process, and nothing is lost with a worker."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import bitsmith as bs
from bitsmith import workers
from bitsmith.bench import Bench
from bitsmith.gradual import Certainty
from bitsmith.plan import Plan
from bitsmith.prepare.correct_bias import CorrectBias
from bitsmith.search.base import Shared
from bitsmith.searches import Bisection, Exact
from bitsmith.sensitivity.inter_layer import InterLayer
from bitsmith.testing import MockTarget
from smallnet import Small, batches, small, task

TECHNIQUES = [bs.Int(8, 8), bs.Int(2, 4)]
BUDGET = bs.Budget(drop=0.02)

# a user's own module, which workers import. In another process: a mark for each call, and what the folder asks for
MODULE = """
import multiprocessing, os, time
from pathlib import Path
import bitsmith as bs

FOLDER = Path(__file__).parent
PARENT = os.getpid()

def elsewhere(name):
    if multiprocessing.parent_process() is None:
        return
    (FOLDER / f"{name}.{os.getpid()}.{time.monotonic_ns()}").touch()
    if (FOLDER / "slow").exists():
        time.sleep(0.03)
    if (FOLDER / "fail").exists():
        raise ArithmeticError("the user's own")
    if (FOLDER / "die").exists():
        os._exit(3)

def marked(output, target):
    elsewhere("metric")
    return (output.argmax(1) == target).float()

def marked_error(model, task, pairs, simulate):
    for loss in bs.output_error(model, task, pairs, simulate):
        elsewhere("loss")
        yield loss

def whole(plan):
    elsewhere("whole")
    changed = sum(technique != bs.Float() for technique in plan.sites.values())
    return bs.Evaluation(plan, drop=0.01 * changed, ms=10.0 - changed, bytes=1000, samples=1)
"""


@functools.cache
def trained() -> Small:
    """One model for all: no verb changes it."""
    return small()


@dataclass
class Log:
    """The notes of a run about its workers."""

    notes: list[str] = field(default_factory=list)

    def start(self, task: str, total: int | None = None) -> None:
        return None

    def advance(self, steps: int = 1) -> None:
        return None

    def note(self, text: str) -> None:
        if "worker" in text:
            self.notes.append(text)


class Theirs:
    """The user's module and its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "users_own.py").write_text(MODULE)
        sys.path.insert(0, str(folder))
        self.module = importlib.import_module("users_own")

    def ask(self, what: str) -> None:
        (self.folder / what).touch()

    def marks(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}.*.*"))

    def clear(self) -> None:
        for path in self.folder.glob("*"):
            if path.is_file() and path.suffix != ".py":
                path.unlink()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Workers compute with as many threads as this process: two of each would fight for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def their(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Theirs]:
    found = Theirs(tmp_path_factory.mktemp("users"))
    yield found
    sys.path.remove(str(found.folder))


@pytest.fixture(autouse=True)
def clean(their: Theirs) -> None:
    their.clear()


def pool(count: int = 2) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with pool(1) as executor:
        yield executor


@pytest.fixture(scope="module")
def dask() -> Iterator[Executor]:
    """A cluster of two worker processes on this machine."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client.get_executor()


@pytest.fixture(params=["threads", "processes", "dask"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        with ThreadPoolExecutor(2) as found:
            yield found
    else:
        yield request.getfixturevalue(request.param)


def job(their: Theirs, **changes: Any) -> bs.Task:
    # batches that are views of one tensor, as a user's split gives them
    x, y = (torch.cat(parts) for parts in zip(*batches(20, seed=3), strict=True))
    views = list(zip(x.split(8), y.split(8), strict=True))
    return task(validation=views, metric=their.module.marked, **changes)


def profiled(their: Theirs, executor: Executor | None = None, **changes: Any) -> bs.Profile:
    changes = {"sensitivity": their.module.marked_error, "store": None, **changes}
    return bs.profile(trained(), job(their), TECHNIQUES, MockTarget(), executor=executor, **changes)


@pytest.fixture(scope="module")
def serial(their: Theirs) -> bs.Profile:
    return profiled(their)


def searched(
    their: Theirs,
    profile: bs.Profile,
    method: Any,
    executor: Executor | None = None,
    log: Log | None = None,
    store: Any = None,
    **changes: Any,
) -> bs.Result:
    evaluate = bs.evaluator(trained(), job(their), MockTarget(), progress=log, store=store, **changes)
    return bs.search(profile, BUDGET, method=method, evaluate=evaluate, executor=executor)


METHODS = [Bisection(), Exact()]


@pytest.fixture(scope="module")
def plans(their: Theirs, serial: bs.Profile) -> list[bs.Result]:
    return [searched(their, serial, method) for method in METHODS]


def losses(profile: bs.Profile) -> dict[Any, float]:
    return {(row.site, row.technique): row.loss for row in profile.rows}


# -- the same as in one process ----------------------------------------------------------------------------------------


def test_the_same_losses(their: Theirs, serial: bs.Profile, executor: Executor) -> None:
    found = profiled(their, executor)
    assert losses(found) == losses(serial)  # bit for bit
    assert found.rows == serial.rows
    assert found.edges == serial.edges
    assert found.spent.forwards > serial.spent.forwards  # every job forwards the float network too
    assert their.marks("loss") or isinstance(executor, ThreadPoolExecutor)


@pytest.mark.parametrize("which", [0, 1], ids=["Bisection", "Exact"])
def test_the_same_plan(
    which: int, their: Theirs, serial: bs.Profile, plans: list[bs.Result], executor: Executor
) -> None:
    log = Log()
    found = searched(their, serial, METHODS[which], executor, log)
    assert found == plans[which]  # plan, samples, evaluations: all of it
    assert not log.notes
    assert their.marks("metric") or isinstance(executor, ThreadPoolExecutor)


def test_serial_runs_go_on_from_it_and_it_from_theirs(
    their: Theirs, serial: bs.Profile, plans: list[bs.Result], processes: Executor
) -> None:
    with bs.Store(None) as store:
        assert profiled(their, processes, store=store).rows == serial.rows
        assert searched(their, serial, Bisection(), processes, store=store) == plans[0]
        kinds = ("sensitivity", "scores of samples", "accuracy", "time", "range")
        before = {kind: len(store.rows(kind)) for kind in kinds}
        assert profiled(their, store=store).rows == serial.rows
        again = searched(their, serial, Bisection(), store=store)
        assert (again.plan, again.samples) == (plans[0].plan, plans[0].samples)
        assert {kind: len(store.rows(kind)) for kind in kinds} == before
        assert searched(their, serial, Bisection(), processes, store=store) == again
        scored = {str(row.key["first"]) + str(row.key["plan"]) for row in store.rows("scores of samples")}
    with bs.Store(None) as store:
        profiled(their, store=store)
        searched(their, serial, Bisection(), store=store)
        alone = {str(row.key["first"]) + str(row.key["plan"]) for row in store.rows("scores of samples")}
        assert alone <= scored  # and what nobody asked for in the end


def test_the_certainty_goes_along(their: Theirs, serial: bs.Profile, processes: Executor) -> None:
    whole = Certainty(early=False)
    alone = searched(their, serial, Bisection(), certainty=whole)
    assert searched(their, serial, Bisection(), processes, certainty=whole) == alone
    assert their.marks("metric")


def test_prepared_plans(their: Theirs, serial: bs.Profile, processes: Executor) -> None:
    method, steps = Exact(max_evaluations=4), (CorrectBias(samples=16),)
    alone = searched(their, serial, method, prepare=steps)
    assert searched(their, serial, method, processes, prepare=steps) == alone
    assert their.marks("metric")


def test_optimize(their: Theirs, processes: Executor, tmp_path: Path) -> None:
    def run(executor: Executor | None) -> bs.Optimized:
        changes: Any = {"techniques": TECHNIQUES, "executor": executor, "sensitivity": their.module.marked_error}
        return bs.optimize(
            trained(), job(their), MockTarget(), BUDGET, folder=tmp_path / str(bool(executor)), **changes
        )

    alone, helped = run(None), run(processes)
    assert helped.plan == alone.plan
    assert helped.result == alone.result
    assert (tmp_path / "True/plan.json").read_bytes() == (tmp_path / "False/plan.json").read_bytes()
    assert their.marks("loss")
    assert their.marks("metric")


def test_a_plain_function(their: Theirs, serial: bs.Profile, processes: Executor) -> None:
    alone = bs.search(serial, BUDGET, "ms", evaluate=their.module.whole, method=Bisection())
    assert not their.marks("whole")
    assert bs.search(serial, BUDGET, "ms", evaluate=their.module.whole, method=Bisection(), executor=processes) == alone
    assert their.marks("whole")
    with ThreadPoolExecutor(2) as threads:
        found = bs.search(serial, BUDGET, "ms", evaluate=lambda plan: their.module.whole(plan), executor=threads)
    assert found == bs.search(serial, BUDGET, "ms", evaluate=their.module.whole)


def test_a_plain_function_that_cannot_be_sent(their: Theirs, serial: bs.Profile, processes: Executor) -> None:
    lock, told = threading.Lock(), []

    def evaluate(plan: bs.Plan) -> bs.Evaluation:
        with lock:
            found: bs.Evaluation = their.module.whole(plan)
            return found

    found = bs.search(
        serial, BUDGET, "ms", evaluate=evaluate, executor=processes, progress=lambda what, *_: told.append(what)
    )
    assert found == bs.search(serial, BUDGET, "ms", evaluate=their.module.whole)
    assert any("evaluate cannot be sent" in what for what in told)


# -- times -------------------------------------------------------------------------------------------------------------


def test_times_are_taken_here_while_nothing_else_runs(
    their: Theirs, serial: bs.Profile, processes: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    their.ask("slow")
    running: list[int] = []
    jobs: list[Any] = []
    submit, measure = processes.submit, MockTarget.measure

    def watched(*args: Any) -> Any:
        jobs.append(submit(*args))
        return jobs[-1]

    def timed(self: MockTarget, *args: Any, **kwargs: Any) -> Any:
        running.append(sum(not job.done() for job in jobs))
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(processes, "submit", watched)
    monkeypatch.setattr(MockTarget, "measure", timed)
    profiled(their, processes)
    searched(their, serial, Bisection(), processes)
    assert len(jobs) > 4
    assert len(running) > 1
    assert not any(running)
    assert all(job.done() for job in jobs)


# -- workers that die --------------------------------------------------------------------------------------------------


def killed_once(their: Theirs, name: str) -> threading.Thread:
    """Sends SIGKILL to the first worker that leaves a mark."""

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            for path in their.marks(name):
                os.kill(int(path.name.split(".")[1]), signal.SIGKILL)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_dask_worker_is_killed(their: Theirs, serial: bs.Profile, plans: list[bs.Result], dask: Executor) -> None:
    their.ask("slow")
    for name in ("loss", "metric"):
        killer = killed_once(their, name)
        if name == "loss":
            assert profiled(their, dask).rows == serial.rows
        else:
            assert searched(their, serial, Bisection(), dask) == plans[0]
        killer.join()
        workers_seen = {path.name.split(".")[1] for path in their.marks(name)}
        assert len(workers_seen) > 1  # somebody went on with it


def test_a_worker_of_a_pool_is_killed(their: Theirs, serial: bs.Profile, plans: list[bs.Result]) -> None:
    their.ask("slow")
    with pool(1) as executor:
        log, killer = Log(), killed_once(their, "metric")
        assert searched(their, serial, Bisection(), executor, log) == plans[0]
        killer.join()
    assert any("BrokenProcessPool" in note and "done again in this process" in note for note in log.notes)


def test_a_pool_whose_workers_end_by_themselves(their: Theirs, serial: bs.Profile, plans: list[bs.Result]) -> None:
    their.ask("die")
    with pool(1) as executor:
        log = Log()
        assert profiled(their, executor, progress=log).rows == serial.rows
        assert len(log.notes) == 1 or "workers are gone" in log.notes[0]
        assert "lost with a worker (BrokenProcessPool" in log.notes[-1]
        assert "choices, measured in this process: Int(" in log.notes[-1]
        log = Log()
        assert searched(their, serial, Bisection(), executor, log) == plans[0]
        assert any("the workers are gone (BrokenProcessPool" in note for note in log.notes)
        told: list[str] = []
        found = bs.search(
            serial,
            BUDGET,
            "ms",
            evaluate=their.module.whole,
            executor=executor,
            progress=lambda what, *_: told.append(what),
        )
        assert any("the workers are gone (BrokenProcessPool" in what for what in told)
    assert found == bs.search(serial, BUDGET, "ms", evaluate=their.module.whole)


class Dying(Executor):
    """Loses all that it is given."""

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenExecutor("gone"))
        return future


def test_a_plain_function_whose_worker_ends(their: Theirs, serial: bs.Profile) -> None:
    told: list[str] = []
    found = bs.search(
        serial,
        BUDGET,
        "ms",
        evaluate=their.module.whole,
        executor=Dying(),
        progress=lambda what, *_: told.append(what),
    )
    assert found == bs.search(serial, BUDGET, "ms", evaluate=their.module.whole)
    assert any("lost with its worker (BrokenExecutor: gone)" in what for what in told)


def test_an_error_of_the_users_is_raised(their: Theirs, serial: bs.Profile, processes: Executor) -> None:
    their.ask("fail")
    with pytest.raises(ArithmeticError, match="the user's own"):
        profiled(their, processes)
    with pytest.raises(ArithmeticError, match="the user's own"):
        searched(their, serial, Bisection(), processes)


# -- what cannot be sent -----------------------------------------------------------------------------------------------


def test_a_lambda_goes_where_cloudpickle_is(
    their: Theirs, processes: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cloudpickle")
    given = task(forward=lambda model, x: model(x))

    def run(executor: Executor | None) -> bs.Profile:
        return bs.profile(
            trained(), given, TECHNIQUES[:1], MockTarget(), sensitivity=bs.output_error, executor=executor
        )

    assert run(processes).rows == run(None).rows
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(workers.WorkerError, match=r"^task.forward cannot be sent.*pip install cloudpickle"):
        run(processes)


def test_scores_of_all_pairs_together_stay_here(processes: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "submit", lambda *_: pytest.fail("nothing is to be sent"))
    found = bs.profile(trained(), task(), TECHNIQUES[:1], MockTarget(), sensitivity=InterLayer(), executor=processes)
    assert found.cross


def test_a_runtime_is_not_replaced_by_simulation(their: Theirs, processes: Executor) -> None:
    evaluate = bs.evaluator(trained(), job(their), MockTarget())
    assert isinstance(evaluate, Shared)
    vars(evaluate.gradual)["runner"] = object()
    with evaluate.helped(processes) as helped:
        helped.ahead([Plan({"stem": bs.Int(8, 8)})], 0.01)
    assert not their.marks("metric")


def test_a_recipe_is_small_and_checked(their: Theirs) -> None:
    bench = Bench.open(trained(), job(their), MockTarget())
    recipe = workers.recipe_of(bench)
    held = sum(x.nbytes for x, _ in bench.task.validation)
    assert len(recipe.data) < 2 * held + 2**19  # each view brings its own samples, not all of the tensor
    assert len(workers.recipe_of(bench, validation=False).data) < len(recipe.data) - held
    other = workers.Recipe(recipe.data, "other", recipe.threads, ("0.0", recipe.versions[1]))
    with pytest.raises(workers.WorkerError, match=r"its parent torch 0\.0"):
        workers.perform(other, workers.packed((len, {}, ()), {}))
    with pytest.raises(workers.WorkerError, match="cannot open what it was sent"):
        workers.perform(recipe, b"nothing")


def test_threads_of_the_parent(their: Theirs) -> None:
    bench, before = Bench.open(trained(), job(their), MockTarget()), torch.get_num_threads()
    recipe = workers.recipe_of(bench)
    other = workers.Recipe(recipe.data, recipe.digest, before + 1, recipe.versions)
    assert workers.perform(other, workers.packed((threads, {}, ()), {})) == before + 1
    assert torch.get_num_threads() == before


def threads(bench: Bench) -> int:
    return torch.get_num_threads()
