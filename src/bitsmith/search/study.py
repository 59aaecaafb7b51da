"""A list of trials in an Optuna storage that several processes, on several machines, may work off together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

from .._hash import from_plain, hash_json, to_plain
from ..plan import Plan, PlanError
from .base import Evaluation, Point
from .program import Choice
from .proposals import Space, require, sampler_of
from .storage import StudyError, connected, explained

Judge = Callable[[Point], tuple[Sequence[float], Sequence[float]]]
"""The objectives' values of a point, and its excesses over the limits."""


class Tried(Protocol):
    """Measures a choice (None once the time is over), and is told what another process measured."""

    def __call__(self, choice: Choice) -> Point | None: ...

    def learned(self, choice: Choice, evaluation: Evaluation) -> None: ...


_SETTINGS = "bitsmith"
_PATIENCE = 1.5
"""Times the longest that a trial took: after that, its process is taken for dead."""

_KEPT = ". What was measured is kept, and counts on the next run"


@dataclass
class _Row:
    """What the storage holds of one index: the choice that counts, and the evaluation that came first.

    ``begun``: when trials of it were taken that are not finished, by their number.
    """

    choice: Choice
    evaluation: Evaluation | None = None
    waiting: bool = False
    begun: dict[int, datetime] = field(default_factory=dict)


class Ledger:
    """The trials of a stored study by index. Several processes may hold one at the same time.

    A trial that another process took long ago is taken once more by one that has nothing else to do (Dean and Ghemawat
    2004, OSDI, section 3.6): so none that died is waited for. The first outcome stands.
    """

    def __init__(
        self, study: Any, space: Space, classes: Sequence[type], tried: Tried, judge: Judge, where: str
    ) -> None:
        self._study, self._space, self._classes = study, space, classes
        self._tried, self._judge, self._where = tried, judge, where
        self._distributions = space.distributions()
        self._read: dict[int, Evaluation | None] = {}
        self._own: dict[int, Evaluation] = {}
        self._patience = timedelta()

    def known(self) -> dict[int, _Row]:
        """All trials by index."""
        with explained(self._where, _KEPT):
            trials = self._study.get_trials(deepcopy=False)
        rows: dict[int, _Row] = {}
        states = require().trial.TrialState
        finished = [trial for trial in trials if trial.state == states.COMPLETE]
        took = (trial.duration for trial in finished if trial.duration is not None)
        self._patience = _PATIENCE * max(took, default=timedelta())
        for trial in sorted(trials, key=lambda trial: trial.number):
            if "index" in trial.user_attrs:
                row = rows.setdefault(trial.user_attrs["index"], _Row(tuple(trial.user_attrs["choice"])))
                row.waiting |= trial.state == states.WAITING
                if trial.state == states.RUNNING:
                    row.begun[trial.number] = trial.datetime_start
        for trial in sorted(finished, key=lambda trial: (trial.datetime_complete, trial.number)):
            known = rows.get(trial.user_attrs.get("index", -1))
            if known is not None and known.evaluation is None and known.choice == tuple(trial.user_attrs["choice"]):
                known.evaluation = self._evaluation(trial)
        for index, row in rows.items():
            row.evaluation = row.evaluation or self._own.get(index)
            if row.evaluation is not None:
                self._tried.learned(row.choice, row.evaluation)
        return rows

    def _evaluation(self, trial: Any) -> Evaluation | None:
        if trial.number not in self._read:
            self._read[trial.number] = _decoded(trial.user_attrs.get("evaluation"), self._classes)
        return self._read[trial.number]

    def offer(self, choices: Mapping[int, Choice]) -> dict[int, Choice]:
        """Put those that are not known yet on the list; what now stands there under these indices."""
        known = self.known()
        for index, choice in choices.items():
            if index not in known:
                self._enqueue(index, choice)
        known = self.known()
        return {index: known[index].choice for index in choices}

    def run(self, choices: Mapping[int, Choice]) -> bool:
        """Have all of these measured, by this process or others; False once the time is over."""
        while True:
            known = self.known()
            missing = [index for index in choices if known[index].evaluation is None]
            if not missing:
                return True
            if not any(known[index].waiting for index in missing) and not self._repeated(known, missing):
                time.sleep(min(max(self._patience.total_seconds() / 50, 0.02), 2.0))  # others may be done soon
                continue
            with explained(self._where, _KEPT):
                trial = self._study.ask()
                index, choice = trial.user_attrs.get("index", -1), tuple(trial.user_attrs.get("choice", ()))
                row = self.known().get(index) if index in missing else None
                twice = row is not None and min(row.begun) < trial.number and not trial.user_attrs["again"]
                if row is None or row.evaluation is not None or row.choice != choice or twice:
                    # another process was faster
                    self._study.tell(trial, state=require().trial.TrialState.FAIL, skip_if_finished=True)
                    continue
            point = self._tried(choice)
            if point is None:
                return False
            self._finish(trial, index, point)

    def _repeated(self, known: Mapping[int, _Row], missing: Sequence[int]) -> bool:
        """List one again whose process takes far longer than any has, or has died."""
        now = datetime.now()
        late = [i for i in missing if all(now - begun > self._patience for begun in known[i].begun.values())]
        if late:
            index = late[os.getpid() % len(late)]
            self._enqueue(index, known[index].choice, again=True)
        return bool(late)

    def _enqueue(self, index: int, choice: Choice, again: bool = False) -> None:
        params = self._space.params(choice)
        with explained(self._where, _KEPT):
            optuna = require()
            # with its parameters, so that taking it is one transaction
            trial = optuna.create_trial(
                state=optuna.trial.TrialState.WAITING,
                params=params,
                distributions=self._distributions,
                user_attrs={"index": index, "choice": list(choice), "again": again},
            )
            self._study.add_trial(trial)

    def _finish(self, trial: Any, index: int, point: Point) -> None:
        assert point.evaluation is not None
        # a slow trial may have been taken for dead and ended by another process: then what that one found counts
        ended = require().exceptions.UpdateFinishedTrialError
        with explained(self._where, _KEPT), contextlib.suppress(ended):
            if self.known()[index].evaluation is not None:
                self._study.tell(trial, state=require().trial.TrialState.FAIL, skip_if_finished=True)
                return
            self._own[index] = point.evaluation
            values, excesses = self._judge(point)
            trial.set_user_attr("constraints", list(excesses))
            trial.set_user_attr("evaluation", _encoded(point.evaluation))
            self._study.tell(trial, list(values), skip_if_finished=True)


@contextmanager
def stored(
    storage: str | Path,
    name: str,
    settings: Mapping[str, Any],
    space: Space,
    classes: Sequence[type],
    tried: Tried,
    judge: Judge,
) -> Iterator[Ledger]:
    """The ledger of the study ``name`` in a storage: made, or gone on with if it was made with the same settings.

    ``settings``: of the search, with ``objectives`` and ``sampler``. ``classes``: of techniques that plans may hold.
    Raises :class:`StudyError` for a storage that cannot be used and for a study of another search.
    """
    settings = {**settings, "decisions": hash_json([space.names, space.options])}
    with connected(storage) as (optuna, database, where):
        with explained(where):
            study = optuna.create_study(
                storage=database,
                study_name=name,
                directions=["minimize"] * len(settings["objectives"]),
                sampler=sampler_of(settings["sampler"], settings["population"], settings["seed"]),
                load_if_exists=True,
            )
            fresh = not study.get_trials(deepcopy=False)
            if fresh and _SETTINGS not in study.user_attrs:
                study.set_user_attr(_SETTINGS, to_plain(settings))
            kept = study.user_attrs.get(_SETTINGS)
        if kept != to_plain(settings):
            other = kept or {}
            differ = [key for key, value in to_plain(settings).items() if other.get(key) != value]
            said = ", ".join(f"{key} {other.get(key)!r}, not {settings[key]!r}" for key in differ if key in other)
            raise StudyError(
                f"the study {name!r} in {where} belongs to another search ({said or 'Bitsmith did not make it'}): "
                "give the same settings to go on with it, or another name (study=, --study) or storage"
            )
        yield Ledger(study, space, classes, tried, judge, where)


def finished(storage: str | Path, name: str) -> int:
    """How many trials of the study ``name`` are done, each counted once; 0 if there is no such study."""
    with connected(storage) as (optuna, database, where), explained(where):
        if name not in optuna.get_all_study_names(database):
            return 0
        trials = optuna.load_study(study_name=name, storage=database).get_trials(deepcopy=False)
        done = optuna.trial.TrialState.COMPLETE
        return len({trial.user_attrs.get("index") for trial in trials if trial.state == done})


def _encoded(evaluation: Evaluation) -> Any:
    fields = {field.name: getattr(evaluation, field.name) for field in dataclasses.fields(evaluation)}
    return to_plain({**fields, "plan": evaluation.plan.to_json()})


def _decoded(data: Any, classes: Sequence[type]) -> Evaluation | None:
    """The inverse; None for what this version or these classes cannot read: it is measured again."""
    try:
        values = from_plain(data)
        values["plan"] = Plan.from_json(values["plan"], classes)
        if values["drop_interval"] is not None:
            values["drop_interval"] = tuple(values["drop_interval"])
        return Evaluation(**values)
    except (PlanError, TypeError, KeyError):
        return None
