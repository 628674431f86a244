"""Layers over the operators, each with an eager twin that shares its parameters."""

from recattn.nn.activation_unit import ActivationUnit
from recattn.nn.target_attention import TargetAttention
from recattn.nn.twin import Twin

__all__ = ["ActivationUnit", "TargetAttention", "Twin"]
