"""Ranking models out of fused layers."""

from recattn.models.bst import BST
from recattn.models.dien import DIEN
from recattn.models.din import DIN
from recattn.models.dot_attention import DotAttention
from recattn.models.mean_pooling import MeanPooling
from recattn.models.ranking import RankingModel

MODELS: dict[str, type[RankingModel]] = {
    "mean": MeanPooling,
    "dot": DotAttention,
    "din": DIN,
    "dien": DIEN,
    "bst": BST,
}

__all__ = ["BST", "DIEN", "DIN", "MODELS", "DotAttention", "MeanPooling", "RankingModel"]
