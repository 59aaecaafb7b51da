"""What the studies of guided searches share, on the small network."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import bitsmith as bs
import smallnet
from bitsmith.data import Unlabelled
from bitsmith.search.base import Staged
from bitsmith.search.bisection import Bisection
from bitsmith.sensitivity.inter_layer import InterLayer
from bitsmith.store import Store
from repository import load

load("benchmarks.harness")
guided, command = load("studies._guided"), load("studies._command")
correlation = load("studies.interlayer_hessian.correlation")
cells = load("benchmarks.mixed_cells")
BF16, INT8, INT4 = cells.SPACES["modelled"]
PLACE = guided.Place("modelled", cells.MODEL, (BF16, INT8, INT4), BF16)


@pytest.fixture(scope="module")
def subject():
    with Store(None) as store:
        yield guided.Subject("small", smallnet.small(), smallnet.task(), guided.Size(24, 8), store)


def test_a_seed_draws_calibration_samples(subject):
    drawn = [subject.drawn(seed).calibration for seed in (0, 0, 1)]
    assert [len(target) for _, target in drawn[0]] == [8, 8, 8]
    assert torch.equal(drawn[0][0][0], drawn[1][0][0])
    assert not torch.equal(drawn[0][0][0], drawn[2][0][0])
    pool = torch.cat([x for x, _ in smallnet.task().calibration])
    found = torch.cat([x for x, _ in drawn[2]])
    where = [int((pool == x).flatten(1).all(1).nonzero()[0]) for x in found]
    assert len(set(where)) == 24


def test_samples_without_classes_get_the_float_networks_probabilities(subject):
    bare = Unlabelled([x for x, _ in smallnet.task().calibration])
    task = dataclasses.replace(smallnet.task(), calibration=bare, loss=None)
    drawn = guided.Subject("bare", subject.model, task, subject.size, subject.store).drawn(0)
    for inputs, target in drawn.calibration:
        assert torch.allclose(target, subject.model(inputs).softmax(-1))
        # its slope is 0 at the float network
        logits = subject.model(inputs).detach().requires_grad_()
        (slope,) = torch.autograd.grad(drawn.loss(logits, target), logits)
        assert slope.abs().max() < 1e-6


def test_looked_up_times_are_the_models(subject):
    table = guided.costs(subject, PLACE.target, PLACE.techniques)
    bench = subject.bench(PLACE.target)
    mixed = guided.everywhere(table, INT8).sites
    plan = bs.Plan({site: INT4 if k % 2 else t for k, (site, t) in enumerate(mixed.items())})
    tabled = guided.Tabled(guided.Evaluator(bench), table)
    assert tabled.costs(plan).ms == pytest.approx(bench.times([plan])[0].ms)
    assert tabled.costs(plan).float_ms == pytest.approx(2 * PLACE.base_ms(table))
    assert isinstance(tabled, Staged)  # else a search would evaluate every plan whole
    whole = guided.Evaluator(bench)(plan)
    assert (tabled(plan).drop, tabled(plan).samples) == (whole.drop, whole.samples)


def test_losses_and_cross_terms_get_their_rows(subject):
    table = guided.costs(subject, PLACE.target, PLACE.techniques)
    bench = subject.bench(PLACE.target)
    scores = guided.scored(bench, guided.choices([table]), InterLayer(samples=24, shrink=False))
    found = guided.with_losses(table, scores)
    plan = guided.everywhere(table, INT4)
    total = correlation.predicted(scores, INT4, list(plan), cross=True)
    assert found.predict(plan)["loss"] == pytest.approx(total)
    alone = correlation.predicted(scores, INT4, list(plan), cross=False)
    assert alone != pytest.approx(total)


def test_a_search_is_resumed_and_tells_what_it_took(subject, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    study = command.Study.start("small", "", 1.0, ["--seeds", "1"])
    cell = guided.Cell(PLACE, "ours", InterLayer(mu=0.0, samples=24), Bisection(order="loss"), 0.9, 0)
    for _ in range(2):
        study.search(subject, cell, (PLACE,))
    first, again = study.rows
    assert first == again
    assert capsys.readouterr().out.count("small, modelled, ours, bisection, 90.0%, seed 0: ") == 1
    assert 0 < first["saved"] <= 0.75
    assert first["met"]
    assert 0 < first["evaluations"] <= first["result_evaluations"]
    assert first["sensitivity_passes"] > 0
    study.part(-1.0)  # no time is left
    study.search(subject, dataclasses.replace(cell, keep=0.5), (PLACE,))
    assert len(study.rows) == 2
    assert "left out: small, modelled, ours, bisection, 50.0%, seed 0" in (study.finish(), capsys.readouterr().out)[1]
    study.store.close()


def test_predictions_are_held_against_the_truth(subject):
    bench = subject.bench(PLACE.target)
    technique = bs.Int(4, 4, granularity="tensor")
    sites = correlation.sites_for(bench, technique)
    sets = correlation.subsets(sites, 12)
    assert all(len(set(chosen)) == len(chosen) >= correlation.FEWEST for chosen in sets)
    held = correlation.Held(subject, bench, 64)
    truths = {chosen: held.truth(bs.Plan(dict.fromkeys(chosen, technique))) for chosen in sets}
    assert held.truth(bs.Plan()) == {"kl": pytest.approx(0.0), "drop": 0.0, "n": 64}
    pairs = [(site, technique) for site in sites]
    found = {}
    for predictor in correlation.predictors(24, 0, hessian=True, pairwise=True).values():
        scores = correlation.scores_of(bench, subject.drawn(0), predictor, pairs)
        assert scores.spent.passes > 0
        found |= correlation.correlations(scores, technique, predictor.with_cross, truths)
    assert len(found) == 11
    assert found["every two sites measured"]["kl"] > 0.8


def test_spread_leaves_out_what_is_not_there():
    assert command.spread([0.1, 0.3, None, float("nan")], percent=True, digits=1) == "20.0 ± 14.1"
    assert command.spread([]) == "-"
    assert command.spread([1.0]) == "1.00"


def test_a_measured_target_times_the_chosen_file(subject):
    place = guided.Place("measured int8", bs.targets.OnnxRuntime(threads=1), (INT8,))
    table = guided.costs(subject, place.target, place.techniques)
    bench = subject.bench(place.target)
    plan = bench.adapted(guided.everywhere(table, INT8))
    assert plan.sites
    plain, timing = bench.times([bs.Plan(), plan])
    assert guided._measured(subject, place, table, plan) == pytest.approx(1 - timing.ms / plain.ms)
    assert guided._measured(subject, place, table, bs.Plan()) == 0.0
    assert guided._measured(subject, PLACE, table, plan) is None
