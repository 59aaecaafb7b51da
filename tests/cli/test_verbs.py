"""The verbs on the command line do what the functions do, over files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_model

import bitsmith as bs
from bitsmith.model.load import load_object
from bitsmith.plan import Budget, Plan
from bitsmith.profile import Profile
from bitsmith.report.data import Report
from bitsmith.search import search
from bitsmith.targets.base import Artifact
from bitsmith.techniques.int_ import Int

from .conftest import Run, Said

NET = ("net.py:build", "--data", "data.py:task")
ON = ("--target", "onnxruntime", "--threads", "1")


@pytest.fixture
def quantized(files: Path, run: Run) -> Said:
    said = run("quantize", *NET, *ON, "-o", "out")
    assert said.code == 0, said.err
    return said


def test_quantize_writes_the_plan_and_the_file_that_runs_it(quantized: Said, files: Path, run: Run) -> None:
    plan = Plan.load(files / "out" / "plan.json")
    assert {"0", "2", "6"} <= set(plan)
    assert all(isinstance(technique, Int) for technique in plan.sites.values())
    artifact = Artifact.load(files / "out" / "model.onnx")
    assert artifact.batch == 1
    assert f"{artifact.mib:.3f} MiB" in quantized.out
    assert "wrote out/plan.json" in quantized.out


def test_what_was_quantized_is_verified_against_its_plan(quantized: Said, run: Run) -> None:
    said = run("verify", "net.py:build", "out/model.onnx", "--data", "data.py:task")
    assert said.code == 0, said.out + said.err
    assert "passed: it runs as simulated" in said.out
    first = next(line for line in said.out.splitlines() if line.split()[:1] == ["0"])
    assert "int8" in first


def test_an_artifact_that_is_not_its_plans_fails_with_code_1(quantized: Said, files: Path, run: Run) -> None:
    (files / "other.py").write_text((files / "net.py").read_text().replace("manual_seed(0)", "manual_seed(1)"))
    said = run("verify", "other.py:build", "out/model.onnx", "--data", "data.py:task")
    assert said.code == 1
    assert "FAILED" in said.out


def test_the_tolerance_of_verify_can_be_asked_for(quantized: Said, run: Run) -> None:
    said = run("verify", "net.py:build", "out/model.onnx", "--data", "data.py:task", "--tolerance-db", "1000")
    assert said.code == 1
    assert "(at least 1000)" in said.out


def test_sites_can_be_left_out_and_the_batch_be_set(files: Path, run: Run) -> None:
    said = run("quantize", *NET, *ON, "--exclude", "6", "--technique", "Int(8, 8)", "--batch", "3", "-o", "out")
    assert said.code == 0, said.err
    assert "6" not in Plan.load("out/plan.json")
    assert Artifact.load("out/model.onnx").batch == 3


def test_export_of_a_plan_gives_the_same_file_again(quantized: Said, files: Path, run: Run) -> None:
    said = run("export", "net.py:build", "--plan", "out/plan.json", "--data", "data.py:task", *ON, "-o", "again")
    assert said.code == 0, said.err
    assert (files / "again/plan.json").read_bytes() == (files / "out/plan.json").read_bytes()
    assert Artifact.load("again/model.onnx").digest() == Artifact.load("out/model.onnx").digest()
    assert "adapted" not in said.out


def test_export_adapts_a_plan_written_by_hand_and_says_so(files: Path, run: Run) -> None:
    Plan({"0": Int(8, 8, signed=True)}).save("hand.json")
    said = run("export", "net.py:build", "--plan", "hand.json", "--data", "data.py:task", *ON, "-o", "out")
    assert said.code == 0, said.err
    assert "adapted to onnxruntime" in said.out
    technique = Plan.load("out/plan.json")["0"]
    assert isinstance(technique, Int)
    assert not technique.signed


def test_a_plan_that_names_no_site_is_an_error_with_the_closest(files: Path, run: Run) -> None:
    Plan({"00": Int(8, 8)}).save("hand.json")
    said = run("export", "net.py:build", "--plan", "hand.json", "--data", "data.py:task", *ON, "-o", "out")
    assert said.code == 2
    assert "no site is called '00'; closest: 0" in said.err


def test_apply_keeps_the_simulations_state_and_says_that_it_is_one(quantized: Said, files: Path, run: Run) -> None:
    said = run("apply", "net.py:build", "--plan", "out/plan.json", "--data", "data.py:task", "-o", "sim.safetensors")
    assert said.code == 0, said.err
    assert "This is a simulation" in said.out
    plan, task, model = Plan.load("out/plan.json"), load_object("data.py:task")(), load_object("net.py:build")().eval()
    net = bs.apply(model, plan, task.calibration)
    x = task.validation[0][0]
    with torch.no_grad():
        wanted = net(x)
        for buffer in net.buffers():
            buffer.zero_()
        assert not torch.equal(net(x), wanted)
        load_model(net, files / "sim.safetensors")
        assert torch.equal(net(x), wanted)
    with safe_open(files / "sim.safetensors", framework="pt") as file:
        assert file.metadata()["plan"] == plan.digest()


def test_profile_and_search_agree_with_the_functions_over_their_files(files: Path, run: Run) -> None:
    said = run(
        "profile", *NET, *ON, "--techniques", "Int(8, 8)", "Int(4, 8)", "--sites", "0", "2", "-o", "p/profile.json"
    )
    assert said.code == 0, said.err
    profile = Profile.load("p/profile.json")
    assert set(profile.options()) == {"0", "2"}
    assert {row.technique for row in profile.rows if row.refused} == {Int(4, 8)}
    assert "below 8 bits" in said.out
    limit = profile.predict(Plan())["bytes"] / 2**20
    said = run("search", "p/profile.json", "--mib", limit, "--minimize", "ms", "-o", "p/plan.json")
    assert said.code == 0, said.err
    assert Plan.load("p/plan.json") == search(profile, Budget(mib=limit), "ms").plan
    assert "predicted" in said.out
    # a second profile measures nothing again
    again = run("profile", *NET, *ON, "--techniques", "Int(8, 8)", "Int(4, 8)", "--sites", "0", "2", "-o", "p/b.json")
    assert again.code == 0
    assert Profile.load("p/b.json") == profile


@pytest.fixture
def profiled(files: Path) -> Profile:
    from bitsmith.profile import Row
    from bitsmith.techniques.float_ import Float

    rows = [Row(site, Float(), 0.0, 1.0, 4000.0) for site in "02"]
    rows += [Row(site, Int(8, 8), 0.1, 0.5, 1000.0) for site in "02"]
    profile = Profile(tuple(rows), target="onnxruntime")
    profile.save("profile.json")
    return profile


def test_a_search_that_misses_is_code_3_and_saves_the_closest(profiled: Profile, run: Run) -> None:
    said = run("search", "profile.json", "--ms", "0.7", "--minimize", "mib", "-o", "plan.json")
    assert said.code == 3
    assert "over the limit of 0.7 by 0.3" in said.err
    assert Plan.load("plan.json") == Plan(dict.fromkeys("02", Int(8, 8)))


def test_a_drop_needs_whole_plans_measured(profiled: Profile, run: Run) -> None:
    said = run("search", "profile.json", "--drop", "0.01", "-o", "plan.json")
    assert said.code == 2
    said = run("search", "profile.json", "--drop", "0.01", "--model", "net.py:build", "-o", "plan.json")
    assert said.code == 2
    assert "--data, --target is missing" in said.err


def test_a_search_may_measure_whole_plans(profiled: Profile, files: Path, run: Run) -> None:
    said = run("search", "profile.json", "--drop", "0.5", "--model", *NET, *ON, "-o", "plan.json")
    assert said.code == 0, said.err
    assert "evaluated" in said.out
    assert "n=32" in said.out
    assert (files / "runs.db").exists()


def test_a_report_is_shown_again_and_written_as_a_page(files: Path, run: Run) -> None:
    Report(title="<b>A title</b>", target="onnxruntime", metric="top1", notes=("a note",)).save("report.json")
    shown = run("report", "report.json")
    assert shown.code == 0
    assert "a note" in shown.out
    said = run("report", "report.json", "-o", "page.html")
    assert said.code == 0
    assert "&lt;b&gt;A title" in (files / "page.html").read_text()
    said = run("report", "page.html")
    assert (said.code, "is not a report" in said.err) == (2, True)
    said = run("report", "absent.json")
    assert (said.code, "absent.json: No such file" in said.err) == (2, True)


def test_optimize_hands_over_what_was_asked(files: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class StopError(ValueError):
        __module__ = "bitsmith.test"

    def optimize(model: Any, task: Any, target: Any, budget: Any, **rest: Any) -> None:
        given.update(rest, target=target, budget=budget, model=model)
        raise StopError("seen")

    monkeypatch.setattr(bs, "optimize", optimize)
    argv = ("--drop", 0.01, "--mib", 2, "--minimize", "ms", "--batch", 4, "--seed", 7, "--title", "T")
    said = run("optimize", *NET, *ON, *argv, "--techniques", "Int(8, 8)", "Int(4, None)", "-o", "out")
    assert (said.code, said.err) == (2, "bitsmith: seen\n")
    assert given["budget"] == Budget(drop=0.01, mib=2.0)
    assert given["techniques"] == [Int(8, 8), Int(4, None)]
    assert (given["minimize"], given["batch"], given["seed"], given["title"]) == ("ms", 4, 7, "T")
    assert (given["folder"], given["store"]) == (Path("out"), Path("out/runs.db"))
    assert given["target"].threads == 1
    assert given["prepare"] is None
    run("optimize", *NET, *ON, "--drop", 0.01, "--prepare", "-o", "out", "--techniques", "Float()", "Int(4, 8)")
    assert given["prepare"] == bs.default_steps(Int(4, 8))
    run("optimize", *NET, *ON, "--drop", 0.01, "--prepare", "-o", "out")
    assert (given["techniques"], given["minimize"], given["title"]) == (None, None, "net.py:build")
    assert given["prepare"] == bs.default_steps(Int(8, 8))


def test_optimize_writes_plan_file_and_report(files: Path, run: Run) -> None:
    said = run("optimize", *NET, *ON, "--drop", "0.5", "-o", "out")
    assert said.code == 0, said.err
    assert json.loads((files / "out" / "report.json").read_text())["kind"] == "bitsmith.report"
    assert "<html" in (files / "out" / "report.html").read_text()
    Artifact.load(files / "out" / "model.onnx")
    assert Plan.load(files / "out" / "plan.json") is not None
    assert "wrote out/report.html" in said.out
