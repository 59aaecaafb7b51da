"""The harness that judges benchmarks: order of rounds, verdicts, exit status, resuming."""

from __future__ import annotations

import json
import math

import pytest
import torch

from repository import load

harness, peers = load("benchmarks.harness"), load("benchmarks.peers")


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    yield lambda *argv: started(argv)
    torch.set_num_threads(threads)


def started(argv):
    made = harness.Benchmark("trial", {"a": (1, 2), "b": (3, 4)})
    made.start([*argv, "--threads", "1"])
    return made


def test_interleaved_draws_the_order_and_leaves_out_the_warm_rounds():
    seen: list[str] = []
    times = harness.interleaved({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=20, warm=1)
    rounds = ["".join(seen[at : at + 3]) for at in range(0, 63, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert {one[0] for one in rounds} == {"a", "b", "c"}
    assert {"ab", "ba"} <= {two for one in rounds for two in (one[:2], one[1:])}, "no fixed predecessor"
    assert all(len(samples.ms) == 20 for samples in times.values())
    again: list[str] = []
    harness.interleaved({name: lambda name=name: again.append(name) for name in "abc"}, rounds=20, warm=1)
    assert again == seen


def test_a_refilling_call_comes_before_each_timed_one():
    seen: list[str] = []
    times = harness.interleaved({name: lambda name=name: seen.append(name) for name in "ab"}, 3, warm=0, refill=True)
    assert seen[::2] == seen[1::2]
    assert len(seen) == 12
    assert len(times["a"].ms) == 3


def test_samples_give_median_and_quartiles():
    samples = harness.Samples((4.0, 1.0, 2.0, 3.0, 5.0))
    assert samples.median == 3.0
    assert samples.quartiles == (2.0, 4.0)
    assert harness.Samples((7.0,)).quartiles == (7.0, 7.0)


@pytest.mark.parametrize(
    ("figure", "at_least", "passed"),
    [(1.0, False, True), (1.01, False, False), (0.9, True, False), (1.0, True, True), (math.nan, False, False)],
)
def test_verdict(figure, at_least, passed):
    assert harness.Verdict("x", figure, 1.0, at_least=at_least).passed is passed


def test_the_last_line_and_the_status_say_whether_the_bar_was_met(bench, capsys, tmp_path):
    def part(run):
        run.row("a", ms=1.5)
        run.judge("speed", 2.0, 1.0, "x")

    made = bench("--only", "a")
    assert "about 1 minutes" in capsys.readouterr().out
    assert made.run({"a": part}) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL trial: speed 2x (bar <= 1x: MISSED)"
    written = json.loads((tmp_path / "trial.a.json").read_text())
    assert written["rows"] == [{"part": "a", "ms": 1.5}]
    assert written["passed"] is False


def test_a_run_that_judged_nothing_or_missed_a_measurement_fails(bench):
    assert bench("--only", "a").run({"a": lambda run: None}) == 1

    def part(run):
        run.judge("speed", 0.5, 1.0)
        run.miss("the peer is not installed")

    assert bench("--only", "a").run({"a": part}) == 1


def test_a_killed_run_resumes_and_repeats_nothing(bench, tmp_path):
    calls = []

    def done(run):
        calls.append("a")
        run.row("a", n=1)
        run.judge("a", 0.0, 1.0)

    def killed(run):
        raise KeyboardInterrupt

    def second(run):
        calls.append("b")
        run.judge("b", 0.0, 1.0)

    with pytest.raises(KeyboardInterrupt):
        bench().run({"a": done, "b": killed})
    made = bench("--resume")
    assert made.run({"a": done, "b": second}) == 0
    assert calls == ["a", "b"]
    assert made.rows == [{"part": "a", "n": 1}]
    assert [v.what for v in made.verdicts] == ["a", "b"]
    assert not (tmp_path / "trial.unfinished.json").exists()
    assert bench().run({"a": done, "b": second}) == 0
    assert calls == ["a", "b", "a", "b"]


def test_figures_of_other_settings_are_not_resumed(bench, tmp_path):
    (tmp_path / "trial.unfinished.json").write_text(json.dumps({"settings": {"threads": 64}, "a": {}}))
    calls = []
    bench("--resume", "--only", "a").run({"a": lambda run: calls.append("a")})
    assert calls == ["a"]


@pytest.mark.parametrize(("quantize_x", "quantize_w", "share"), [(1, 1, 1.0), (1, 0, 0.0), (0, 1, 0.0), (0, 0, 0.0)])
def test_the_share_of_quantized_products_is_read_from_the_values(quantize_x, quantize_w, share):
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(8, 4, 3)
    x = torch.randn(1, 8, 10, 10, generator=generator)
    with torch.no_grad():
        conv.weight.normal_(generator=generator)
        if quantize_w:
            scale = conv.weight.abs().amax((1, 2, 3)) / 127
            conv.weight.copy_(
                torch.fake_quantize_per_channel_affine(conv.weight, scale, torch.zeros(4).int(), 0, -127, 127)
            )
        if quantize_x:
            x = torch.fake_quantize_per_tensor_affine(x, 0.03, 100, 0, 255)
    assert peers.quantized_share(conv, x) == share
