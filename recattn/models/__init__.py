"""Ranking models out of fused layers."""

from recattn.models.afm import AFM
from recattn.models.bst import BST
from recattn.models.dien import DIEN
from recattn.models.din import DIN
from recattn.models.dot_attention import DotAttention
from recattn.models.dsin import DSIN
from recattn.models.dstn import DSTN
from recattn.models.mean_pooling import MeanPooling
from recattn.models.ranking import RankingModel

MODELS: dict[str, type[RankingModel]] = {
    "mean": MeanPooling,
    "dot": DotAttention,
    "afm": AFM,
    "din": DIN,
    "dien": DIEN,
    "bst": BST,
    "dsin": DSIN,
    "dstn": DSTN,
}

__all__ = [
    "AFM",
    "BST",
    "DIEN",
    "DIN",
    "DSIN",
    "DSTN",
    "MODELS",
    "DotAttention",
    "MeanPooling",
    "RankingModel",
]
