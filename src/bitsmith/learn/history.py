"""How a training went, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..task import Task


@dataclass(frozen=True)
class TrainingStep:
    """One step. ``loss``: before its update, penalties included, the mean over what was accumulated and over processes.
    ``gradient``: the norm of all gradients, before it was clipped. ``lr``: of the first parameter group.
    ``validation``: the score after the step, None where it was not taken.
    """

    loss: float
    gradient: float
    lr: float
    validation: float | None = None


class History:
    """What :func:`~bitsmith.finetune` fills, one :class:`TrainingStep` by step; a sequence, for reading.

    ``metric``, ``lower``: of the validation score. ``best``: the step, from 1, whose weights were kept; None without
    validation. ``stopped``: whether it ended before its last step, as validation did not improve.

    >>> history = History()
    >>> history.add(TrainingStep(loss=2.0, gradient=0.5, lr=1e-3))
    >>> len(history), history[-1].loss, history.losses
    (1, 2.0, [2.0])
    """

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, validation: Task | None) -> None:
        """Empty, for a training with that validation."""
        self.steps: list[TrainingStep] = []
        self.metric = "" if validation is None else validation.name
        self.lower = validation is not None and validation.lower
        self.best: int | None = None
        self.stopped = False

    def add(self, step: TrainingStep) -> None:
        self.steps.append(step)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> TrainingStep:
        return self.steps[index]

    def __iter__(self) -> Iterator[TrainingStep]:
        return iter(self.steps)

    @property
    def losses(self) -> list[float]:
        return [step.loss for step in self.steps]

    @property
    def validations(self) -> list[tuple[int, float]]:
        """(step, score) where it was taken, steps from 1."""
        return [(i, step.validation) for i, step in enumerate(self.steps, 1) if step.validation is not None]
