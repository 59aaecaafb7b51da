"""What goes wrong in a user's hands, through the public verbs: each says what, where and what to do."""

from __future__ import annotations

import builtins
import html
import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.report.data import ReportError
from bitsmith.targets import ArtifactError
from bitsmith.testing import MockTarget
from smallnet import Small, batches, small, task

X, Y = batches(1)[0]
INT = bs.Int(8, 8)
BUDGET = bs.Budget(drop=0.1)


def optimize(model: nn.Module | None = None, **changes: Any) -> bs.Optimized:
    return bs.optimize(model or small(), task(**changes), MockTarget(), BUDGET)


VERBS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "sites": lambda model, data: bs.sites(model, data[0][0]),
    "quantize": lambda model, data: bs.quantize(model, data, MockTarget()),
    "apply": lambda model, data: bs.apply(model, bs.Plan({"left": INT}), data),
    "profile": lambda model, data: bs.profile(model, task(calibration=data), [INT], MockTarget()),
    "evaluator": lambda model, data: bs.evaluator(model, task(calibration=data), MockTarget())(bs.Plan()),
    "optimize": lambda model, data: optimize(model, calibration=data),
}
verbs = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


# -- the model and its example -----------------------------------------------------------------------------------------


class Failing(Small):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the tokenizer was not loaded")


@verbs
def test_a_model_that_fails_on_the_example(verb: Callable[..., Any]) -> None:
    with pytest.raises(bs.ModelRunError, match="the tokenizer was not loaded") as caught:
        verb(Failing(), [(X, Y)])
    assert "Tensor[16, 3, 12, 12] float32" in str(caught.value)  # what was passed
    assert "forward=" in str(caught.value)  # the way out


@verbs
@pytest.mark.parametrize(
    ("x", "given"),
    [(X[:, :2], "Tensor[16, 2, 12, 12] float32"), (X.double(), "Tensor[16, 3, 12, 12] float64"), (X.long(), "int64")],
    ids=["shape", "float64", "int64"],
)
def test_an_example_of_the_wrong_shape_or_dtype(verb: Callable[..., Any], x: Tensor, given: str) -> None:
    with pytest.raises(bs.ModelRunError, match="forward") as caught:
        verb(small(), [(x, Y)])
    assert given in str(caught.value)


@pytest.mark.parametrize("verb", [VERBS[name] for name in ("sites", "quantize", "apply")])
def test_something_that_is_no_module(verb: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, not function"):
        verb(lambda x: x, [(X, Y)])


def test_a_model_that_already_carries_a_plan() -> None:
    net = bs.quantize(small(), [(X, Y)], MockTarget())
    with pytest.raises(bs.InterceptionError, match="give the original model"):
        bs.apply(net, bs.Plan({"left": INT}), [(X, Y)])


# -- items -------------------------------------------------------------------------------------------------------------

data_verbs = pytest.mark.parametrize("verb", [v for name, v in VERBS.items() if name != "sites"])


@data_verbs
@pytest.mark.parametrize(
    ("items", "came", "mend"),
    [
        ([X, X, X], "Tensor[16, 3, 12, 12]", "Unlabelled(loader)"),
        ([X, Y], "Tensor[16, 3, 12, 12]", "write [(x, y)]"),
        ([(X, Y, Y)], "(Tensor[16, 3, 12, 12] float32, Tensor[16] int64, Tensor[16] int64)", "[(x, y) for x, y, _ in"),
        ([{"x": X, "labels": Y}], "labels: Tensor[16] int64", "d['labels']) for d in loader]"),
    ],
    ids=["bare", "a pair", "three", "label inside"],
)
def test_items_that_are_not_inputs_and_target(verb: Callable[..., Any], items: list[Any], came: str, mend: str) -> None:
    with pytest.raises(bs.DataError) as caught:
        verb(small(), items)
    message = str(caught.value)
    assert came in message
    assert mend in message
    assert "calibration item 0" in message


@data_verbs
def test_an_empty_loader(verb: Callable[..., Any]) -> None:
    with pytest.raises(bs.DataError, match="calibration loader is empty"):
        verb(small(), [])


def test_empty_validation_data() -> None:
    with pytest.raises(bs.DataError, match="validation loader is empty"):
        optimize(validation=[])


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["quantize", "apply", "optimize"])
def test_weights_that_are_not_finite(bad: float, name: str) -> None:
    model = small()
    with torch.no_grad():
        model.left.weight[0, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"NaN|infinit") as caught:
        VERBS[name](model, [(X, Y)])
    if name != "optimize":  # there the float score is looked at first
        assert "'left.weight'" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["quantize", "apply"])
def test_activations_that_are_not_finite(bad: float, name: str) -> None:
    x = X.clone()
    x[3, 1, 2, 2] = bad
    with pytest.raises(
        bs.CalibrationError, match=rf"the tensor '(@x|:relu)' holds .* {str(bad).replace('nan', 'NaN')}"
    ):
        VERBS[name](small(), [(x, Y)])


def test_an_output_of_nan_has_no_score() -> None:
    data = batches(4, seed=3)
    data[2][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="validation item 2"):
        optimize(validation=data)


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_with_an_unknown_site_offers_the_closest() -> None:
    plan = bs.Plan({"rigth": INT})
    with pytest.raises(bs.UnknownSiteError, match="closest: right"):
        bs.apply(small(), plan, [(X, Y)])
    with pytest.raises(bs.UnknownSiteError, match="closest: right"):
        bs.evaluator(small(), task(), MockTarget())(plan)


def test_a_plan_with_a_module_and_something_inside_it() -> None:
    with pytest.raises(bs.PlanError, match=r"names 'layer1' and also 'layer1\.0\.conv', which is inside"):
        bs.Plan({"layer1": INT, "layer1.0.conv": INT})


def test_a_technique_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"cannot be put at ':relu' \(relu\): relu is computed in float"):
        bs.apply(small(), bs.Plan({":relu": INT}), [(X, Y)])


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of each file."""
    folder = tmp_path_factory.mktemp("saved")
    done = bs.optimize(small(), task(), MockTarget(), BUDGET, folder=folder)
    done.profile.save(folder / "profile.json")
    return folder


READERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "plan.json": (bs.Plan.load, bs.PlanError),
    "profile.json": (bs.Profile.load, bs.PlanError),
    "report.json": (bs.Report.load, ReportError),
    "runs.db": (bs.Store, bs.StoreError),
}
readers = pytest.mark.parametrize(("name", "read", "error"), [(name, *rest) for name, rest in READERS.items()])


@readers
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_a_file_that_was_cut_off(
    saved: Path, tmp_path: Path, name: str, read: Callable[[Path], Any], error: type[Exception], share: float
) -> None:
    content = (saved / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(error, match=r"plan|profile|report|store") as caught:
        read(path)
    assert str(path) in str(caught.value)


@readers
def test_a_file_of_noise(
    saved: Path, tmp_path: Path, name: str, read: Callable[[Path], Any], error: type[Exception]
) -> None:
    path = tmp_path / name
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(error):
        read(path)
    assert path.stat().st_size == 256 * 40  # nothing was repaired or deleted


@pytest.mark.parametrize(("name", "read", "error"), [(n, *READERS[n]) for n in READERS if n.endswith(".json")])
def test_a_file_of_a_newer_version(
    saved: Path, tmp_path: Path, name: str, read: Callable[[Path], Any], error: type[Exception]
) -> None:
    data = json.loads((saved / name).read_text())
    path = tmp_path / name
    path.write_text(json.dumps({**data, "schema": 7}))
    with pytest.raises(error, match=r"schema 7 .*pip install -U bitsmith"):
        read(path)
    path.write_text("[1, 2]")
    with pytest.raises(error, match="not a Bitsmith"):
        read(path)


def test_a_store_of_a_newer_version(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes((saved / "runs.db").read_bytes())
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
    database.close()
    with pytest.raises(bs.StoreError, match=r"schema 99.* pip install -U bitsmith"):
        bs.optimize(small(), task(), MockTarget(), BUDGET, store=path)


def test_a_damaged_store_stops_the_job_before_it_starts(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "runs.db"
    path.write_bytes((saved / "runs.db").read_bytes()[:5000])
    target = MockTarget()
    with pytest.raises(bs.StoreError, match="nothing was deleted"):
        bs.optimize(small(), task(), target, BUDGET, store=path)
    assert not target.calls


# -- files from strangers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"type": "os.system", "command": "touch PWNED"},
        {"type": "builtins.eval", "source": "open('PWNED', 'w')"},
        {"type": "Path", "args": "PWNED"},
        {"type": "Int", "w": 8, "a": 8, "range": {"type": "subprocess.Popen", "args": ["touch", "PWNED"]}},
        {"type": ["Int"]},
        {"type": "Int", "w": 8, "a": 8, "__class__": "os.system"},
    ],
)
def test_nothing_runs_because_a_plan_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    real = builtins.__import__
    asked: list[str] = []

    def watched(name: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        return real(name, *args, **kwargs)

    path = tmp_path / "plan.json"
    for data in (
        {"schema": 1, "kind": "bitsmith.plan", "sites": {"left": value}},
        {"schema": 1, "kind": "bitsmith.plan", "sites": {}, "prepare": [value]},
    ):
        path.write_text(json.dumps(data))
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "__import__", watched)
            patch.setattr(os, "system", lambda command: pytest.fail("a command was run"))
            with pytest.raises(bs.PlanError, match=r"unknown type|has no field"):
                bs.Plan.load(path)
    assert not {"subprocess", "os"} & set(asked)
    assert not (tmp_path / "PWNED").exists()


def test_html_is_escaped_end_to_end(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"

    class Evil(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(evil, nn.Conv2d(3, 4, 3))
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            conv = dict(self.named_children())[evil]
            logits: Tensor = self.head(conv(x).mean((2, 3)))
            return logits

    Evil.__name__ = '"><img src=x onerror=alert(2)>'
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Evil().eval()
    bs.optimize(model, task(), MockTarget(), bs.Budget(drop=1.0), minimize="mib", folder=tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert evil not in page
    assert "<img" not in page
    assert html.escape(evil) in page or "&lt;script&gt;" in page
    assert evil in bs.Plan.load(tmp_path / "plan.json").sites  # the name itself is kept


# -- runtimes and folders ----------------------------------------------------------------------------------------------


def test_a_runtime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    for name in [name for name in sys.modules if name.partition(".")[0] == "openvino"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "openvino", None)  # what Python raises ImportError for
    with pytest.raises((bs.targets.TargetError, ImportError), match=r"pip install .*openvino"):
        bs.optimize(small(), task(), bs.targets.OpenVino(), BUDGET, folder=tmp_path)
    assert not (tmp_path / "plan.json").exists()


def below_a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "out"


FOLDER_VERBS: dict[str, Callable[[Path], Any]] = {
    "optimize": lambda out: bs.optimize(small(), task(), MockTarget(), BUDGET, folder=out),
    "evaluator": lambda out: bs.evaluator(small(), task(), MockTarget(), folder=out),
    "export": lambda out: bs.export(small(), bs.targets.OnnxRuntime(), out / "net.onnx", X),
    "Plan.save": lambda out: bs.Plan().save(out / "plan.json"),
}


@pytest.mark.parametrize("verb", FOLDER_VERBS.values(), ids=FOLDER_VERBS)
def test_a_folder_that_cannot_be_made(verb: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match=r"cannot write to .*choose another folder"):
        verb(below_a_file(tmp_path))


@pytest.mark.parametrize("verb", FOLDER_VERBS.values(), ids=FOLDER_VERBS)
def test_a_folder_that_is_read_only(
    verb: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    real = tempfile.TemporaryFile

    def refuse(*args: Any, **kwargs: Any) -> Any:  # tests may run as root, whom no permission keeps out
        if Path(kwargs.get("dir", "/")) == tmp_path:
            raise OSError(30, "Read-only file system")
        return real(*args, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(PermissionError, match="Read-only file system"):
        verb(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(bs.StoreError, match="cannot write"):
        bs.profile(small(), task(), [INT], MockTarget(), store=below_a_file(tmp_path) / "runs.db")


def test_an_artifact_whose_file_is_gone(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="export again"):
        bs.Artifact.load(tmp_path / "model.onnx")


class Branching(nn.Module):
    """Goes through ``sometimes`` for more than one row only."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.attention = nn.Linear(4, 4), nn.Linear(4, 4), nn.MultiheadAttention(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.always(x)
        if x.shape[0] > 1:
            x = self.sometimes(x)
        found: Tensor = self.attention(x, x, x)[0]
        return found


class Idle(nn.Module):
    """Attention as one operation, beside a layer that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x)
        return nn.functional.scaled_dot_product_attention(q, q, q)


ONE, TWO = (torch.ones(1, 4), torch.zeros(1)), (torch.ones(2, 4), torch.zeros(2))


def test_a_layer_that_calibration_never_reaches_is_named() -> None:
    with pytest.warns(UserWarning, match="never reached sometimes: what is not seen stays in float"):
        net = bs.quantize(Branching(), [ONE, ONE])
    assert "always" in bs.plan_of(net).sites
    assert "sometimes" not in bs.plan_of(net).sites
    with pytest.raises(bs.UnknownSiteError, match="'sometimes' was never reached by the example"):
        bs.apply(Branching(), bs.Plan({"sometimes": bs.Int(8, 8)}), [ONE, ONE])
    assert "sometimes" in bs.plan_of(bs.quantize(Branching(), [TWO, ONE])).sites  # no warning: it was seen
    task = bs.Task(calibration=[TWO], validation=[TWO], test=[TWO], metric=lambda y, target: 1.0)
    with pytest.warns(UserWarning, match=r"never reached 0\.idle:"):
        bs.profile(nn.Sequential(Idle()), task, [bs.Int(8, 8)], MockTarget())
