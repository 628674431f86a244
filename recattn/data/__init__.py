"""Readers of real logs and generators of synthetic ones."""

from recattn.data.batch import Batch
from recattn.data.examples import Examples
from recattn.data.fetch import fetch_movielens
from recattn.data.interactions import Interactions
from recattn.data.movielens import read_movielens
from recattn.data.sessions import Sessions, split_sessions
from recattn.data.synthetic import LENGTH_DISTRIBUTIONS, random_batch, random_histories, sample_lengths

__all__ = [
    "LENGTH_DISTRIBUTIONS",
    "Batch",
    "Examples",
    "Interactions",
    "Sessions",
    "fetch_movielens",
    "random_batch",
    "random_histories",
    "read_movielens",
    "sample_lengths",
    "split_sessions",
]
