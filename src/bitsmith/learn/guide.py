"""What leads a training from step to step, beside its loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


class Guide(ABC):
    """Acts on the network that is trained, between the steps of :func:`~bitsmith.finetune`.

    A guide is for one training. Its text (``str``) says what it was asked for: a checkpoint of a guide with another
    text is refused. In several processes each has one, which sees the same gradients; so all do alike.
    """

    @abstractmethod
    def __str__(self) -> str: ...

    def begin(self, net: nn.Module) -> None:
        """Once, with the network that will be trained, before its optimizer is made."""
        return

    def penalty(self, done: int) -> Tensor | None:
        """What comes to the loss of this step: shape (), or None."""
        return None

    def adjust(self, done: int) -> None:
        """Between the gradients of a step and the optimizer's: gradients may be changed, or set to None."""
        return

    def after(self, done: int, loss: float) -> None:
        """After each step, ``done`` counting it; ``loss``: of the step, penalties included."""
        return

    def end(self) -> None:
        """After the last step, before what is kept is handed back."""
        return

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the network: numbers, strings, tensors, lists and mappings of them."""
        return {}

    def resume(self, state: Mapping[str, Any], done: int) -> None:
        """Go on from :meth:`state` after ``done`` steps; the network holds its values of then."""
        return


class NoGuide(Guide):
    """Leaves a training alone."""

    def __str__(self) -> str:
        return "none"
