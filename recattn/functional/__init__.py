"""The operators, with every argument checked before anything is launched."""

from recattn.functional.activation_unit import activation_unit
from recattn.functional.checks import check_choice
from recattn.functional.target_attention import target_attention
from recattn.ops.activation_unit import ACTIVATIONS, FEATURES, NORMALIZATIONS

__all__ = ["ACTIVATIONS", "FEATURES", "NORMALIZATIONS", "activation_unit", "check_choice", "target_attention"]
