"""What says how much a site can lose, as values: ``bitsmith.sensitivities.InterLayer()``."""

from typing import TYPE_CHECKING

from ._lazy import loader

if TYPE_CHECKING:
    from .sensitivity.hessian_trace import HessianTrace as HessianTrace
    from .sensitivity.inter_layer import InterLayer as InterLayer
    from .sensitivity.noise import NoiseInjection as NoiseInjection
    from .sensitivity.one_at_a_time import loss_rise as loss_rise
    from .sensitivity.one_at_a_time import output_error as output_error
    from .sensitivity.pairwise import Pairwise as Pairwise
    from .sensitivity.quantization_error import QuantizationError as QuantizationError

__all__ = [
    "HessianTrace",
    "InterLayer",
    "NoiseInjection",
    "Pairwise",
    "QuantizationError",
    "loss_rise",
    "output_error",
]
__getattr__ = loader(
    __name__,
    {
        "HessianTrace": "sensitivity.hessian_trace",
        "InterLayer": "sensitivity.inter_layer",
        "NoiseInjection": "sensitivity.noise",
        "Pairwise": "sensitivity.pairwise",
        "QuantizationError": "sensitivity.quantization_error",
        "loss_rise": "sensitivity.one_at_a_time",
        "output_error": "sensitivity.one_at_a_time",
    },
)
