"""Names from the command line: what they lead to, and what is said when they lead nowhere."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from bitsmith.data import DataError
from bitsmith.model.load import LoadError, load_calibration, load_model, load_object, load_task
from bitsmith.task import Task

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path) -> Iterator[None]:
    """Leave no test's modules and folders to the next."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "net.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write


def test_a_file_and_a_package_lead_to_the_same_kind_of_thing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(
        "import torch\nclass Nets:\n    @staticmethod\n    def build():\n        return torch.nn.Linear(2, 3)\n"
    )
    assert isinstance(load_model(f"{path}:Nets.build"), nn.Linear)
    write("", "pack/__init__.py")
    write("import torch\ndef build(n=4):\n    return torch.nn.Linear(n, 3)\n", "pack/nets.py")
    monkeypatch.chdir(path.parent)
    model = load_model("pack.nets:build")
    assert isinstance(model, nn.Linear)
    assert model.in_features == 4


def test_a_relative_file_and_its_neighbours_are_found_and_imported_once(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("made = []\ndef build():\n    import torch\n    made.append(1)\n    return torch.nn.ReLU()\n", "my_net.py")
    path = write("import my_net\ndef count():\n    return my_net.made\n", "data_of_it.py")
    monkeypatch.chdir(path.parent)
    load_model("my_net.py:build")
    assert load_object("data_of_it.py:count")() == [1]
    assert load_object("./data_of_it.py:count") is load_object(f"{path}:count")


def test_two_files_of_one_name_stay_apart(write: Write) -> None:
    one, two = write("value = 1", "a/same.py"), write("value = 2", "b/same.py")
    three, four = write("value = 3", "c/same.py"), write("value = 4", "b/not-an-identifier.py")
    assert [load_object(f"{path}:value") for path in (one, two, three, four, one, two)] == [1, 2, 3, 4, 1, 2]


def test_a_file_named_like_an_imported_module_does_not_replace_it(write: Write) -> None:
    path = write("value = 7", "json.py")
    before = sys.modules["json"]
    assert load_object(f"{path}:value") == 7
    assert sys.modules["json"] is before


def test_a_dataclass_in_a_file_works(write: Write) -> None:
    path = write(
        """
        from __future__ import annotations
        from dataclasses import dataclass
        @dataclass(frozen=True)
        class Thing:
            a: int = 3
        """
    )
    assert load_object(f"{path}:Thing")().a == 3


@pytest.mark.parametrize("name", ["net.py", "net", "", ":build", "net.py:"])
def test_without_a_colon_the_form_is_told(name: str) -> None:
    with pytest.raises(LoadError, match=r"write file\.py:function or package\.module:function"):
        load_object(name)


def test_without_a_colon_the_functions_of_the_file_are_told(write: Write) -> None:
    path = write("from shutil import copy\ndef build(): pass\ndef other(): pass\n")
    with pytest.raises(LoadError, match=r"net\.py:build; it has build, other$"):
        load_object(str(path))


def test_a_missing_file_offers_the_closest(write: Write, tmp_path: Path) -> None:
    write("", "network.py")
    with pytest.raises(LoadError, match=r"there is no file .*netwrok\.py .*closest: network\.py"):
        load_object(f"{tmp_path}/netwrok.py:build")
    with pytest.raises(LoadError, match=r"the folder .*nowhere does not exist"):
        load_object(f"{tmp_path}/nowhere/net.py:build")
    write("", "folder/nets.py")
    with pytest.raises(LoadError, match=r"closest: nets\.py$"):
        load_object(f"{tmp_path}/folder/nets:build")
    with pytest.raises(LoadError, match="is a folder"):
        load_object(f"{tmp_path}/:build")


def test_a_missing_module_says_how_to_name_a_file() -> None:
    with pytest.raises(LoadError, match=r"no module is called 'surely_not_there'.*file\.py:function"):
        load_object("surely_not_there:build")
    with pytest.raises(LoadError, match=r"no module is called 'surely\.not\.there'"):
        load_object("surely.not.there:build")


def test_a_missing_attribute_offers_the_closest_of_its_own(write: Write) -> None:
    path = write("from shutil import copy\ndef build_model(): pass\n")
    with pytest.raises(LoadError, match=r"net\.py has no 'build_modle'; closest: build_model"):
        load_object(f"{path}:build_modle")
    with pytest.raises(LoadError, match=r"has no 'zzz'; there is build_model$"):
        load_object(f"{path}:zzz")


def test_an_import_error_keeps_the_users_traceback_and_only_that(write: Write) -> None:
    path = write("def helper():\n    return {}['weights']\nready = helper()\n")
    with pytest.raises(LoadError) as caught:
        load_object(f"{path}:build")
    text = str(caught.value)
    assert "importing" in text
    assert "KeyError: 'weights'" in text
    assert f'{path}", line 2, in helper' in text
    assert "importlib" not in text
    assert "load.py" not in text
    assert isinstance(caught.value.__cause__, KeyError)
    # a failed import leaves nothing half made behind
    path.write_text("def build(): return 5  # mended", encoding="utf-8")
    assert load_object(f"{path}:build")() == 5


def test_a_syntax_error_is_shown_where_it_is(write: Write) -> None:
    path = write("def build(:\n    pass\n")
    with pytest.raises(LoadError, match=r"(?s)SyntaxError.*net\.py\", line 1.*def build\(:"):
        load_object(f"{path}:build")


def test_a_missing_dependency_is_not_a_missing_module(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("import no_such_dependency_at_all\n", "needs_it.py")
    monkeypatch.chdir(path.parent)
    for name in ("needs_it:build", "needs_it.py:build"):
        with pytest.raises(LoadError, match=r"importing .* failed: ModuleNotFoundError.*no_such_dependency_at_all"):
            load_object(name)


def test_a_file_that_ends_the_program_is_an_error(write: Write) -> None:
    path = write("import sys\nsys.exit(3)\n")
    with pytest.raises(LoadError, match=r"exit 3.*__name__ == '__main__'"):
        load_object(f"{path}:build")


def test_what_a_function_raises_is_told_with_its_line(write: Write) -> None:
    path = write("def build():\n    raise RuntimeError('no weights here')\n")
    with pytest.raises(LoadError, match=r"(?s)build\(\) failed: RuntimeError: no weights here.*line 2, in build"):
        load_model(f"{path}:build")


def test_a_function_that_needs_arguments_is_told_before_it_is_called(write: Write) -> None:
    path = write("def build(width, depth=2): raise AssertionError\n")
    with pytest.raises(LoadError, match=r"build\(width, depth=2\) needs arguments"):
        load_model(f"{path}:build")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def build(): return None", r"gave None; a torch\.nn\.Module was expected$"),
        ("def build(): return {'w': torch.zeros(2)}", r"gave \{w: Tensor\[2\] float32\}.*load_state_dict"),
        ("build = 5", "is 5; a function that takes no arguments"),
    ],
)
def test_what_is_no_model_is_said(write: Write, body: str, said: str) -> None:
    path = write(f"import torch\n{body}\n")
    with pytest.raises(LoadError, match=said):
        load_model(f"{path}:build")


def test_a_model_comes_in_evaluation_mode_and_may_be_an_object_or_a_class(write: Write) -> None:
    path = write("from torch import nn\nmade = nn.Sequential(nn.Dropout())\nclass Net(nn.Module): pass\n")
    assert not load_model(f"{path}:made").training
    assert not load_model(f"{path}:Net").training


def test_a_task_and_its_calibration(write: Write) -> None:
    path = write(
        """
        import torch
        from bitsmith.task import Task
        def batches(): return [(torch.zeros(2, 3), torch.zeros(2))]
        def forward(model, inputs): return model(inputs)
        def task(): return Task(batches(), batches(), metric=lambda o, t: (o == t).float(), forward=forward)
        made = task()
        def wrong(): return 1
        """
    )
    assert isinstance(load_task(f"{path}:task"), Task)
    assert load_task(f"{path}:made") is load_object(f"{path}:made")
    loader, forward = load_calibration(f"{path}:task")
    assert torch.equal(next(iter(loader))[0], torch.zeros(2, 3))
    assert forward is load_object(f"{path}:forward")
    bare, none = load_calibration(f"{path}:batches")
    assert len(list(bare)) == 1
    assert none is None
    with pytest.raises(LoadError, match=r"gave 1; a bitsmith\.Task was expected"):
        load_task(f"{path}:wrong")
    with pytest.raises(DataError, match="cannot be iterated"):
        load_calibration(f"{path}:wrong")


def test_a_network_in_a_file_needs_no_function(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    x = torch.randn(2, 4)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "net.pt2")
    loaded = load_model(str(tmp_path / "net.pt2"))
    assert torch.equal(loaded(x), model(x))
    assert not loaded.training
    (tmp_path / "net.onnx").write_bytes(b"no network")
    with pytest.raises(LoadError, match=r"net\.onnx .*cut short, damaged"):
        load_model(str(tmp_path / "net.onnx"))
    with pytest.raises(LoadError, match=r"missing\.onnx is not a file"):
        load_model(str(tmp_path / "missing.onnx"))
