"""The networks of ``int8_parity``: published shapes, random weights (but one) brought to life by images or text."""

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
from bitsmith.zoo.text import MiniLm, bert, sst2_train, tokenize

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
    """BERT-base with trained weights: those of all-MiniLM-L6-v2, every channel twice and every layer twice; in eval.

    Widening keeps what a layer computes (Chen et al. 2015, arXiv:1511.05641, sec. 2.3): the weights that read a channel
    are halved. Twelve layers (stacked as by Gong et al. 2019, ICML) compute something else than the six, with the
    spreads and the outlying channels that training makes. Attention is exported as its plain products and softmax, the
    form that every tool knows.
    """
    small, large = MiniLm().encoder, bert("base").bert.bert
    hidden = torch.arange(large.config.hidden_size) % small.config.hidden_size
    inner = torch.arange(large.config.intermediate_size) % small.config.intermediate_size
    # the channels of a head stay in the head of the same number
    size = small.config.hidden_size // small.config.num_attention_heads
    heads = (torch.arange(small.config.num_attention_heads)[:, None] * size + torch.arange(2 * size) % size).flatten()
    linear = {
        "attention.self.query": (heads, hidden),
        "attention.self.key": (heads, hidden),
        "attention.self.value": (heads, hidden),
        "attention.output.dense": (hidden, heads),
        "intermediate.dense": (inner, hidden),
        "output.dense": (hidden, inner),
    }
    with torch.no_grad():
        for name, parameter in large.embeddings.named_parameters():
            parameter.copy_(small.embeddings.get_parameter(name)[..., hidden])
        for index, layer in enumerate(large.encoder.layer):
            source = small.encoder.layer[index // 2]
            for name, (rows, columns) in linear.items():
                given, grown = source.get_submodule(name), layer.get_submodule(name)
                grown.weight.copy_(given.weight[rows][:, columns] / 2)
                grown.bias.copy_(given.bias[rows])
            for parameter in layer.attention.self.query.parameters():
                parameter.mul_(0.5**0.5)  # products have twice the terms, over the root of twice as many channels
            for name in ("attention.output.LayerNorm", "output.LayerNorm"):
                for kind in ("weight", "bias"):
                    values = source.get_submodule(name).get_parameter(kind)[hidden]
                    layer.get_submodule(name).get_parameter(kind).copy_(values)
    large.set_attn_implementation("eager")
    return _Hidden(large).eval()


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


def _text(build: Callable[[], nn.Module]) -> Callable[[Path, int, int], Subject]:
    def subject(root: Path, calibration: int, held_out: int) -> Subject:
        tokens = packed(root, calibration + held_out)
        return Subject(build(), *_parts(tokens, calibration), heads=12, hidden=768)

    return subject


def _parts(x: Tensor, calibration: int) -> tuple[list[Tensor], list[Tensor]]:
    single = [x[i : i + 1] for i in range(len(x))]
    return single[:calibration], single[calibration:]


SUBJECTS: Mapping[str, Callable[[Path, int, int], Subject]] = {
    "resnet50": _vision(resnet50),
    "mobilenetv2": _vision(mobilenet_v2),
    "bert": _text(bert_base),
}
"""Each ``(data folder, calibration samples, held-out samples) -> Subject``."""
