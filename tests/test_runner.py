"""Evaluating on the runtime: the outputs that the simulation gives, up to roundings, whatever the batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import bitsmith as bs
from bitsmith import runner as module
from bitsmith.bench import Bench, without_values
from bitsmith.data import call
from bitsmith.evaluate import Evaluator
from bitsmith.gradual import Gradual
from bitsmith.runner import Runner, runner
from bitsmith.store import Store
from bitsmith.targets.base import TargetError
from bitsmith.targets.onnxruntime import OnnxRuntime
from bitsmith.targets.roofline import Roofline
from bitsmith.testing import MockTarget
from bitsmith.verify import TOLERANCE_DB
from smallnet import Small, batches, small, task

EVERY = ("stem", "left", "right", ":add", ":mean", "head")
PLANS = {
    "float": bs.Plan(),
    "8 bits": bs.Plan(dict.fromkeys(EVERY, bs.Int(8, 8))),
    "4-bit weights": bs.Plan(dict.fromkeys(EVERY, bs.Int(4, 8))),
}

SOME = bs.Plan({"left": bs.Int(8, 8), "head": bs.Int(8, 8)})


class Several(nn.Module):
    """A mapping with a tuple inside as output, two inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.body(x)) * scale
        return {"logits": self.head(hidden), "inside": (hidden, x.sum(1))}


class Summed(Several):
    """With an output that has no samples."""

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        found = super().forward(x, scale)
        return {**found, "penalty": found["logits"].square().mean()}


class Transposed(Several):
    """With an output whose samples are not along the first axis."""

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        found = super().forward(x, scale)
        return {"logits": found["logits"].t()}


class Pair(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Named(Several):
    def forward(self, x: Tensor, scale: Tensor) -> Any:
        found = super().forward(x, scale)
        return Pair(found["logits"], found["inside"][0])


def mixed(count: int, size: int = 10) -> list[Any]:
    generator = torch.Generator().manual_seed(count)
    return [
        (
            {"x": torch.randn(size, 6, generator=generator), "scale": 1 + torch.rand(size, 1, generator=generator)},
            torch.randint(0, 3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def several(kind: type[Several] = Several) -> Several:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().eval()


def several_task(**changes: Any) -> bs.Task:
    return bs.Task(calibration=mixed(2), validation=mixed(3), metric=bs.metrics.top1, **changes)


@pytest.fixture(scope="module")
def model() -> Small:
    return small()


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime is the faster one."""
    monkeypatch.setattr("bitsmith.runner._faster", lambda *_: "runtime")


def opened(model: nn.Module, target: bs.Target | None = None, batch: int = 1, **changes: Any) -> Bench:
    given = target or OnnxRuntime(threads=1)
    store = changes.pop("store", None)
    about = task(**changes) if isinstance(model, Small) else several_task(**changes)
    bench = Bench.open(model, about, given, store=store, batch=batch)
    bench.choose = False
    return bench


def gap_db(got: Tensor, wanted: Tensor) -> float:
    noise = float((got.double() - wanted.double()).square().sum())
    return 10 * float(np.log10(float(wanted.double().square().sum()) / max(noise, 1e-30)))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("batch", [1, 5])
def test_it_computes_what_the_simulation_does(model: Small, batch: int) -> None:
    """Batches of 16 and of 3 samples, in files of 1 and 5."""
    bench = opened(model, batch=batch)
    (x, _), (more, _) = batches(2, seed=7)
    found = runner(bench, x)
    assert found is not None
    for plan in PLANS.values():
        adapted = bench.adapted(plan)
        net = bs.apply(model, adapted, bench.task.calibration) if adapted.sites else model
        run = found.scorer(adapted)
        for inputs in (x, more[:3], more[:1]):
            got = run(inputs)
            with torch.no_grad():
                wanted = net(inputs)
            assert got.shape == wanted.shape
            assert gap_db(got, wanted) >= TOLERANCE_DB["onnxruntime"]
            assert torch.equal(got.argmax(1), wanted.argmax(1))


@pytest.mark.usefixtures("always")
def test_samples_do_not_depend_on_their_company(model: Small) -> None:
    bench = opened(model, batch=5)
    x = batches(1, 13, seed=7)[0][0]
    found = runner(bench, x)
    assert found is not None
    run = found.scorer(bench.adapted(PLANS["8 bits"]))
    together = run(x)
    assert together.shape == (13, 4)
    alone = torch.cat([run(x[k : k + 1]) for k in range(13)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert len({tuple(row) for row in together.tolist()}) == 13


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", [Several, Named])
def test_outputs_keep_their_structure(kind: type[Several]) -> None:
    net = several(kind)
    bench = opened(net, batch=4)
    inputs = mixed(1)[0][0]
    found = runner(bench, inputs)
    assert found is not None
    with torch.no_grad():
        wanted: Any = net(**inputs)
    got = found.scorer(bs.Plan())(inputs)
    if kind is Named:
        assert type(got) is Pair
        pairs = list(zip(got, wanted, strict=True))
    else:
        assert list(got) == ["logits", "inside"]
        assert isinstance(got["inside"], tuple)
        pairs = [(got["logits"], wanted["logits"]), *zip(got["inside"], wanted["inside"], strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    plan = bench.adapted(bs.Plan({"body": bs.Int(8, 8), "head": bs.Int(8, 8)}))
    with torch.no_grad():
        simulated = call(bs.apply(net, plan, bench.task.calibration), inputs)
    logits = bs.metrics.logits(found.scorer(plan)(inputs))
    assert gap_db(logits, bs.metrics.logits(simulated)) >= 35


@pytest.mark.usefixtures("always")
def test_scores_through_the_evaluator(model: Small) -> None:
    """What a search is told: the accuracy that the file has."""
    evaluate = bs.evaluator(model, task(), OnnxRuntime(threads=1), batch=3)
    got = evaluate(SOME)
    run = evaluate.gradual.runner
    assert run is not None
    right = [run.scorer(got.plan)(x).argmax(1) == y for x, y in batches(4, seed=3)]
    assert got.metric == pytest.approx(float(torch.cat(right).float().mean()))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("kind", [Summed, Transposed])
def test_none_for_outputs_without_samples(kind: type[Several]) -> None:
    bench = opened(several(kind), batch=2)
    assert runner(bench, mixed(1)[0][0]) is None


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("target", [MockTarget(), Roofline(float32=10.0, int8=40.0, bandwidth_gb_s=10.0)])
def test_none_for_targets_that_measure_nothing(model: Small, target: bs.Target) -> None:
    assert runner(opened(model, target), batches(1)[0][0]) is None


def forward(model: Any, x: Tensor) -> Any:
    return 2 * model(x)


@pytest.mark.usefixtures("always")
def test_none_for_a_task_with_a_forward_of_its_own(model: Small) -> None:
    x = batches(1)[0][0]
    assert runner(opened(model, forward=forward), x) is None
    assert runner(opened(model), x) is not None


class Fails:
    def __get__(self, *_: Any) -> Callable[..., Any]:
        def opened(_: Any) -> Any:
            raise TargetError("no such device")

        return opened


@pytest.mark.usefixtures("always")
def test_a_target_that_cannot_run_is_said(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnnxRuntime, "opened", Fails())
    bench = opened(model)
    notes: list[str] = []
    monkeypatch.setattr(type(bench.progress), "note", lambda _, text: notes.append(text))
    assert runner(bench, batches(1)[0][0]) is None
    (note,) = notes
    assert "evaluated by simulation" in note
    assert "no such device" in note


@pytest.fixture
def unexported(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the outputs have one form is taken for granted: nothing is exported."""
    structure = pytree.tree_structure(torch.zeros(1))
    monkeypatch.setattr("bitsmith.runner._runner", lambda bench, _: Runner(bench, structure))


@pytest.mark.usefixtures("unexported")
@pytest.mark.parametrize("choice", ["runtime", "simulation"])
def test_the_choice_is_kept(model: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, choice: str) -> None:
    x = batches(1)[0][0]
    timed: list[Runner] = []

    def faster(found: Runner, inputs: Any) -> str:
        timed.append(found)
        return choice

    monkeypatch.setattr("bitsmith.runner._faster", faster)
    path = tmp_path / "runs.db"
    for _ in range(2):  # the second time as another process would
        with Store(path) as store:
            assert (runner(opened(model, store=store), x) is not None) is (choice == "runtime")
    assert len(timed) == 1
    with Store(path) as store:
        runner(opened(model, store=store), x[:7])  # batches of another size: another question
        runner(opened(model, store=store, batch=2), x)
    assert len(timed) == 3


def test_the_faster_one_is_taken(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only what is run moves: 1 for the model's call, ``cost`` for a file's."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def counted(function: Callable[..., Any], cost: float) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            now[0] += cost
            return function(*args)

        return timed

    bench = opened(model, batch=4)
    monkeypatch.setattr("bitsmith.runner.call", counted(call, 1.0))
    plain = OnnxRuntime.opened
    for cost, taken in ((0.2, True), (0.3, False)):  # four files of 4 for 16 samples
        bench.store = Store(None)
        monkeypatch.setattr(OnnxRuntime, "opened", lambda s, a, cost=cost: counted(plain(s, a), cost))
        assert (runner(bench, batches(1)[0][0]) is not None) is taken


PREPARED = SOME.replace(prepare=(bs.CorrectBias(),))


@pytest.mark.parametrize(("exporting", "taken"), [(7.0, True), (9.9, True), (10.1, False)])
def test_a_prepared_plan_is_exported_where_that_pays(
    model: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exporting: float, taken: bool
) -> None:
    """64 samples by 16: 4 of the model's calls, or an export and 4 times 8 files' of 1/4 for 2 samples each.

    Two seconds more are taken for what really runs.
    """
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def counted(function: Callable[..., Any], cost: float) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            now[0] += cost
            return function(*args, **named)

        return timed

    path = tmp_path / "runs.db"
    plain = OnnxRuntime.opened
    monkeypatch.setattr("bitsmith.runner.call", counted(call, 4.0))
    monkeypatch.setattr(OnnxRuntime, "opened", lambda s, a: counted(plain(s, a), 0.25))
    with Store(path) as store:
        bench = opened(model, batch=2, store=store)
        gradual = Gradual(bench)
        assert gradual.runner is not None
        assert gradual.runs(SOME) is gradual.runner
        monkeypatch.setattr(OnnxRuntime, "export", counted(OnnxRuntime.export, exporting))
        assert gradual.runs(PREPARED) is (gradual.runner if taken else None)
        x = batches(1)[0][0]
        with gradual._scorer(PREPARED) as scorer, torch.no_grad():
            assert gap_db(scorer(x), bench.simulate(PREPARED)(x)) >= TOLERANCE_DB["onnxruntime"]
            assert not torch.equal(scorer(x), bench.simulate(SOME)(x))
    with Store(path) as store:  # as another process would: it is not timed again
        monkeypatch.setattr("bitsmith.runner._seconds", None)
        found = Gradual(opened(model, batch=2, store=store)).runs(PREPARED)
        assert (found is not None) is taken


def test_a_prepared_plan_whose_file_is_derived_is_run_untimed(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = opened(model)
    bench.everywhere([bench.adapted(SOME)])
    gradual = Gradual(bench)
    monkeypatch.setattr("bitsmith.runner._faster", lambda *_: "runtime")
    assert gradual.runner is not None
    monkeypatch.setattr("bitsmith.runner._seconds", None)
    assert gradual.runs(PREPARED) is gradual.runner
    smoothed = SOME.replace(prepare=(bs.SmoothQuant(0.5, multiply=True),))  # brings in operations: an export of its own
    with pytest.raises(TypeError):
        gradual.runs(smoothed)
    bench.everywhere([])  # none that it is a part of: exporting it has to pay
    with pytest.raises(TypeError):
        Gradual(bench).runs(PREPARED)


@pytest.mark.usefixtures("always")
def test_the_float_network_is_run_where_its_file_computes_what_it_does(
    model: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores are those of the model; a file that computes otherwise, as in bfloat16, is not asked."""
    bench = opened(model)
    gradual = Gradual(bench)
    assert gradual.runner is not None
    assert gradual.runner.exact
    run = gradual.plain("validation")
    stored = bench.store.misses
    assert run.scores.tolist() == bench.score(None).scores.tolist()
    assert bench.store.misses == stored + 1, "two figures, each under a key of its own"
    assert gradual.reference.scores.tolist() == run.scores.tolist()
    assert Evaluator(bench).score(bs.Plan(), "validation").scores.tolist() == run.scores.tolist()

    plain = OnnxRuntime.opened

    def rounded(target: OnnxRuntime, artifact: Any) -> Callable[..., Any]:
        outputs = plain(target, artifact)
        return lambda inputs: [torch.from_numpy(x).bfloat16().float().numpy() for x in outputs(inputs)]

    monkeypatch.setattr(OnnxRuntime, "opened", rounded)
    other = Gradual(opened(model))
    assert other.runner is not None
    assert not other.runner.exact
    monkeypatch.setattr(Gradual, "on", None)
    assert other.reference.scores.tolist() == run.scores.tolist()


def test_costs_of_a_prepared_plan_take_no_export_of_its_own(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = opened(model)
    steps = (bs.CorrectBias(),)
    evaluate = Evaluator(bench, steps)
    _, plain = bench.artifact(bs.Plan()), bench.artifact(bench.adapted(SOME))
    monkeypatch.setattr(OnnxRuntime, "export", None)
    got = evaluate.costs(SOME)
    assert got.plan == bench.adapted(SOME).replace(prepare=steps)
    assert got.bytes == plain.bytes
    assert got.ms is not None
    monkeypatch.undo()
    smoothed = SOME.replace(prepare=(bs.SmoothQuant(0.5, multiply=True), *steps))  # brings in operations
    assert without_values(smoothed) == smoothed
    assert without_values(got.plan) == bench.adapted(SOME)


@pytest.mark.usefixtures("unexported")
def test_scores_are_kept_apart_by_where_they_were_got(model: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated score is not taken for one that was run, nor one run in batches of another size."""
    keys = []
    for choice, batch in (("runtime", 1), ("runtime", 2), ("simulation", 1)):
        monkeypatch.setattr("bitsmith.runner._faster", lambda *_, choice=choice: choice)
        found = bs.evaluator(model, task(), OnnxRuntime(threads=1), batch=batch).gradual
        keys.append(str(found._key(SOME, 0)))
    assert len(set(keys)) == 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
