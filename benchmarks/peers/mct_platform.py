"""A target platform for Sony's Model Compression Toolkit, as its guide has users describe theirs."""

from __future__ import annotations

from typing import Any

ACTIVATIONS = 8
"""Bits of activations. Its choice of weights is the one that ``weights_memory`` constrains."""


def platform(widths: tuple[int, ...], per_channel: bool) -> Any:
    """A target platform with ``widths`` for the weights of convolutions and linear layers, the first as the base."""
    from mct_quantizers import QuantizationMethod
    from model_compression_toolkit.target_platform_capabilities.constants import BIAS_ATTR, KERNEL_ATTR
    from model_compression_toolkit.target_platform_capabilities.schema import mct_current_schema as schema

    def attribute(bits: int, enabled: bool, per_channel: bool = False) -> Any:
        return schema.AttributeQuantizationConfig(
            weights_quantization_method=QuantizationMethod.SYMMETRIC,
            weights_n_bits=bits,
            weights_per_channel_threshold=per_channel,
            enable_weights_quantization=enabled,
        )

    def operation(bits: int | None, quantized: bool = True) -> Any:
        off = attribute(8, False)
        weights = {} if bits is None else {KERNEL_ATTR: attribute(bits, True, per_channel), BIAS_ATTR: off}
        return schema.OpQuantizationConfig(
            default_weight_attr_config=off,
            attr_weights_configs_mapping=weights,
            activation_quantization_method=QuantizationMethod.UNIFORM,
            activation_n_bits=ACTIVATIONS,
            supported_input_activation_n_bits=ACTIVATIONS,
            enable_activation_quantization=quantized,
            quantization_preserving=False,
            signedness=schema.Signedness.AUTO,
        )

    names = schema.OperatorSetNames
    candidates = [operation(bits) for bits in widths]
    base = next(config for config, bits in zip(candidates, widths, strict=True) if bits == 8)
    weighted = schema.QuantizationConfigOptions(quantization_configurations=tuple(candidates), base_config=base)
    other = schema.QuantizationConfigOptions(quantization_configurations=(operation(None),))
    moved = schema.QuantizationConfigOptions(quantization_configurations=(operation(None, False),))
    moves = [names.FLATTEN, names.RESHAPE, names.PERMUTE, names.TRANSPOSE, names.GET_ITEM, names.PAD, names.DROPOUT]
    moves += [names.MAXPOOL, names.SQUEEZE, names.UNSQUEEZE, names.SIZE, names.SHAPE, names.CAST, names.SPLIT_CHUNK]
    sets = {name: schema.OperatorsSet(name=name, qc_options=moved) for name in moves}
    layers = [schema.OperatorsSet(name=name, qc_options=weighted) for name in (names.CONV, names.FULLY_CONNECTED)]
    rectified = [schema.OperatorsSet(name=name) for name in (names.RELU, names.RELU6)]
    add = schema.OperatorsSet(name=names.ADD)
    fused = schema.OperatorSetGroup(operators_set=rectified)
    return schema.TargetPlatformCapabilities(
        default_qco=other,
        tpc_minor_version=1,
        tpc_patch_version=0,
        operator_set=(*sets.values(), *layers, *rectified, add),
        # quantized after the rectifier only, as int8 kernels do
        fusing_patterns=tuple(
            schema.Fusing(operator_groups=(before, fused))
            for before in (schema.OperatorSetGroup(operators_set=layers), add)
        ),
        add_metadata=False,
        name="weights of several widths",
    )
