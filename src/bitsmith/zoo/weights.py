"""Weights: trained ones from ``.npz`` files, strictly; random ones from a seed."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


class WeightsError(ValueError):
    """A weights file that cannot be read, or that does not belong to the model."""


def read_npz(path: str | Path) -> dict[str, NDArray[Any]]:
    """Every array of an ``.npz`` file by name. Never unpickles. Raises ``WeightsError``, ``FileNotFoundError``."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of an .npz file")
    try:
        # np.load leaves a damaged file open when it is given the path
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise WeightsError(f"{path} holds one bare array, not named arrays; write it with numpy.savez")
            with archive:
                return {name: archive[name] for name in archive.files}
    # a damaged file fails in whichever layer meets the damage: zip, zlib, or numpy's header
    except (ValueError, OSError, EOFError, KeyError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"{path} is not a readable, pickle-free .npz ({error}); fetch or write it again") from None


def load_npz(model: Net, path: str | Path) -> Net:
    """Fill ``model`` with the arrays of an ``.npz`` file and return it: :func:`load_arrays` of :func:`read_npz`."""
    return load_arrays(model, read_npz(path), path)


def load_arrays(model: Net, arrays: Mapping[str, NDArray[Any]], source: str | Path) -> Net:
    """Fill ``model`` with named arrays and return it; these loaders are the only calls that write to a model.

    Keys are those of ``model.state_dict()``; only ``num_batches_tracked``, which inference never reads, may be absent.
    Missing or unexpected keys, another shape or another kind of number raise ``WeightsError``, which names ``source``,
    and nothing is loaded.
    """
    state = model.state_dict()
    problems = _mismatches(arrays, state)
    if problems:
        raise WeightsError(
            f"{source} does not fit {type(model).__name__}, nothing was loaded: {'; '.join(problems)}. "
            "Use the model these weights were saved from, with the same number of classes"
        )
    tensors = {name: torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) for name, array in arrays.items()}
    model.load_state_dict({**state, **tensors})
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's CPU generator starts from ``seed``; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def build(make: Callable[[], Net], seed: int) -> Net:
    """``make()`` in evaluation mode with random weights, the same for the same seed: He et al. 2015, arXiv:1502.01852,
    eq. 10 (normal, fan-in) for convolutions and linear layers, zero biases. Statistics of normalisations are left
    at mean 0 and variance 1: see :func:`bitsmith.zoo.statistics.settle_statistics`."""
    with seeded(seed):
        model = make()
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model.eval()


def _mismatches(arrays: Mapping[str, NDArray[Any]], state: Mapping[str, torch.Tensor]) -> list[str]:
    problems = []
    missing = [name for name in state if name not in arrays and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in arrays if name not in state]
    for label, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            problems.append(f"{len(names)} {label}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
    for name, array in arrays.items():
        if name not in state:
            continue
        if array.shape != tuple(state[name].shape):
            problems.append(f"{name} has shape {array.shape}, the model's is {tuple(state[name].shape)}")
        elif (array.dtype.kind == "f") != state[name].is_floating_point() or array.dtype.kind not in "fiub":
            problems.append(f"{name} is {array.dtype}, the model's is {state[name].dtype}")
    return problems
