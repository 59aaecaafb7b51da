"""What is compared: techniques and the steps before them, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import bitsmith as bs

GPT, FISHER, BIAS = bs.SparseGpt(), bs.FisherPalettes(64), bs.CorrectBias()
HALF, THIRD, MOST, TWO_OF_FOUR = bs.Sparse(0.5), bs.Sparse(0.3), bs.Sparse(0.7), bs.Sparse(0.5, "n:m")
CHANNELS, RESTORED = bs.PruneChannels(0.75, divisor=4), bs.PruneChannels(0.75, divisor=4, samples=256)
INT4 = bs.Int(4, None, weight_range=bs.Range("mse"))
INT4_BY_32 = bs.Int(4, None, granularity="group", group=32, weight_range=bs.Range("mse"))


@dataclass(frozen=True)
class Form:
    """``technique`` at every layer that it fits; ``steps`` before. ``narrow``: whether layers of few weights for a
    channel keep 8 bits and all weights. ``drawn``: whether what comes out depends on the calibration samples, and so
    on the seed."""

    technique: bs.Technique | None = None
    steps: tuple[bs.Step, ...] = ()
    family: str = "composed"
    narrow: bool = True

    @property
    def drawn(self) -> bool:
        return computes(self.technique) or any(step != CHANNELS for step in self.steps)


def computes(technique: bs.Technique | None) -> bool:
    """Whether activations are integers, too."""
    return isinstance(technique, bs.Int) and technique.a is not None


FORMS: Mapping[str, Form] = {
    "float": Form(family="float"),
    "int8": Form(bs.Int(8, 8), family="integers"),
    "int8 weights": Form(bs.Int(8, None), family="integers"),
    "int4 weights everywhere, widest range": Form(bs.Int(4, None), family="integers", narrow=False),
    "int4 weights": Form(INT4, family="integers"),
    "int4 weights, biases corrected": Form(INT4, (BIAS,), "integers"),
    "int4 weights by 32, biases corrected": Form(INT4_BY_32, (BIAS,), "integers"),
    "palette of 4 bits everywhere": Form(bs.Palette(4), family="palettes", narrow=False),
    "palette of 6 bits, biases corrected": Form(bs.Palette(6), (BIAS,), "palettes"),
    "palette of 4 bits": Form(bs.Palette(4), family="palettes"),
    "palette of 4 bits, biases corrected": Form(bs.Palette(4), (BIAS,), "palettes"),
    "palette of 4 bits, Fisher": Form(bs.Palette(4), (FISHER,), "palettes"),
    "palette of 4 bits, Fisher, biases corrected": Form(bs.Palette(4), (FISHER, BIAS), "palettes"),
    "palettes of 4 bits by 16 channels, biases corrected": Form(bs.Palette(4, group=16), (BIAS,), "palettes"),
    "palette of 3 bits, biases corrected": Form(bs.Palette(3), (BIAS,), "palettes"),
    "palette of 3 bits, Fisher, biases corrected": Form(bs.Palette(3), (FISHER, BIAS), "palettes"),
    "palette of 3 bits by scale, biases corrected": Form(bs.Int(8, None, of=bs.Palette(3)), (BIAS,), "palettes"),
    "palette of 2 bits, biases corrected": Form(bs.Palette(2), (BIAS,), "palettes"),
    "half of the weights": Form(HALF, family="pruned"),
    "half, SparseGPT": Form(HALF, (GPT,), "pruned"),
    "half, SparseGPT, biases corrected": Form(HALF, (GPT, BIAS), "pruned"),
    "0.3 of the weights": Form(THIRD, family="pruned"),
    "0.3, SparseGPT": Form(THIRD, (GPT,), "pruned"),
    "2 of 4": Form(TWO_OF_FOUR, family="pruned"),
    "2 of 4, SparseGPT": Form(TWO_OF_FOUR, (GPT,), "pruned"),
    "0.75 of the channels": Form(None, (CHANNELS,), "pruned"),
    "0.75 of the channels, restored": Form(None, (RESTORED,), "pruned"),
    "int8, palette of 4": Form(bs.Int(8, 8, of=bs.Palette(4)), (BIAS,)),
    "half (SparseGPT), int8": Form(bs.Int(8, 8, of=HALF), (GPT, BIAS)),
    "half (SparseGPT), palette of 4": Form(bs.Palette(4, of=HALF), (GPT, BIAS)),
    "half (SparseGPT), int8, palette of 4": Form(bs.Int(8, 8, of=bs.Palette(4, of=HALF)), (GPT, BIAS)),
    "0.7 (SparseGPT), int8, palette of 4": Form(bs.Int(8, 8, of=bs.Palette(4, of=MOST)), (GPT, BIAS)),
    "0.3 (SparseGPT), int8, palette of 3": Form(bs.Int(8, 8, of=bs.Palette(3, of=THIRD)), (GPT, BIAS)),
}
"""Biases are corrected last in what is composed."""

TRAINED_FORMS: Mapping[str, Form] = {
    "palette of 2 bits": Form(bs.Palette(2), family="palettes"),
    "palette of 2 bits, soft": Form(bs.Palette(2, learn="soft"), family="palettes"),
    "0.3 of the weights": FORMS["0.3 of the weights"],
    "0.3 of the weights, gradually": Form(bs.Sparse(0.3, schedule="polynomial", every=4), family="pruned"),
    "0.75 of the channels, restored": FORMS["0.75 of the channels, restored"],
    "0.3 (SparseGPT), int8, palette of 3": FORMS["0.3 (SparseGPT), int8, palette of 3"],
}

FEW = (
    *("float", "int8", "int8 weights", "int4 weights everywhere, widest range", "int4 weights"),
    *("int4 weights, biases corrected", "palette of 4 bits everywhere", "palette of 6 bits, biases corrected"),
    *("palette of 4 bits", "palette of 4 bits, biases corrected", "palette of 3 bits by scale, biases corrected"),
    *("half of the weights", "half, SparseGPT", "half (SparseGPT), int8"),
    *("int8, palette of 4", "half (SparseGPT), int8, palette of 4", "0.7 (SparseGPT), int8, palette of 4"),
)
"""Of MobileNetV1, unless --full."""
