"""Layers over the operators, each with an eager twin that shares its parameters."""

from recattn.nn.activation_unit import ActivationUnit
from recattn.nn.attentional_gru import AttentionalGRU
from recattn.nn.pairwise_pool import PairwisePool
from recattn.nn.self_attention import SelfAttention
from recattn.nn.target_attention import TargetAttention
from recattn.nn.twin import Twin

__all__ = ["ActivationUnit", "AttentionalGRU", "PairwisePool", "SelfAttention", "TargetAttention", "Twin"]
