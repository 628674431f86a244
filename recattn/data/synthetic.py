"""Histories that no one has to download: lengths out of named distributions, and batches of such lengths."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recattn.data.batch import Batch
from recattn.jagged import Jagged, offsets_of

__all__ = ["LENGTH_DISTRIBUTIONS", "random_batch", "random_histories", "sample_lengths"]

LENGTH_DISTRIBUTIONS = ("uniform", "lognormal", "zipf", "equal", "one_huge")
# Of the logarithm of a length. MovieLens-100K: mean 106, median 65, and sqrt(2 ln(106 / 65)) = 0.99.
_SIGMA = 1.0


def sample_lengths(
    distribution: str, batch: int, max_length: int, *, fill: float = 0.2, seed: int = 0
) -> Tensor:
    """The lengths of a batch of histories.

    Args:
        distribution: `"uniform"` over 0..max_length; `"lognormal"`, many short histories and a long tail, cut
            at max_length; `"zipf"`, `P(n) ∝ n^-a` over 1..max_length with the exponent that gives the mean;
            `"equal"`, all max_length; `"one_huge"`, one history of max_length somewhere among others of
            0..max_length / 64.
        batch: B, the number of lengths.
        max_length: the longest that can come.
        fill: mean length over max_length, in (0, 1]; for zipf at most 0.5. The lognormal batch meets it up to
            rounding, zipf in expectation; the other distributions have a mean of their own.
        seed: of the draws; the same seed gives the same lengths on every device.

    Returns:
        `[B]` int64 on the CPU, each in 0..max_length.

    Raises:
        ValueError: for a distribution that does not exist, a negative size, or a fill out of range.
    """
    if distribution not in LENGTH_DISTRIBUTIONS:
        expected = ", ".join(LENGTH_DISTRIBUTIONS)
        raise ValueError(f"distribution: expected one of {expected}, got {distribution!r}")
    if batch < 0 or max_length < 0:
        raise ValueError(f"batch, max_length: expected at least 0, got {batch} and {max_length}")
    most = 0.5 if distribution == "zipf" else 1.0
    if not 0 < fill <= most:
        raise ValueError(f"fill: expected a fraction in (0, {most:g}] for {distribution}, got {fill}")
    if batch == 0 or max_length == 0:
        return torch.zeros(batch, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    match distribution:
        case "uniform":
            return torch.randint(0, max_length + 1, (batch,), generator=generator)
        case "lognormal":
            return _lognormal(_uniform_draws(batch, generator), max_length, fill * max_length)
        case "zipf":
            return _zipf(_uniform_draws(batch, generator), max_length, fill * max_length)
        case "equal":
            return torch.full((batch,), max_length)
    lengths = torch.randint(0, max_length // 64 + 1, (batch,), generator=generator)
    lengths[torch.randint(0, batch, (1,), generator=generator)] = max_length
    return lengths


def random_histories(
    lengths: Tensor,
    dim: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, Jagged]:
    """Normal queries `[B, dim]` and histories `[T, dim]` of these lengths, `[B]` integers.

    The values are drawn on the device, so a seed means the same only there.
    """
    generator = torch.Generator(device).manual_seed(seed)
    total = int(lengths.sum())
    query = torch.randn(len(lengths), dim, dtype=dtype, device=device, generator=generator)
    values = torch.randn(total, dim, dtype=dtype, device=device, generator=generator)
    return query, Jagged(values, offsets_of(lengths).to(device))


def random_batch(
    lengths: Tensor, *, num_users: int, num_items: int, num_categories: int, seed: int = 0
) -> Batch:
    """A batch of ids, on the CPU, with histories of these lengths, `[B]` integers.

    Items are drawn as popularity in logs goes, the i-th with a probability in proportion to 1 / (i + 1);
    users and labels evenly. Item i is of category i modulo `num_categories`. Between two interactions
    pass seconds to days; half of them were liked.
    """
    generator = torch.Generator().manual_seed(seed)
    batch, total = len(lengths), int(lengths.sum())
    popularity = 1 / torch.arange(1, num_items + 1, dtype=torch.float64)
    draws = torch.rand(batch + total, dtype=torch.float64, generator=generator)
    cumulative = popularity.cumsum(0) / popularity.sum()
    items = torch.searchsorted(cumulative, draws).clamp_max_(num_items - 1)
    history = Jagged(items[batch:], offsets_of(lengths))
    gaps = torch.rand(batch + total, generator=generator).mul(12).exp().to(torch.int64)  # up to 2 days
    timestamp = gaps[batch:].cumsum(0)
    return Batch(
        user=torch.randint(0, num_users, (batch,), generator=generator),
        item=items[:batch],
        category=items[:batch] % num_categories,
        history=history,
        history_category=history.with_values(items[batch:] % num_categories),
        label=torch.randint(0, 2, (batch,), generator=generator).to(torch.float32),
        timestamp=torch.nn.functional.pad(timestamp, (1, 0))[history.offsets[1:]] + gaps[:batch],
        history_timestamp=history.with_values(timestamp),
        history_liked=history.with_values(torch.rand(total, generator=generator) < 0.5),
    )


def _uniform_draws(batch: int, generator: torch.Generator) -> Tensor:
    """`[B]` float64, one draw out of each of B equal slices of (0, 1), in random order: even a small batch
    then has a tail."""
    draws = torch.rand(batch, dtype=torch.float64, generator=generator)
    slices = torch.randperm(batch, generator=generator)
    return ((slices + draws) / batch).clamp(1e-12, 1 - 1e-12)


def _lognormal(uniform: Tensor, max_length: int, mean: float) -> Tensor:
    shape = (_SIGMA * torch.special.ndtri(uniform)).exp()

    def lengths(log_scale: float) -> Tensor:
        return (shape * 2.0**log_scale).round().clamp_max(max_length)

    log_scale = _bisect(lambda x: float(lengths(x).mean()), mean, -64.0, 64.0)
    return lengths(log_scale).to(torch.int64)


def _zipf(uniform: Tensor, max_length: int, mean: float) -> Tensor:
    n = torch.arange(1, max_length + 1, dtype=torch.float64)

    def probability(exponent: float) -> Tensor:
        return torch.softmax(-exponent * n.log(), dim=0)

    exponent = -_bisect(lambda x: float(probability(-x) @ n), mean, -64.0, 0.0)
    cumulative = probability(exponent).cumsum(0)
    return torch.searchsorted(cumulative, uniform).add_(1).clamp_max_(max_length)


def _bisect(function: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Where the non-decreasing `function` reaches `value`."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < value else (low, middle)
    return high
