"""A Keras 3 network in int8, entered in two ways: as a torch module, and as the ONNX file that Keras writes.

    python examples/keras_net.py [--target onnxruntime|openvino] [-o out/]

Needs ``pip install "bitsmith[keras]"``. It trains on scikit-learn's digits; nothing is downloaded.

Keras' torch backend must be chosen before the first import of keras. Its layers are ``nn.Module``, but a Keras model
does not register them as children and copies itself by saving and loading, so what Bitsmith puts into a copy would be
lost: :class:`KerasLayer` gives each layer a name and its weights as ordinary parameters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

from common import digits_parser, quantize
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.zoo.digits import digits_task_arrays

WIDTH = 32


def keras_layers() -> dict[str, Any]:
    """The layers by name. Channels first, as torch computes: else Keras transposes before and after each of them."""
    from keras import layers

    def conv(channels: int, strides: int = 1) -> Any:
        return layers.Conv2D(
            channels, 3, strides, padding="same", data_format="channels_first", kernel_initializer="he_normal"
        )

    return {
        "stem": conv(WIDTH, strides=2),
        "conv1": conv(WIDTH),
        "conv2": conv(WIDTH),
        "down": conv(2 * WIDTH, strides=2),
        "conv3": conv(2 * WIDTH),
        "pool": layers.GlobalAveragePooling2D(data_format="channels_first"),
        "head": layers.Dense(10),
        **{f"relu{i}": layers.ReLU() for i in range(5)},
        "add": layers.Add(),
    }


def compute(layer: Mapping[str, Callable[..., Any]] | nn.ModuleDict, x: Any) -> Any:
    """The network, (n, 1, 32, 32) -> (n, 10) logits: on Keras' symbols, and on tensors."""
    x = layer["relu0"](layer["stem"](x))
    branch = layer["conv2"](layer["relu1"](layer["conv1"](x)))
    x = layer["relu2"](layer["add"]([branch, x]))
    x = layer["relu3"](layer["down"](x))
    x = layer["relu4"](layer["conv3"](x))
    return layer["head"](layer["pool"](x))


class KerasLayer(nn.Module):
    """A Keras layer without state of its own that a copy would not take along."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        for variable in layer.trainable_variables:
            self.register_parameter(variable.name, variable.value)
        # functions are shared by copies, so the layer itself is never copied
        self.function = lambda weights, x: layer.stateless_call(weights, [], x)[0]

    def forward(self, x: Any) -> Tensor:
        result: Tensor = self.function(list(self.parameters()), x)
        return result


class KerasNet(nn.Module):
    """:func:`compute` on tensors, every layer a child."""

    def __init__(self, layers: Mapping[str, Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: KerasLayer(layer) for name, layer in layers.items()})

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = compute(self.layers, x)
        return logits


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 2: a package is missing."""
    options = digits_parser("Keras", epochs=5).parse_args(argv)
    try:
        import keras

        parts = digits_task_arrays()
    except ModuleNotFoundError as error:
        print(f'{error}; install what this example needs: pip install "bitsmith[keras]"', file=sys.stderr)
        return 2
    keras.utils.set_random_seed(0)
    layers = keras_layers()
    inputs = keras.Input((1, 32, 32))
    model = keras.Model(inputs, compute(layers, inputs))
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    model.fit(*parts["train"], batch_size=32, epochs=options.epochs, verbose=2)

    quantize("keras_module", KerasNet(layers).eval(), parts, options)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "keras.onnx"
    model.export(path, format="onnx", verbose=False)
    quantize("keras_onnx", bs.load(path), parts, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
