"""What every choice of a profile loses: from the store, or measured by a sensitivity."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from typing import Any

from torch import nn

from ._hash import hash_json, hash_source
from .bench import Bench
from .costs import Option
from .metrics import source_digest
from .plan import Plan
from .sensitivity.base import Meter, Pair, Scores, Sensitivity, Spent, name_of
from .technique import Technique
from .techniques.float_ import Float
from .training import Training
from .workers import Counted, Crew, Lost, recipe_of, score_pairs

_SHARES, _LARGEST = 8, 8
"""Jobs that pairs are split into, at least, and pairs a job, at most: each job forwards the float network once more."""


def scored(
    bench: Bench,
    options: Mapping[str, Sequence[Option]],
    sensitivity: Sensitivity,
    executor: Executor | None = None,
    train: Training | None = None,
) -> Scores:
    """The scores of every choice, from the store or measured; what could not be scored counts as the worst that was.

    ``executor``: pairs are shared out over its workers if the sensitivity is a generator. ``train``: what needs
    training is scored after it; ``ValueError`` where the sensitivity measures sites together, with weights of one
    network.
    """
    train = train or Training()
    pairs = [(site, o.technique) for site, rows in options.items() for o in rows if o.technique != Float()]
    keys = {pair: _score_key(bench, train.of(Plan({pair[0]: pair[1]})), sensitivity) for pair in pairs}
    whole_key = {"pairs": [keys[pair] for pair in pairs]}
    kept = bench.store.get("scores", whole_key)
    scores = None if kept is None else _scores_from_json(kept, pairs)
    if scores is None:
        known = {pair: bench.store.get("sensitivity", keys[pair]) for pair in pairs}
        missing = [pair for pair in pairs if known[pair] is None]
        found: dict[Pair, float] = {pair: float(loss) for pair, loss in known.items() if loss is not None}
        scores = Scores(found)
        if missing:
            scores = _measured(bench, pairs, missing, keys, sensitivity, found, executor, train)
            if scores.cross or scores.skipped or scores.spent.passes or scores.notes:
                bench.store.put("scores", whole_key, _scores_to_json(scores, pairs))
    worst: dict[Technique, float] = {}
    for (_, technique), loss in scores.losses.items():
        worst[technique] = max(loss, worst.get(technique, loss))
    most = max(worst.values(), default=0.0)
    losses = {pair: scores.losses.get(pair, worst.get(pair[1], most)) for pair in pairs}
    losses |= {(site, o.technique): 0.0 for site, rows in options.items() for o in rows if o.technique == Float()}
    return dataclasses.replace(scores, losses=losses)


def _measured(
    bench: Bench,
    pairs: Sequence[Pair],
    missing: Sequence[Pair],
    keys: Mapping[Pair, Mapping[str, Any]],
    sensitivity: Sensitivity,
    known: dict[Pair, float],
    executor: Executor | None,
    train: Training,
) -> Scores:
    bench.progress.start(f"measuring what {len(missing)} of {len(pairs)} choices lose", len(missing))
    sites = bench.net.record.sites
    refined = [(site, bench.refined(Plan({site: technique}))[site]) for site, technique in missing]
    bench.ranges(
        [
            (operand.tensor, fmt)
            for site, technique in refined
            for operand, fmt in zip(sites[site].operands, technique.reads(sites[site]), strict=True)
            if fmt is not None and not operand.constant
        ],
        [
            ((site, index), observer)
            for site, technique in refined
            for index, observer in enumerate(technique.wants(sites[site]).observers)
            if observer is not None
        ],
    )
    meter, counted = Meter(), Counted(bench.task.calibration)
    task = dataclasses.replace(bench.task, calibration=counted)

    def trial(plan: Plan) -> nn.Module:
        return bench.trial(train.of(plan))

    got = sensitivity(bench.model, task, missing, trial)
    if isinstance(got, Scores) and any(train.of(Plan({site: technique})).prepare for site, technique in missing):
        raise ValueError(
            f"profile(train={train.step}): {name_of(sensitivity)} measures sites together, with the weights of one "
            "network, and techniques that are trained have weights of their own: take "
            "sensitivity=bitsmith.sensitivities.output_error or loss_rise"
        )
    if isinstance(got, Scores):
        if len(missing) < len(pairs):  # what pairs lose together is measured together
            got = sensitivity(bench.model, task, pairs, trial)
            assert isinstance(got, Scores)
        bench.progress.advance(len(missing))
        return got
    if executor is not None and isinstance(got, types.GeneratorType):
        got.close()  # nothing of it has run yet
        found, meter.forwards, missing = _shared(bench, missing, keys, sensitivity, executor, train)
        known |= found
        got = sensitivity(bench.model, task, missing, trial) if missing else iter(())
    assert not isinstance(got, Scores)
    for pair, loss in zip(missing, got, strict=True):
        known[pair] = float(loss)
        bench.store.put("sensitivity", keys[pair], float(loss))
        bench.progress.advance()
    meter.forwards += counted.samples
    return Scores(known, spent=meter.spent())


def _shared(
    bench: Bench,
    missing: Sequence[Pair],
    keys: Mapping[Pair, Mapping[str, Any]],
    sensitivity: Sensitivity,
    executor: Executor,
    train: Training,
) -> tuple[dict[Pair, float], int, list[Pair]]:
    """What workers measured, the samples that took, and the pairs that were lost with a worker."""
    size = min(_LARGEST, -(-len(missing) // _SHARES))
    shares = [missing[k : k + size] for k in range(0, len(missing), size)]
    crew, recipe = Crew(executor, bench.progress.note), recipe_of(bench, validation=False)
    chosen = bench.chosen.known({technique for _, technique in missing}) if bench.choose else {}
    statistics = dict(bench.net.record.statistics)
    jobs: dict[Future[Any], Sequence[Pair]] = {}
    found: dict[Pair, float] = {}
    samples, why = 0, ""
    try:
        for share in shares:
            future = crew.send(recipe, score_pairs, statistics, share, sensitivity, chosen, train)
            if future is not None:
                jobs[future] = share
        for future in as_completed(jobs):
            got = crew.result(future)
            if isinstance(got, Lost):
                why = got.why
                continue
            losses, forwarded = got
            samples += forwarded
            for pair, loss in zip(jobs[future], losses, strict=True):
                found[pair] = loss
                bench.store.put("sensitivity", keys[pair], loss)
            bench.progress.advance(len(losses))
    finally:
        for future in jobs:
            crew.withdraws(future)
    left = [pair for pair in missing if pair not in found]
    if why:
        named = ", ".join(f"{technique} at {site}" for site, technique in left)
        bench.progress.note(f"lost with a worker ({why}): {len(left)} choices, measured in this process: {named}")
    return found, samples, left


def _scores_to_json(scores: Scores, pairs: Sequence[Pair]) -> dict[str, Any]:
    """By position in ``pairs``: a key names them."""
    index = {pair: k for k, pair in enumerate(pairs)}
    return {
        "losses": [[index[pair], loss] for pair, loss in scores.losses.items()],
        "cross": [[index[one], index[other], loss] for (one, other), loss in scores.cross.items()],
        "skipped": [[index[pair], why] for pair, why in scores.skipped.items()],
        "spent": dataclasses.asdict(scores.spent),
        "notes": dict(scores.notes),
    }


def _scores_from_json(data: Mapping[str, Any], pairs: Sequence[Pair]) -> Scores:
    return Scores(
        {pairs[k]: float(loss) for k, loss in data["losses"]},
        {(pairs[i], pairs[j]): float(loss) for i, j, loss in data["cross"]},
        {pairs[k]: str(why) for k, why in data["skipped"]},
        Spent(**data["spent"]),
        dict(data["notes"]),
    )


def _score_key(bench: Bench, plan: Plan, sensitivity: Sensitivity) -> dict[str, Any]:
    """What the score of one choice depends on."""
    return {
        **bench.model_key,
        "data": bench.calibration_key,
        "plan": bench.plan_key(bench.refined(plan)),
        "sensitivity": _digest(sensitivity),
        "loss": source_digest(bench.task.loss) if bench.task.loss is not None else None,
        "seed": bench.seed,
    }


def _digest(sensitivity: Sensitivity) -> str:
    """Of what it computes: a function's source; a value's fields and its class's source file."""
    if isinstance(sensitivity, types.FunctionType):
        return source_digest(sensitivity)
    return hash_json([repr(sensitivity), hash_source(type(sensitivity))])
