"""The operators, with every argument checked before anything is launched."""

from recattn.functional.activation_unit import activation_unit
from recattn.functional.activation_unit_statistics import activation_unit_statistics
from recattn.functional.checks import check_choice
from recattn.ops.activation_unit import ACTIVATIONS, FEATURES, NORMALIZATIONS

__all__ = [
    "ACTIVATIONS",
    "FEATURES",
    "NORMALIZATIONS",
    "activation_unit",
    "activation_unit_statistics",
    "check_choice",
]
