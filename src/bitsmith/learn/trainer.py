"""The loop of :func:`~bitsmith.finetune`: its steps, what is kept between them, and how it goes on after a stop."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..data import Forward, call, describe, device_of
from ..model.flow import replaced, tensors
from ..progress import Progress
from .averaging import MovingAverage
from .checkpoint import Checkpoint
from .diagnose import first_not_finite
from .distributed import Processes
from .guide import Guide
from .history import History, TrainingStep
from .loader import Position, Stream
from .loop import Loss, TrainingError, active_cells, objective, settle
from .state import State, copied, put, tensors_of, with_values
from .validation import Validation

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """What :func:`~bitsmith.finetune` was asked for, where the loop needs it."""

    steps: int
    loss: Loss | None
    distance: Loss
    accumulate: int
    clip_norm: float | None
    precision: Precision
    forward: Forward | None
    training: bool
    """The mode of the network that comes back."""
    progress: Progress
    guide: Guide


class Trainer:
    """One training under way. ``run`` takes it to its end, ``load`` to where a checkpoint was made."""

    def __init__(
        self,
        net: nn.Module,
        teacher: nn.Module | None,
        stream: Stream,
        settings: Settings,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler | None,
        average: MovingAverage | None,
        validation: Validation | None,
        processes: Processes,
        history: History,
        call: Mapping[str, str],
    ) -> None:
        self.net, self.teacher, self.stream, self.settings = net, teacher, stream, settings
        self.parameters, self.optimizer, self.schedule = parameters, optimizer, schedule
        self.average, self.validation, self.processes = average, validation, processes
        self.history, self.progress, self.call = history, settings.progress, call
        self.cells, self.device = active_cells(net), device_of(net)
        self.done = 0
        self.good = copied(net)
        """The values with which loss and gradients were last finite."""

    @property
    def finished(self) -> bool:
        stopped = self.validation is not None and self.validation.stops
        return stopped or self.done >= self.settings.steps

    def run(self, checkpoint: Path | None, every: int) -> None:
        """The steps that are left; the network then holds what is to be handed back."""
        guide = self.settings.guide
        while not self.finished:
            found = self._step()
            self.done += 1
            guide.after(self.done, found[0])
            score = None
            if self.validation is not None and self.validation.due(self.done, self.settings.steps):
                score = self._validate(self.validation)
            self.history.add(TrainingStep(*found, validation=score))
            self.progress.advance()
            if checkpoint is not None and (self.done % every == 0 or self.finished):
                self.save(checkpoint)
        guide.end()
        self.history.stopped = self.done < self.settings.steps
        if self.validation is not None and self.validation.state:
            put(self.net, self.validation.state)
        elif self.average is not None:
            put(self.net, self.average.values)

    # -- a step ------------------------------------------------------------------------------------------------------

    def _step(self) -> tuple[float, float, float]:
        """Loss, norm of the gradients and learning rate of one step."""
        for cell in self.cells:
            cell.step(self.done, self.settings.steps)
        self.net.zero_grad()
        total, failed = torch.zeros((), device=self.device), None
        for _ in range(self.settings.accumulate):
            inputs, target = next(self.stream)
            noise = noise_of(self.device)
            loss = self._loss(inputs, target)
            total = total + loss.detach() / self.settings.accumulate
            if failed is None and not bool(loss.isfinite()):
                failed = inputs, noise
            if failed is None or self.processes.world > 1:  # the others wait for the gradients
                (loss / self.settings.accumulate).backward()  # type: ignore[no-untyped-call]
        self.stream.finish_round()
        parameters = [*self.parameters.values()]
        total = self.processes.average(parameters, total)
        if not bool(total.isfinite()):
            raise self._not_finite(float(total), failed)
        self.settings.guide.adjust(self.done)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if not bool(norm.isfinite()):
            raise self._bad_gradient()
        if self.done == 0:
            self._note_unreached()
        if self.settings.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.settings.clip_norm, norm)
        self.good = copied(self.net, self.good)
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        self.processes.follow(self.net)
        if self.average is not None:
            self.average.update(self.net)
        return float(total), float(norm), lr

    def _loss(self, inputs: Any, target: Any) -> Tensor:
        wanted = None
        with self._precision():
            output = call(self.net, inputs, self.settings.forward)
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = call(self.teacher, inputs, self.settings.forward)
        if self.settings.precision != "float32":
            output, wanted = _in_float32(output), _in_float32(wanted)
        total = objective(output, target, self.settings.loss, self.cells, self.device)
        penalty = self.settings.guide.penalty(self.done)
        if penalty is not None:
            total = total + penalty
        if self.teacher is not None:
            total = total + self.settings.distance(output, wanted)
        if not isinstance(total, Tensor) or total.numel() != 1:
            raise TrainingError(
                f"finetune: the loss is {describe(total)}; one number was expected, the mean over the samples "
                "(reduction='mean')"
            )
        if not total.requires_grad:
            raise TrainingError(
                "finetune: the loss depends on no parameter that requires a gradient: look for detach(), argmax or "
                "torch.no_grad() in the model or the loss"
            )
        return total

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.settings.precision == "float32" or self.device is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _validate(self, validation: Validation) -> float:
        def measured() -> float:
            with with_values(self.net, None if self.average is None else self.average.values):
                return validation.measure(self.net)

        try:
            value = self.processes.number(measured, "the validation score of process 0")
        except TrainingError:
            raise
        except ValueError as error:
            raise self._stopped(f"the validation failed after step {self.done}: {error}", self.done, None) from error
        best = self._take(validation, value)
        self.progress.note(f"step {self.done}: {validation.task.name} {value:.4g}{' (best so far)' if best else ''}")
        self.history.best = validation.best_step or None
        return value

    def _take(self, validation: Validation, value: float) -> bool:
        with with_values(self.net, None if self.average is None else self.average.values):
            return validation.take(value, self.done, self.net)

    # -- what can go wrong -------------------------------------------------------------------------------------------

    def _not_finite(self, total: float, failed: tuple[Any, Mapping[str, Tensor]] | None) -> TrainingError:
        step = self.done + 1
        lr = float(self.optimizer.param_groups[0]["lr"])
        text = f"the loss is {total} at step {step} of {self.settings.steps}; a smaller lr than {lr:g} may help"
        if failed is None:
            return self._stopped(f"{text}; it came from another process, whose error says from where", step, None)
        inputs, noise = failed

        def again(work: Callable[[], Any]) -> Any:
            with torch.random.fork_rng(), self._precision():
                set_noise(noise, self.device)
                return work()

        found = first_not_finite(self.net, inputs, self.settings.forward, again)
        return self._stopped(f"{text}; {found.text}", step, found.site)

    def _bad_gradient(self) -> TrainingError:
        names = [
            name for name, p in self.parameters.items() if p.grad is not None and not bool(p.grad.isfinite().all())
        ]
        step = self.done + 1
        return self._stopped(
            f"the gradient at step {step} of {self.settings.steps} is not finite though the loss is, at "
            f"{', '.join(names[:3]) or 'none of the parameters alone, but their norm overflows'}: look for a root or a "
            "quotient at 0, or try a smaller lr",
            *(step, None),
        )

    def _stopped(self, problem: str, step: int, site: str | None) -> TrainingError:
        """The error, with the network as of the last step that was finite."""
        put(self.net, self.good)
        self.net.zero_grad()
        settle(self.net)
        return TrainingError(
            f"finetune: {problem}. This error's .net is the network as of the last step whose loss was finite",
            step=step,
            site=site,
            net=self.net.train(self.settings.training),
        )

    def _note_unreached(self) -> None:
        names = [name for name, parameter in self.parameters.items() if parameter.grad is None]
        if names:
            self.progress.note(
                f"no gradient reaches {len(names)} of {len(self.parameters)} parameters, which stay as they are: "
                f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            )

    # -- on disk -----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write where the training is; all processes come here, process 0 writes."""
        noise = {name: self.processes.all_of(t, "the random states") for name, t in noise_of(self.device).items()}
        if self.processes.rank:
            return
        file, history = Checkpoint(self.call), self.history
        file.hold_all("net", tensors_of(self.net))
        file.hold_all("extra", _extra_states(self.net))
        file.hold("optimizer", self.optimizer.state_dict())
        file.hold("schedule", None if self.schedule is None else self.schedule.state_dict())
        for name, states in noise.items():
            file.hold_all(f"noise {name}", {str(rank): state for rank, state in enumerate(states)})
        place = self.stream.position
        file.hold("loader", {"read": place.read, "taken": place.taken, "start": place.start, "own": place.own})
        if self.average is not None:
            file.hold_all("average", self.average.values)
        if self.validation is not None:
            best = self.validation
            file.hold("validation", {"best": best.best, "best_step": best.best_step, "waited": best.waited})
            file.hold_all("best", best.state)
        rows = [[s.loss, s.gradient, s.lr, math.nan if s.validation is None else s.validation] for s in history]
        file.tensors["history"] = torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)
        file.hold("guide", self.settings.guide.state())
        file.hold("done", self.done)
        file.hold("torch", torch.__version__)
        file.save(path)

    def load(self, path: Path) -> None:
        """Go on from such a file. Raises :class:`TrainingError` if it belongs to another call."""
        file = Checkpoint.load(path)
        file.check_call(self.call, path)
        put(self.net, file.all_held("net"))
        modules = dict(self.net.named_modules())
        for name, state in file.all_held("extra").items():
            modules[name].set_extra_state(state)
        self.optimizer.load_state_dict(file.held("optimizer"))
        if self.schedule is not None:
            self.schedule.load_state_dict(file.held("schedule"))
        self.stream.seek(Position(**file.held("loader")))
        if self.average is not None:
            self.average.values = self._here(file.all_held("average"))
        if self.validation is not None:
            self.validation.__dict__.update(file.held("validation"))
            self.validation.state = self._here(file.all_held("best"))
            self.history.best = self.validation.best_step or None
        for loss, gradient, lr, score in file.tensors["history"].tolist():
            self.history.add(TrainingStep(loss, gradient, lr, None if math.isnan(score) else score))
        self.done = file.held("done")
        self.settings.guide.resume(file.held("guide"), self.done)
        self.good = copied(self.net)
        rank = str(self.processes.rank)
        set_noise({name: file.all_held(f"noise {name}")[rank] for name in noise_of(self.device)}, self.device)
        if file.held("torch") != torch.__version__:
            self.progress.note(
                f"the checkpoint is of torch {file.held('torch')}: the last bits may differ from its own"
            )
        self.progress.note(f"going on after step {self.done} of {self.settings.steps} ({path})")

    def _here(self, values: State) -> State:
        return {name: tensor if self.device is None else tensor.to(self.device) for name, tensor in values.items()}


def noise_of(device: torch.device | None) -> dict[str, Tensor]:
    """The states of the random numbers that a network on this device draws."""
    found = {"cpu": torch.get_rng_state()}
    if device is not None and device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def set_noise(states: Mapping[str, Tensor], device: torch.device | None) -> None:
    """Put back what :func:`noise_of` gave."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        assert device is not None
        torch.cuda.set_rng_state(states["cuda"], device)


def _in_float32(value: Any) -> Any:
    """Half-precision tensors of an output as float32."""
    half = (torch.bfloat16, torch.float16)
    return replaced(value, iter([x.float() if x.dtype in half else x for x in tensors(value)]))


def _extra_states(net: nn.Module) -> dict[str, Tensor]:
    """What modules keep beside parameters and buffers, by their names: tensors only."""
    found = {}
    for name, module in net.named_modules():
        if type(module).get_extra_state is nn.Module.get_extra_state:
            continue
        state = module.get_extra_state()
        if not isinstance(state, Tensor):
            raise TrainingError(
                f"checkpoint=: get_extra_state of {name or 'the network'!r} gives a {type(state).__name__}, which a "
                "file without pickle cannot hold: let it give a tensor"
            )
        found[name] = state
    return found
