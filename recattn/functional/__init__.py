"""The operators, with every argument checked before anything is launched."""

from recattn.functional.activation_unit import activation_unit
from recattn.functional.activation_unit_statistics import activation_unit_statistics
from recattn.functional.attentional_gru import attentional_gru
from recattn.functional.checks import check_choice
from recattn.functional.pairwise_pool import pairwise_pool
from recattn.functional.self_attention import self_attention
from recattn.functional.target_attention import target_attention
from recattn.ops.activation_unit import ACTIVATIONS, FEATURES, NORMALIZATIONS
from recattn.ops.attentional_gru import KINDS, UPDATES

__all__ = [
    "ACTIVATIONS",
    "FEATURES",
    "KINDS",
    "NORMALIZATIONS",
    "UPDATES",
    "activation_unit",
    "activation_unit_statistics",
    "attentional_gru",
    "check_choice",
    "pairwise_pool",
    "self_attention",
    "target_attention",
]
