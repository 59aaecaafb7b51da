"""Work for other processes: what is sent to a worker of a ``concurrent.futures.Executor``, and what comes back.

Accuracy goes to workers, times never: those are taken in the parent while no worker has work of ours, because timings
side by side would disturb one another. What comes back is put into the parent's store under the keys of the serial
code, so that serial runs go on from it and it from theirs. A worker computes what the parent would have, bit for bit on
the same kind of processor: it gets the ranges that the parent collected, and as many threads as the parent has.

What lives only between the processes of one run is pickled, as every executor does it; no file is.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dataclasses
import hashlib
import io
import os
import pickle
import threading
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from .bench import Bench, code_key
from .data import batch_size, first_inputs, items
from .gradual import Certainty, Gradual
from .model.network import duplicate, network
from .plan import Plan
from .sensitivity.base import Pair, Sensitivity
from .store import Store
from .targets.base import Target
from .technique import Technique
from .training import Training

_opened: OrderedDict[tuple[int, str], Bench] = OrderedDict()  # the last two
_opening = threading.Lock()


class WorkerError(RuntimeError):
    """Something cannot be sent to a worker, or opened there: says what, and what to do."""


@dataclass(frozen=True)
class Recipe:
    """What a worker needs to measure a model as its parent does. ``data``: the network, task and seed, pickled once."""

    data: bytes = field(repr=False)
    digest: str
    threads: int
    versions: tuple[str, str]


def recipe_of(bench: Bench, validation: bool = True) -> Recipe:
    """The recipe of a bench; test data are never in it, nor is the target: nothing is exported or timed elsewhere.

    ``validation=False`` leaves that out too. Raises :class:`WorkerError` naming what cannot be pickled.
    """
    task = dataclasses.replace(bench.task, test=None)
    if not validation:
        task = dataclasses.replace(task, validation=task.calibration)
    keys = {"model_key": bench.model_key, "calibration_key": bench.calibration_key, "choose": bench.choose}
    parts = {f"task.{item.name}": getattr(task, item.name) for item in dataclasses.fields(task)}
    parts["the model"] = bench.model
    data = packed((bench.model, sorted(bench.net.expand), task, bench.seed, keys), parts)
    return Recipe(data, hashlib.sha256(data).hexdigest(), torch.get_num_threads(), _versions())


def packed(value: Any, parts: Mapping[str, Any]) -> bytes:
    """``value`` as bytes: by cloudpickle if that is installed, which takes lambdas and notebooks' functions too.

    Raises :class:`WorkerError` naming those of ``parts`` that cannot be pickled.
    """
    try:
        return _dumps(value)
    except Exception as error:
        bad = [name for name, part in parts.items() if not _picklable(part)] or list(parts)
        hint = "" if _cloudpickle() is not None else ", or pip install cloudpickle"
        raise WorkerError(
            f"{', '.join(bad)} cannot be sent to a worker ({type(error).__name__}: {error}): define it at the top "
            f"level of a module that the workers can import{hint}; or leave executor= out"
        ) from error


def _picklable(value: Any) -> bool:
    with contextlib.suppress(Exception):
        return bool(_dumps(value))
    return False


def _cloudpickle() -> Any:
    try:
        import cloudpickle  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return None
    return cloudpickle


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    module = _cloudpickle() or pickle
    known = copyreg.dispatch_table if module is pickle else module.Pickler.dispatch_table
    # batches cut from one tensor would each bring all of it
    ours = type("Pickler", (module.Pickler,), {"dispatch_table": ChainMap({Tensor: _compact}, known)})
    ours(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _compact(tensor: Tensor) -> Any:
    if tensor.layout == torch.strided and tensor.untyped_storage().nbytes() > tensor.nbytes:
        tensor = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return tensor.__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # type: ignore[no-untyped-call]


def _versions() -> tuple[str, str]:
    return torch.__version__, code_key()


def perform(recipe: Recipe, work: bytes) -> Any:
    """Run in a worker: ``function(bench, *arguments)`` on the recipe's bench, with an in-memory store of its own."""
    function, statistics, arguments = _unpacked(work)
    bench = copy.copy(_open(recipe))
    with Store(None) as bench.store, _threads(recipe.threads):
        bench.net = bench.net.with_statistics(statistics)
        return function(bench, *arguments)


def decide_remotely(
    bench: Bench,
    certainty: Certainty,
    plan: Plan,
    limit: float,
    chance: float,
    known: Sequence[float],
    reference: Mapping[str, Any],
    data_key: str,
) -> Any:
    """Run in a worker: the scores of :meth:`Gradual.decide`, [samples] in random order, ``known`` first; or where every
    evaluation sees the whole set, that score as JSON values. ``reference``: the float network's."""
    bench._digests = {"validation": data_key}  # the parent read it all; here only what is scored is read
    bench.store.put("accuracy", bench.score_key(None, "validation"), reference)
    gradual = Gradual(bench, certainty, run=False)
    if gradual.why_whole:
        return bench.score(plan).to_json()
    keep_scores(gradual, plan, known, 0)
    return gradual.decide(plan, limit, chance).scores.tolist()


def score_pairs(
    bench: Bench, pairs: Sequence[Pair], sensitivity: Sensitivity, chosen: Mapping[Technique, Plan], train: Training
) -> tuple[list[float], int]:
    """Run in a worker: the losses of these pairs, in order, and the samples that were forwarded for them. ``chosen``:
    the range methods of each technique. ``train``: what goes before the scores of what needs training."""
    bench.chosen.take(chosen)
    counted = Counted(bench.task.calibration)
    task = dataclasses.replace(bench.task, calibration=counted)
    # a copy: in a pool of threads others use the model at the same time, and evaluating sets its flags
    got = sensitivity(duplicate(bench.model), task, pairs, lambda plan: bench.trial(train.of(plan)))
    return [float(loss) for loss in cast(Iterator[float], got)], counted.samples


class Counted:
    """A loader that counts the samples that were read from it."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self.samples = 0

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for inputs, target in items(self.loader, "calibration"):
            self.samples += batch_size(inputs)
            yield inputs, target


def call_remotely(work: bytes, plan: bytes) -> Any:
    """Run in a worker: a pickled function of a pickled plan."""
    return _unpacked(work)(_unpacked(plan))


def _open(recipe: Recipe) -> Bench:
    key = os.getpid(), recipe.digest  # a forked worker inherits what its parent had open
    with _opening:
        if key not in _opened:
            if recipe.versions != _versions():
                raise WorkerError(
                    f"a worker has torch {torch.__version__}, its parent torch {recipe.versions[0]}, or another "
                    "Bitsmith: the results would differ; install the same versions on both"
                )
            model, names, task, seed, keys = _unpacked(recipe.data)
            net = network(model, first_inputs(task.calibration), forward=task.forward, names=names)
            bench = Bench(model, task, cast(Target, None), cast(Store, None), net, Path(), seed=seed)
            seen = bench.model_key
            if any(seen[part] != keys["model_key"][part] for part in ("state", "trace")):
                raise WorkerError(
                    "a worker records another network than its parent: it has another version of the model"
                )
            vars(bench).update(keys)  # computed once, by the parent
            _opened[key] = bench
            while len(_opened) > 2:
                _opened.popitem(last=False)
        _opened.move_to_end(key)
        return _opened[key]


def _unpacked(data: bytes) -> Any:
    try:
        return pickle.loads(data)
    except Exception as error:
        raise WorkerError(
            f"a worker cannot open what it was sent ({type(error).__name__}: {error}): it needs the same modules on "
            "its path as the parent; define the model and the functions of the task in a module that it can import, "
            "or pip install cloudpickle in the parent"
        ) from error


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as the parent: sums over other parts round otherwise."""
    before = torch.get_num_threads()
    change = torch.set_num_threads if before != count else lambda _: None  # not in a pool of threads: others compute
    change(count)
    try:
        yield
    finally:
        change(before)


@dataclass(frozen=True)
class Lost:
    """In place of a result: the worker or the way to it is gone. The parent does that job again itself."""

    why: str


class Crew:
    """The executor as the parent uses it: sends work out, and tells a lost worker from an error of the work itself."""

    def __init__(self, executor: Executor, note: Callable[[str], None]) -> None:
        from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor  # the first is slow to import

        self.executor, self.note = executor, note
        self.broken = False
        # these say which jobs have begun; of others, such as Dask's, a cancelled job would go on unseen
        self._exact = isinstance(executor, (ProcessPoolExecutor, ThreadPoolExecutor))

    def send(
        self, recipe: Recipe, function: Callable[..., Any], statistics: Mapping[str, Any], *arguments: Any
    ) -> Future[Any] | None:
        """A future of ``function(bench, *arguments)`` on the recipe's bench; None as for :meth:`submit`."""
        parts = {str(getattr(part, "__qualname__", type(part).__name__)): part for part in arguments}
        return self.submit(perform, recipe, packed((function, statistics, arguments), parts))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any] | None:
        """``executor.submit``; None once the executor is broken, which is noted."""
        try:
            if not self.broken:
                return self.executor.submit(function, *arguments)
        except Exception as error:
            if not _is_loss(error):
                raise
            self.broken = True
            self.note(f"the workers are gone ({_told(error)}): what is left is done in this process")
        return None

    def result(self, future: Future[Any]) -> Any:
        """What the work gave, or :class:`Lost`; raises what the work raised."""
        try:
            return future.result()
        except Exception as error:
            if not _is_loss(error):
                raise
            return Lost(_told(error))

    def withdraws(self, future: Future[Any]) -> bool:
        """Take it back if it has not begun; False if it has, or if the executor cannot tell."""
        return self._exact and future.cancel()


def _is_loss(error: BaseException) -> bool:
    """Whether a worker or its connection failed, and not the work. Dask's errors are told by the module they are in."""
    dask = any(kind.__module__.partition(".")[0] == "distributed" for kind in type(error).__mro__)
    return dask or isinstance(error, (BrokenExecutor, CancelledError))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def keep_scores(gradual: Gradual, plan: Plan, scores: Sequence[float], first: int) -> None:
    """Put scores from that position on into the store, batch by batch as :meth:`Gradual.decide` does."""
    assert gradual._source is not None
    for start in range(first, len(scores), gradual._source.chunk):
        chunk = list(scores[start : start + gradual._source.chunk])
        gradual.bench.store.put("scores of samples", gradual._key(plan, start), chunk)
