"""Training under a plan: an ordinary loop that also calls what cells owe to training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .._files import check_writable
from .._hash import hash_function, hash_state
from ..data import Forward, describe, one_shot
from ..model.apply import computer_of, is_applied
from ..model.flow import tensors
from ..model.network import duplicate
from ..progress import Progress, Silent
from ..task import Task
from .averaging import MovingAverage
from .distributed import Processes
from .guide import Guide, NoGuide
from .history import History
from .loader import Stream
from .loop import Loss, settle, training_mode
from .loop import TrainingError as TrainingError
from .norms import batch_norms, reestimate_norms
from .parameters import Groups, MakeOptimizer, MakeSchedule, described, optimizer_of
from .trainer import Precision, Settings, Trainer
from .validation import Validation


def divergence(output: Any, reference: Any) -> torch.Tensor:
    """Kullback-Leibler divergence of the teacher's classes from the student's, in nats, the mean over samples: what
    distillation minimizes (Hinton et al. 2015, arXiv:1503.02531, temperature 1).

    Both hold logits along the last axis; of several outputs the sum over the floating ones. Raises
    :class:`TrainingError` for outputs of different shapes.

    >>> float(divergence(torch.zeros(2, 3), torch.zeros(2, 3)))
    0.0
    """
    ours, theirs = list(tensors(output)), list(tensors(reference))
    if [x.shape for x in ours] != [x.shape for x in theirs]:
        raise TrainingError(
            f"finetune: the network gives {describe(output)} and its teacher {describe(reference)}: their "
            "divergence needs equal shapes; take a teacher with the same outputs, or give distance= that compares these"
        )
    found = [
        F.kl_div(F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1), reduction="none", log_target=True)
        .sum(-1)
        .mean()
        for a, b in zip(ours, theirs, strict=True)
        if a.is_floating_point()
    ]
    return torch.stack(found).sum()


def finetune(
    net: nn.Module,
    loader: Iterable[Any],
    loss: Loss | None = None,
    *,
    steps: int,
    teacher: nn.Module | None = None,
    distance: Loss = divergence,
    lr: float = 1e-4,
    optimizer: MakeOptimizer | None = None,
    schedule: MakeSchedule | None = None,
    groups: Groups | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    precision: Precision = "float32",
    freeze_norms: bool = True,
    reestimate: int = 0,
    ema: float | None = None,
    validation: Task | None = None,
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    every: int = 100,
    history: History | None = None,
    guide: Guide | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> nn.Module:
    """A copy of ``net``, trained for ``steps`` batches of ``loader``, in the mode (train or eval) of ``net``.

    ``net`` may come from :func:`~bitsmith.apply`, or be an ordinary model. Neither ``net`` nor ``teacher`` is changed.
    Minimized: ``loss(output, target)``, and with a ``teacher`` (a model that is run in eval on the same inputs) beside
    it ``distance(output, reference)``, the reference being what the teacher gives; and the ``penalty`` of every cell.
    With a teacher ``loss`` may be None; then targets are not read. ``loader``: items ``(inputs, target)``, read again
    from its start as often as needed; a one-shot iterator is read once. Before each step every cell's ``step`` is
    called; at the end the technique that a cell's ``settle`` gives takes the place of its own in the plan.

    **How.** Adam (Kingma and Ba 2015, arXiv:1412.6980) with ``lr`` that falls to 0 along half a cosine (Loshchilov and
    Hutter 2017, arXiv:1608.03983), or ``optimizer(parameters)`` with a learning rate that stays. ``schedule(optimizer,
    steps)``: another schedule of torch's, stepped after each step. ``groups``: shell patterns of parameter names with
    the options of a parameter group each, such as ``{"_bitsmith.*": {"lr": 1e-3}}`` for all that the plan added; the
    optimizer then gets groups. ``accumulate``: batches by step; their mean gradient is that of one batch so many times
    as large. ``clip_norm``: the norm that all gradients together are scaled down to (Pascanu et al. 2013,
    arXiv:1211.5063). ``precision="bfloat16"``: the network runs under ``torch.autocast`` (Micikevicius et al. 2018,
    arXiv:1710.03740), losses in float32; what cells simulate is then only as exact as bfloat16.

    **Batch normalisations.** ``freeze_norms``: they keep their statistics, so that what folds them is trained as it
    ships (Krishnamoorthi 2018, arXiv:1806.08342, section 4); False trains them as usual. ``reestimate``: at the
    end their statistics are measured again on so many items of the loader
    (:func:`~bitsmith.learn.norms.reestimate_norms`).

    **What is kept.** ``ema``: what is validated and comes back is a moving average with this decay of weights and
    buffers. ``validation``: a :class:`~bitsmith.Task`, whose metric or ``evaluate`` is taken on its validation data
    every ``validate_every`` steps (a tenth of all by default) and after the last; the best weights come back.
    ``patience``: so many scores in a row that are no better end the training. ``history``: a
    :class:`~bitsmith.History`, emptied and filled step by step.

    ``guide``: a :class:`~bitsmith.Guide` of this training alone, which may add to the loss and change gradients and the
    network between steps.

    **After a stop.** ``checkpoint``: a safetensors file, written whole every ``every`` steps and at the end. Where it
    is there already, the same call goes on from it and ends with the same bits as without the stop; another call is
    refused with what differs. The loader must give the same items in the same order by torch's global generator (the
    skipped ones are read again); NumPy's and Python's random numbers are not kept.

    **Several processes.** In a group of ``torch.distributed`` (run by ``torchrun``, after ``init_process_group``)
    every process makes this call alike. Process r of n takes the items r, r + n, ... and all take the mean gradient, so
    a step is one of ``accumulate * n`` items; buffers follow process 0, which also validates and writes the checkpoint.
    A process that is lost ends the others with an error, at the latest after the timeout of ``init_process_group``.

    The same ``seed`` gives the same result, a loader's own shuffling by torch's global generator included; that
    generator is left as it was. Raises :class:`TrainingError` where nothing trains, for a loss or gradient that is not
    finite (with the step, the site, and the last good network as ``.net``), a teacher of another output, a checkpoint
    of another call or a damaged one, a lost process; ``DataError`` for a loader that ends before ``steps``.
    """
    for name, value in (
        ("steps", steps),
        ("accumulate", accumulate),
        ("every", every),
        ("validate_every", validate_every),
    ):
        if value is not None and value < 1:
            raise ValueError(f"finetune({name}={value}): at least 1")
    if loss is None and teacher is None:
        raise ValueError("finetune: give loss(output, target), a teacher, or both")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"finetune(clip_norm={clip_norm}): above 0, or None to leave gradients as they are")
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"finetune(precision={precision!r}): must be 'float32' or 'bfloat16'")
    if patience is not None and (validation is None or patience < 1):
        raise ValueError(f"finetune(patience={patience}): at least 1, together with validation=")
    trained, reference = duplicate(net), None if teacher is None else duplicate(teacher).eval()
    _check_reestimate(reestimate, trained, loader)
    guide = NoGuide() if guide is None else guide
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        check_writable(path.parent)
    processes = Processes()
    average = None if ema is None else MovingAverage(ema)
    judge = None
    if validation is not None:
        judge = Validation(validation, validate_every or math.ceil(steps / 10), patience, seed)
    history = History() if history is None else history
    history.begin(validation)
    settings = Settings(
        *(steps, loss, distance, accumulate, clip_norm, precision, forward, net.training),
        progress=Silent() if progress is None or processes.rank else progress,
        guide=guide,
    )
    with torch.random.fork_rng(), torch.enable_grad():
        guide.begin(trained)
        chosen, scheduled, parameters = optimizer_of(trained, steps, lr, optimizer, schedule, groups)
        asked: dict[str, str] = {}
        if path is not None or processes.world > 1:
            asked = {
                **_network(trained, "network"),
                **({} if reference is None else {**_network(reference, "teacher"), "distance": _function(distance)}),
                "steps": str(steps),
                "loss": _function(loss),
                "optimizer": described(chosen),
                "schedule": "none" if scheduled is None else f"{type(scheduled).__name__} {_function(schedule)}",
                "accumulate": str(accumulate),
                "clip_norm": str(clip_norm),
                "precision": precision,
                "freeze_norms": str(freeze_norms),
                "ema": str(ema),
                "validation": str(judge),
                "guide": str(guide),
                "seed": str(seed),
                "processes": str(processes.world),
            }
        training_mode(trained, freeze_norms)
        items_by_step = accumulate * processes.world
        stream = Stream(loader, seed, share=(processes.rank, processes.world), steps=steps, by_step=items_by_step)
        # what the network draws, apart from what the loader draws, and another in each process
        torch.manual_seed((seed + 1) * 1_000_003 + processes.rank)
        trainer = Trainer(
            *(trained, reference, stream, settings, parameters, chosen, scheduled),
            *(average, judge, processes, history, asked),
        )
        settings.progress.start("fine-tuning", steps)
        if path is not None and path.exists():
            trainer.load(path)
            settings.progress.advance(trainer.done)
        processes.check_same({**asked, "the step of the checkpoint": str(trainer.done)})
        trainer.run(path, every)
        if reestimate:
            again = itertools.islice(Stream(loader, seed), reestimate)
            reestimate_norms(trained, (inputs for inputs, _ in again), forward)
    trained.zero_grad()
    settle(trained)
    return trained.train(net.training)


def _check_reestimate(items: int, net: nn.Module, loader: Any) -> None:
    if items < 0:
        raise ValueError(f"finetune(reestimate={items}): a number of items, or 0")
    if items and not batch_norms(net):
        raise TrainingError(f"finetune(reestimate={items}): the network has no batch normalisation with statistics")
    if items and one_shot(loader):
        raise ValueError(
            f"finetune(reestimate={items}) reads the loader again, and a one-shot iterator cannot be: give a list or a "
            "DataLoader"
        )


def _network(net: nn.Module, name: str) -> dict[str, str]:
    """What identifies a network: its values, and the technique of each site."""
    found = {f"weights of the {name}": hash_state(net)[:12]}
    if is_applied(net):
        plan = computer_of(net).plan
        found |= {f"plan of the {name} at {site}": repr(technique) for site, technique in plan.sites.items()}
    return found


def _function(function: Callable[..., Any] | None) -> str:
    """A function's name and a hash of what it computes."""
    if function is None:
        return "none"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} ({hash_function(function)[:8]})"
