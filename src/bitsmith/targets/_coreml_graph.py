"""From an exported program to an ML Program whose weights are constant expressions, and what such a file holds."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..export.program import ExportError, quiet
from ._coreml_weights import Form, packed
from .base import Array, ArtifactError, Realised, TargetError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

MODEL = "Data/com.apple.CoreML/model.mlmodel"
INSTALL = 'pip install "bitsmith[coreml]"'


def coremltools() -> Any:
    """The package; :class:`TargetError` where it is missing or has no writer for weights."""
    try:
        with _silent():
            import coremltools
            import coremltools.libmilstoragepython  # what writes weights: not in every build
    except ImportError as error:
        raise TargetError(f'the target "coreml" needs coremltools ({error}); install it with: {INSTALL}') from None
    return coremltools


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """No progress bars, no remarks on versions or on what cannot be run here, no deprecations of its own calls."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    with quiet(), warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def write_package(program: ExportedProgram, forms: Mapping[str, Form], version: int, half: bool, path: Path) -> Any:
    """Write a program as the ``.mlpackage`` folder ``path``, its constants of those names in those forms; its spec.

    Equal programs give equal bytes. Raises :class:`ExportError` with the operation that has no translation.
    """
    tools = coremltools()
    system = getattr(tools.target, f"iOS{version}")
    precision = tools.precision.FLOAT16 if half else tools.precision.FLOAT32
    with _silent():
        try:
            # as it is, so that no pass merges a constant with another before it has its form
            graph = tools.convert(
                program,
                convert_to="milinternal",
                minimum_deployment_target=system,
                compute_precision=tools.precision.FLOAT32,
                pass_pipeline=tools.PassPipeline.EMPTY,
            )
            _store(graph, forms, version)
            passes = tools.PassPipeline()
            # makes a normalisation of a factor by channel, and adds 1e-5 to its variance of 1
            passes.remove_passes({"common::fuse_elementwise_to_batchnorm"})
            model = tools.convert(
                graph,
                source="milinternal",
                convert_to="mlprogram",
                minimum_deployment_target=system,
                compute_precision=precision,
                pass_pipeline=passes,
                skip_model_load=True,
                package_dir=str(path),
            )
        except Exception as error:
            first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ExportError(f"the network cannot be written for Core ML: {first}") from error
        spec = model.get_spec()
    _settle(spec, path)
    return spec


# -- constant expressions ------------------------------------------------------------------------------------------


def _store(graph: Any, forms: Mapping[str, Form], version: int) -> None:
    """Put expressions in the place of constants."""
    (function,) = graph.functions.values()
    for op in list(function.operations):
        form = forms.get(op.outputs[0].name) if op.op_type == "const" else None
        if form is None or (form.scale is None and form.palettes is None and form.kept is None):
            continue
        with function, _scopes():
            made = _joined(form, op) if version >= 18 else _single(form, op)
            # its name, which the constant has had
            op.outputs[0].name = f"{op.outputs[0].name}_before"
            function.replace_uses_of_var_after_op(
                anchor_op=made.op, old_var=op.outputs[0], new_var=made, force_replace=True
            )
        function.remove_ops([op])


@contextlib.contextmanager
def _scopes() -> Iterator[None]:
    """Where a constant came from, which every operation has to say, and coremltools leaves open as well."""
    from coremltools.converters.mil.mil import Builder
    from coremltools.converters.mil.mil.scope import ScopeInfo, ScopeSource

    kinds = (ScopeSource.EXIR_STACK_TRACE, ScopeSource.EXIR_DEBUG_HANDLE)
    with Builder.scope(*(ScopeInfo(source=kind, data=[None]) for kind in kinds)):
        yield


def _single(form: Form, op: Any) -> Any:
    """The expression of iOS 16: one, of bytes packed here."""
    from coremltools.converters.mil.mil import Builder as Mil

    name, shape = op.outputs[0].name, np.array(form.shape, np.uint32)
    if form.palettes is not None:
        (palette,) = form.palettes
        indices = packed(form.data, form.width)
        return Mil.constexpr_lut_to_dense(indices=indices, lut=palette, shape=shape, name=name, before_op=op)
    if form.kept is not None:
        mask = packed(form.kept, 1)
        return Mil.constexpr_sparse_to_dense(nonzero_data=form.data, mask=mask, shape=shape, name=name, before_op=op)
    assert form.scale is not None
    axis = next((k for k, size in enumerate(form.scale.shape) if size > 1), 0)
    offset = np.zeros(form.scale.shape, form.data.dtype) if form.offset is None else form.offset
    return Mil.constexpr_affine_dequantize(
        quantized_data=form.data,
        zero_point=offset.squeeze()[()],
        scale=form.scale.squeeze()[()],
        axis=np.int32(axis),
        name=name,
        before_op=op,
    )


def _joined(form: Form, op: Any) -> Any:
    """The expressions of iOS 18, one behind the other: looked up, scaled, spread over the places that are left."""
    from coremltools.converters.mil.mil import Builder as Mil

    name, rank = op.outputs[0].name, len(form.shape)
    last = f"{name}_values"  # the one that gives the weight bears its name
    palettes = None
    if form.palettes is not None:
        rows, entries = form.palettes.shape
        palettes = form.palettes.reshape(rows, *[1] * (rank - 1), entries, 1)
    scale, offset = form.scale, form.offset
    data = _narrow(form.data, form.width, form.palettes is not None)
    if form.kept is None:
        if palettes is not None:
            whole = name if scale is None else last
            data = Mil.constexpr_lut_to_dense(indices=data, lut=palettes, name=whole, before_op=op)
        if scale is not None:
            given = {} if offset is None else {"offset": _narrow(offset, form.width, False)}
            data = Mil.constexpr_blockwise_shift_scale(data=data, scale=scale, **given, name=name, before_op=op)
        return data
    mask = _narrow(form.kept, 1, True)
    if palettes is not None:
        mask, data = Mil.constexpr_lut_to_sparse(
            indices_mask=mask, indices_nonzero_data=data, lut=palettes, name=last, before_op=op
        )
    if scale is not None:
        mask, data = Mil.constexpr_sparse_blockwise_shift_scale(
            data_mask=mask, nonzero_data=data, scale=scale, name=f"{name}_scaled", before_op=op
        )
    return Mil.constexpr_sparse_to_dense(nonzero_data=data, mask=mask, name=name, before_op=op)


def _narrow(data: Array, width: int, unsigned: bool) -> Array:
    """Integers in the type of so many bits that coremltools packs; floats as they are."""
    if data.dtype.kind == "f":
        return data
    from coremltools.converters.mil.mil import types

    sign = "u" if unsigned or data.dtype.kind in "ub" else ""
    found: Array = data.astype(types.nptype_from_builtin(types.string_to_builtin(f"{sign}int{width}")))
    return found


# -- files ---------------------------------------------------------------------------------------------------------


def _settle(spec: Any, path: Path) -> None:
    """Write what differs between equal networks again: the date in the program, random names in the manifest."""
    date = "com.github.apple.coremltools.conversion_date"
    spec.description.metadata.userDefined.pop(date, None)
    noted = spec.mlProgram.attributes["buildInfo"].immediateValue.dictionary.values
    for entry in [entry for entry in noted if list(entry.key.immediateValue.tensor.strings.values) == [date]]:
        noted.remove(entry)
    (path / MODEL).write_bytes(spec.SerializeToString(deterministic=True))
    manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
    names = {old: _identifier(entry["path"]) for old, entry in manifest["itemInfoEntries"].items()}
    entries = manifest["itemInfoEntries"].items()
    manifest["itemInfoEntries"] = {names[old]: dict(sorted(entry.items())) for old, entry in entries}
    manifest["rootModelIdentifier"] = names[manifest["rootModelIdentifier"]]
    (path / "Manifest.json").write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _identifier(path: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper()


def read_spec(path: Path) -> Any:
    """The spec of a package; :class:`ArtifactError` where it cannot be read."""
    tools = coremltools()
    try:
        return tools.utils.load_spec(str(path))
    except Exception as error:
        raise ArtifactError(f"coremltools cannot read {path}: {error}; export again") from error


def operations(spec: Any) -> list[Any]:
    """The operations of a program's one function, in order, constants and expressions included."""
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return list(block.operations)


def described(spec: Any) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """(name, shape, dtype) of every input."""
    kinds = {65568: "float32", 65552: "float16", 131104: "int32"}
    found = []
    for value in spec.description.input:
        array = value.type.multiArrayType
        found.append((value.name, tuple(map(int, array.shape)), kinds[array.dataType]))
    return tuple(found)


def stored(operation: Any, made: Mapping[str, Any]) -> str:
    """What an expression stores, in words. ``made``: the operation that gives each value."""
    chain, waiting = [], [operation]
    while waiting:
        at = waiting.pop()
        if at.type.startswith("constexpr_"):
            chain.append(at.type)
            waiting += [made[b.name] for i in at.inputs.values() for b in i.arguments if b.name in made]
    return " of ".join(dict.fromkeys(chain))


def realised(spec: Any, nodes: Mapping[str, tuple[str, ...]]) -> dict[str, Realised]:
    """What the file says of every site. How a device computes it is not in the file."""
    made = {value.name: op for op in operations(spec) for value in op.outputs}
    found = {}
    for site, names in nodes.items():
        ops = [made[name] for name in names if name in made]
        computed = [op for op in ops if not op.type.startswith("constexpr_")]
        if not computed:
            found[site] = Realised("folded", "no operation of its own in the file: folded into a neighbour")
            continue
        precision = _precision(computed[0])
        held = [stored(op, made) for op in ops if op.type.startswith("constexpr_")]
        kinds = ", ".join(dict.fromkeys(op.type for op in computed))
        if held:
            found[site] = Realised("size only", f"its weights are stored as {held[-1]}; {kinds} in {precision}")
        else:
            found[site] = Realised(precision, kinds)
    return found


def _precision(operation: Any) -> str:
    kind = operation.outputs[0].type.tensorType.dataType
    return {10: "float16", 11: "float32"}.get(kind, "integers")
