"""The simulation that holds a search's claims to the truth: its populations, its early stops, a few searches."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from bitsmith.sequential import decide
from repository import load

certification, harness = load("benchmarks.certification"), load("benchmarks.harness")
SETTINGS = [setting for part in certification.SETTINGS.values() for setting in part]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_populations_have_the_drops_they_claim(setting):
    worse, better = setting.ladder()
    assert len(worse) == setting.plans
    large = dataclasses.replace(setting, n=20_000)
    samples = certification.drawn(large, np.random.default_rng(0))
    assert samples.shape == (setting.plans, 20_000)
    for share, value in ((worse, 1.0), (better, -1.0)):
        # five standard errors
        off = np.abs((samples == value).mean(axis=1) - share)
        assert (off <= 5 * np.sqrt(share * (1 - share) / 20_000) + 1e-12).all()


def test_nested_samples_are_shared():
    nested = certification.Setting("", 20_000, 24, 0.02, "rising", 0.01, nested=1.0)
    samples = certification.drawn(nested, np.random.default_rng(1))
    assert (np.diff((samples == 1).astype(int), axis=0) >= 0).all()
    own = certification.drawn(dataclasses.replace(nested, nested=0.0, drops="at budget"), np.random.default_rng(1))
    both = ((own[-1] == 1) & (own[-2] == 1)).mean()
    assert both == pytest.approx((own[-1] == 1).mean() * (own[-2] == 1).mean(), abs=2e-3)


def test_stopping_is_that_of_one_who_looks_after_every_chunk():
    rng = np.random.default_rng(2)
    for _ in range(20):
        n = int(rng.integers(20, 400))
        x = rng.choice([1.0, -1.0, 0.0], n, p=[0.1, 0.02, 0.88])
        for t in [*range(32, n, 32), n]:
            said = decide(x[:t], n, 0.04, -1.0, 1.0, certification.ALPHA)
            if said is not None:
                break
        assert certification.stopped(x, 0.04) == (t, said)


@pytest.mark.parametrize("scan", [False, True])
def test_a_search_without_early_stopping_finds_the_last_plan_within_the_budget(scan):
    setting = certification.Setting("", 400, 8, 0.02, "rising", 0.0, scan=scan)
    samples = np.zeros((8, 400))
    for plan in range(8):
        samples[plan, : 2 * plan] = 1.0  # drops 0, 0.005, .. 0.035: within 0.02 up to plan 4
    search = certification.searched(setting, samples, early=False)
    assert search.chosen == 4
    assert search.used == 400 * (4 if scan else 3)
    rng = np.random.default_rng(3)
    early = certification.searched(setting, rng.permutation(samples, axis=1), early=True)
    assert early.chosen in (3, 4, 5)
    assert early.used <= 400 * 5
    samples[:, :40] = 1.0
    assert certification.searched(setting, samples, early=True).chosen is None


def test_a_wrong_early_answer_is_caught_on_the_whole_set():
    setting = certification.Setting("", 1000, 2, 0.01, "rising", 0.0)
    samples = np.zeros((2, 1000))
    samples[1, 950:] = 1.0  # so late that the first 950 say it holds
    search = certification.searched(setting, samples, early=True)
    assert [(said, truth) for _, said, truth in search.decisions] == [(True, True), (True, False)]
    assert search.chosen == 0
    assert search.used == 2000


def test_a_small_run_passes_and_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(certification, "SEARCHES", 25)
    monkeypatch.setattr(certification, "SETTINGS", {"scan": certification.SETTINGS["scan"][:2]})
    monkeypatch.setattr(certification, "PARTS", {"scan": (0.1, 0.1)})
    monkeypatch.setattr(sys, "argv", ["certification", "--threads", str(torch.get_num_threads())])
    assert certification.main() == 0
    said = capsys.readouterr().out
    assert "PASS certification" in said
    assert "All 2 settings so far: 50 searches" in said
    kept = json.loads((tmp_path / "certification.json").read_text(encoding="utf-8"))
    assert [row["searches"] for row in kept["rows"]] == [25, 25]
    for row in kept["rows"]:
        hits, of = row["covered"]
        low, high = row["intervals"]["covered"]
        assert 0 < of <= 25
        assert low <= hits / of <= high
        assert row["used"] <= row["control"] * 1.2


def test_clopper_pearson_of_none_says_nothing():
    assert certification.exact(0, 0) == (0.0, 1.0)
    # the closed form where all hit: (alpha / 2) ** (1 / n)
    assert certification.exact(40, 40)[0] == pytest.approx(0.025 ** (1 / 40))
