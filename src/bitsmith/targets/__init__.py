"""Where a plan runs and what it costs: one runtime or hardware model, one file."""

from __future__ import annotations

from .base import Artifact, ArtifactError, Realised, SiteTimes, Target, TargetError, Timing
from .coreml import CoreMl
from .digital import DigitalAccelerator
from .energy_table import EnergyTable, EnergyTableError, Entry
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .roofline import Roofline
from .storage import Connections, best_format, controller_pj, crossovers, storage_pj, stored_bits
from .systolic import SystolicArray
from .unzip_fpga import Design, DesignError, Layer, LayerCost, UnzipFpga
from .zigzag import ZigZag

__all__ = [
    "Artifact",
    "ArtifactError",
    "Connections",
    "CoreMl",
    "Design",
    "DesignError",
    "DigitalAccelerator",
    "EnergyTable",
    "EnergyTableError",
    "Entry",
    "Layer",
    "LayerCost",
    "OnnxRuntime",
    "OpenVino",
    "Realised",
    "Roofline",
    "SiteTimes",
    "SystolicArray",
    "Target",
    "TargetError",
    "Timing",
    "UnzipFpga",
    "ZigZag",
    "best_format",
    "controller_pj",
    "crossovers",
    "storage_pj",
    "stored_bits",
]
