"""Fused attention for ranking models in PyTorch."""

from recattn import data, functional, models, nn
from recattn.backend import backend
from recattn.explain import explain
from recattn.jagged import Jagged
from recattn.swap import fuse, unfuse
from recattn.warmup import autotune, warmup

__version__ = "0.1.0"

__all__ = [
    "Jagged",
    "autotune",
    "backend",
    "data",
    "explain",
    "functional",
    "fuse",
    "models",
    "nn",
    "unfuse",
    "warmup",
]
