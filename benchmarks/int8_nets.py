"""The networks of ``int8_parity``: published shapes with random weights, brought to life by real images or text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bitsmith.data import Unlabelled
from bitsmith.zoo.data import imagenet_calibration, normalise_imagenet
from bitsmith.zoo.mobilenet import mobilenet_v2
from bitsmith.zoo.resnet import resnet50
from bitsmith.zoo.statistics import settle_statistics
from bitsmith.zoo.text import bert, sst2_train, tokenize

TOKENS = 128


@dataclass(frozen=True)
class Subject:
    """A float network in eval and its real inputs, one sample each. ``heads``, ``hidden``: of a transformer, else 0."""

    model: nn.Module
    calibration: Sequence[Tensor]
    held_out: Sequence[Tensor]
    heads: int = 0
    hidden: int = 0


def packed(root: Path, count: int) -> Tensor:
    """(count, 128) token numbers without padding: sentences of SST-2 one after the other."""
    tokens: list[int] = []
    texts, _ = sst2_train(root)
    for start in range(0, len(texts), 256):
        found = tokenize(texts[start : start + 256], None)
        tokens += found["input_ids"][found["attention_mask"].bool()].tolist()
        if len(tokens) >= count * TOKENS:
            return torch.tensor(tokens[: count * TOKENS]).view(count, TOKENS)
    raise ValueError(f"SST-2 has not {count} times {TOKENS} tokens")


class _Hidden(nn.Module):
    """(n, tokens) token numbers -> (n, tokens, hidden) states of the last layer."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor) -> Tensor:
        states: Tensor = self.bert(input_ids=input_ids).last_hidden_state
        return states


def bert_base() -> nn.Module:
    """BERT-base with random weights, in eval.

    Drawn as its authors do, every attention is near uniform, so that all tokens soon carry much the same: queries and
    keys four times wider keep four fifths of the tokens' spread up to the last layer. Attention is exported as its
    plain products and softmax, the form that every tool knows.
    """
    encoder = bert("base").bert.bert
    encoder.set_attn_implementation("eager")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(("query.weight", "key.weight")):
                parameter.mul_(4)
    return _Hidden(encoder).eval()


def _vision(build: Callable[[], nn.Module]) -> Callable[[Path, int, int], Subject]:
    def subject(root: Path, calibration: int, held_out: int) -> Subject:
        images = torch.from_numpy(normalise_imagenet(imagenet_calibration(root)[: calibration + held_out]))
        model = settle_statistics(_shifted(build()), Unlabelled([images[:calibration]]))
        return Subject(model, *_parts(images, calibration))

    return subject


def _shifted(model: nn.Module) -> nn.Module:
    """With normalisations whose shifts are no longer 0 throughout (standard deviation 0.2), as training leaves them.

    Else the expanding convolutions of a MobileNetV2 read means of 0 and get biases of 0, which runtimes leave out.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.2, generator=generator)
    return model


def _bert(root: Path, calibration: int, held_out: int) -> Subject:
    return Subject(bert_base(), *_parts(packed(root, calibration + held_out), calibration), heads=12, hidden=768)


def _parts(x: Tensor, calibration: int) -> tuple[list[Tensor], list[Tensor]]:
    single = [x[i : i + 1] for i in range(len(x))]
    return single[:calibration], single[calibration:]


SUBJECTS: Mapping[str, Callable[[Path, int, int], Subject]] = {
    "resnet50": _vision(resnet50),
    "mobilenetv2": _vision(mobilenet_v2),
    "bert": _bert,
}
"""Each ``(data folder, calibration samples, held-out samples) -> Subject``."""
