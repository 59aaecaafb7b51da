"""What is tried next, by Optuna's samplers: a function of the seed and of what earlier batches gave.

Optuna's study stands in memory, is told whole batches in order, and gets a sampler that is seeded anew for each
trial. So what is tried depends neither on how many processes measure nor on where one was stopped.
"""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any

from .program import Choice, Program


def require() -> Any:
    """The module ``optuna``; raises ``ModuleNotFoundError`` with the line that installs it."""
    try:
        return import_module("optuna")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"searches.Pareto needs Optuna, which is not installed ({error.name} is missing): "
            'pip install "bitsmith[explore]"'
        ) from None


@contextmanager
def quiet() -> Iterator[Any]:
    """The module ``optuna`` without its log lines and without warnings about what of it may change."""
    optuna = require()
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # the one way to give constraints that both Optuna 4 and 5 have
            warnings.filterwarnings("ignore", message=".*constraints_func", category=FutureWarning)
            yield optuna
    finally:
        optuna.logging.set_verbosity(before)


@dataclass(frozen=True)
class Space:
    """The decisions of a program as Optuna's categories: ``names`` and ``options`` [decision][technique], as text."""

    names: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, program: Program) -> Space:
        texts = [tuple(map(str, unit.techniques)) for unit in program.units]
        return cls(
            tuple(unit.sites[0] for unit in program.units),
            tuple(
                row if len(set(row)) == len(row) else tuple(f"{k}: {text}" for k, text in enumerate(row))
                for row in texts
            ),
        )

    def distributions(self) -> dict[str, Any]:
        kind = require().distributions.CategoricalDistribution
        return {name: kind(row) for name, row in zip(self.names, self.options, strict=True)}

    def params(self, choice: Sequence[int]) -> dict[str, str]:
        return {name: row[k] for name, row, k in zip(self.names, self.options, choice, strict=True)}

    def choice(self, params: Mapping[str, str]) -> Choice:
        return tuple(row.index(params[name]) for name, row in zip(self.names, self.options, strict=True))

    def everything(self) -> Iterator[Choice]:
        return itertools.product(*(range(len(row)) for row in self.options))


def sampler_of(name: str, population: int, seed: int) -> Any:
    optuna = require()

    def constraints(trial: Any) -> Sequence[float]:
        found: Sequence[float] = trial.user_attrs.get("constraints", ())
        return found

    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, constraints_func=constraints)
    return optuna.samplers.NSGAIISampler(population_size=population, seed=seed, constraints_func=constraints)


class Proposals:
    """What is tried next, by batches of ``population``: nothing twice, whatever the sampler proposes.

    A proposal that is known has decisions changed at random until it is new: in a small space NSGA-II repeats itself.
    """

    def __init__(self, space: Space, objectives: int, sampler: str, population: int, seed: int) -> None:
        self.space, self.sampler, self.population, self.seed = space, sampler, population, seed
        self._distributions = space.distributions()
        self._tried: set[Choice] = set()
        self._open: dict[int, tuple[Any, Choice]] = {}
        with quiet() as optuna:
            self._study = optuna.create_study(
                directions=["minimize"] * objectives, sampler=sampler_of(sampler, population, seed=0)
            )

    def batch(self, first: int, given: Mapping[int, Choice]) -> dict[int, Choice]:
        """Choices by index from ``first`` on, those of ``given`` as they are; fewer once every plan was tried."""
        with quiet():
            for index in range(first, first + self.population):
                # of its own, so that it does not matter which others of the batch were given
                generator = random.Random(f"{self.seed}/{index}")
                self._study.sampler = sampler_of(self.sampler, self.population, generator.getrandbits(31))
                if index not in given and len(self._tried) == prod(map(len, self.space.options)):
                    break
                trial = self._ask(given[index]) if index in given else self._new(generator)
                choice = self.space.choice(trial.params)
                self._open[index] = trial, choice
                self._tried.add(choice)
        return {index: choice for index, (_, choice) in self._open.items()}

    def told(self, outcomes: Mapping[int, tuple[Sequence[float], Sequence[float]]]) -> None:
        """The values and the excesses over limits of the whole batch, by index."""
        with quiet():
            for index, (trial, _) in self._open.items():
                values, excesses = outcomes[index]
                trial.set_user_attr("constraints", list(excesses))
                self._study.tell(trial, list(values))
        self._open = {}

    def dropped(self) -> None:
        """The batch was not tried after all."""
        with quiet() as optuna:
            for trial, choice in self._open.values():
                self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
                self._tried.discard(choice)
        self._open = {}

    def _ask(self, choice: Choice | None) -> Any:
        if choice is not None:
            self._study.enqueue_trial(self.space.params(choice))
        trial = self._study.ask(self._distributions)
        # NSGA-II numbers generations while it samples, which Optuna leaves out where everything is given
        _ = trial.relative_params
        return trial

    def _new(self, generator: random.Random) -> Any:
        trial = self._ask(None)
        choice = self.space.choice(trial.params)
        if choice not in self._tried:
            return trial
        self._study.tell(trial, state=require().trial.TrialState.FAIL)
        open_ = [u for u, row in enumerate(self.space.options) if len(row) > 1]
        for _ in range(2 * len(open_)):
            unit = generator.choice(open_)
            k = generator.randrange(len(self.space.options[unit]))
            choice = (*choice[:unit], k, *choice[unit + 1 :])
            if choice not in self._tried:
                break
        else:
            choice = next(one for one in self.space.everything() if one not in self._tried)
        return self._ask(choice)
