"""Ranking models out of fused layers."""

from recattn.models.afm import AFM
from recattn.models.din import DIN
from recattn.models.dot_attention import DotAttention
from recattn.models.mean_pooling import MeanPooling
from recattn.models.ranking import RankingModel

MODELS: dict[str, type[RankingModel]] = {"mean": MeanPooling, "dot": DotAttention, "afm": AFM, "din": DIN}

__all__ = ["AFM", "DIN", "MODELS", "DotAttention", "MeanPooling", "RankingModel"]
