"""The formula of each operator, written for reading: what the kernels are compared with."""

from recattn.reference.activation_unit import activation_unit, activation_unit_padded
from recattn.reference.activation_unit_statistics import activation_unit_statistics
from recattn.reference.attentional_gru import attentional_gru, attentional_gru_padded
from recattn.reference.pairwise_pool import pairwise_pool, pairwise_pool_gathered
from recattn.reference.self_attention import self_attention, self_attention_padded
from recattn.reference.target_attention import target_attention, target_attention_padded

__all__ = [
    "activation_unit",
    "activation_unit_padded",
    "activation_unit_statistics",
    "attentional_gru",
    "attentional_gru_padded",
    "pairwise_pool",
    "pairwise_pool_gathered",
    "self_attention",
    "self_attention_padded",
    "target_attention",
    "target_attention_padded",
]
