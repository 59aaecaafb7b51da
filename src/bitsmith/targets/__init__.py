"""Where a plan runs and what it costs: one runtime or hardware model, one file."""

from __future__ import annotations

from .base import Artifact, ArtifactError, Realised, SiteTimes, Target, TargetError, Timing
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .roofline import Roofline

__all__ = [
    "Artifact",
    "ArtifactError",
    "OnnxRuntime",
    "OpenVino",
    "Realised",
    "Roofline",
    "SiteTimes",
    "Target",
    "TargetError",
    "Timing",
]
