"""The formula of each operator, written for reading: what the kernels are compared with."""

from recattn.reference.activation_unit import activation_unit, activation_unit_padded
from recattn.reference.target_attention import target_attention, target_attention_padded

__all__ = ["activation_unit", "activation_unit_padded", "target_attention", "target_attention_padded"]
