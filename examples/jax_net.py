"""A JAX network in int8, entered through the ONNX file that jax2onnx writes.

    python examples/jax_net.py [--target onnxruntime|openvino] [-o out/]

Needs ``pip install "bitsmith[jax]"``. It trains on scikit-learn's digits; nothing is downloaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from common import digits_parser, quantize

import bitsmith as bs
from bitsmith.zoo.digits import Split, digits_task_arrays

if TYPE_CHECKING:
    import jax

    Weights = dict[str, dict[str, jax.Array]]

WIDTH = 32
BATCH = 32
RATE, DECAY, DECAY_SQUARE, TINY = 2e-3, 0.9, 0.999, 1e-8  # Adam's (Kingma and Ba 2014, arXiv:1412.6980)


def initial(seed: int = 0) -> Weights:
    """Normal weights with variance 2 / fan-in, biases zero."""
    import jax
    import jax.numpy as jnp

    shapes = {
        "stem": (WIDTH, 1, 3, 3),
        "conv1": (WIDTH, WIDTH, 3, 3),
        "conv2": (WIDTH, WIDTH, 3, 3),
        "down": (2 * WIDTH, WIDTH, 3, 3),
        "conv3": (2 * WIDTH, 2 * WIDTH, 3, 3),
        "head": (10, 2 * WIDTH),
    }
    keys = jax.random.split(jax.random.PRNGKey(seed), len(shapes))
    return {
        name: {
            "weight": jax.random.normal(key, shape) * (2 / np.prod(shape[1:])) ** 0.5,
            "bias": jnp.zeros(shape[0]),
        }
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def forward(weights: Weights, x: Any) -> Any:
    """(n, 1, 32, 32) -> (n, 10) logits. Channels first: ONNX knows no other convolution."""
    import jax

    def conv(name: str, x: Any, stride: int = 1) -> Any:
        layout = ("NCHW", "OIHW", "NCHW")
        y = jax.lax.conv_general_dilated(
            x, weights[name]["weight"], (stride, stride), ((1, 1), (1, 1)), dimension_numbers=layout
        )
        return y + weights[name]["bias"][None, :, None, None]

    relu = jax.nn.relu
    x = relu(conv("stem", x, 2))
    x = relu(conv("conv2", relu(conv("conv1", x))) + x)
    x = relu(conv("down", x, 2))
    x = relu(conv("conv3", x))
    return x.mean((2, 3)) @ weights["head"]["weight"].T + weights["head"]["bias"]


def train(weights: Weights, part: Split, epochs: int, seed: int = 0) -> Weights:
    """Adam on the cross-entropy."""
    import jax
    import jax.numpy as jnp

    def loss(weights: Weights, x: Any, y: Any) -> Any:
        likelihood = jax.nn.log_softmax(forward(weights, x))
        return -jnp.take_along_axis(likelihood, y[:, None], 1).mean()

    @jax.jit
    def step(weights: Weights, mean: Weights, square: Weights, count: Any, x: Any, y: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(weights, x, y)
        tree = jax.tree_util.tree_map
        mean = tree(lambda m, g: DECAY * m + (1 - DECAY) * g, mean, gradient)
        square = tree(lambda s, g: DECAY_SQUARE * s + (1 - DECAY_SQUARE) * g * g, square, gradient)
        first, second = 1 - DECAY**count, 1 - DECAY_SQUARE**count
        weights = tree(lambda w, m, s: w - RATE * m / first / (jnp.sqrt(s / second) + TINY), weights, mean, square)
        return weights, mean, square, value

    x, y = part
    rng = np.random.default_rng(seed)
    mean = square = jax.tree_util.tree_map(jnp.zeros_like, weights)
    count = 0.0
    for epoch in range(1, epochs + 1):
        order, total = rng.permutation(len(x)), 0.0
        for chosen in np.split(order[: len(x) // BATCH * BATCH], len(x) // BATCH):
            count += 1
            weights, mean, square, value = step(weights, mean, square, count, x[chosen], y[chosen])
            total += float(value)
        print(f"epoch {epoch} of {epochs}: loss {total / (len(x) // BATCH):.3f}", flush=True)
    return weights


def main(argv: Sequence[str] | None = None) -> int:
    """0: done. 2: a package is missing."""
    options = digits_parser("JAX", epochs=8).parse_args(argv)
    try:
        from jax2onnx import to_onnx

        parts = digits_task_arrays()
    except ModuleNotFoundError as error:
        print(f'{error}; install what this example needs: pip install "bitsmith[jax]"', file=sys.stderr)
        return 2
    weights = train(initial(), parts["train"], options.epochs)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "jax.onnx"
    to_onnx(
        lambda x: forward(weights, x),
        [("batch", 1, 32, 32)],  # a name keeps that size open
        opset=21,
        return_mode="file",
        output_path=str(path),
    )
    quantize("jax", bs.load(path), parts, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
