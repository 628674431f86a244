"""What no operator may hold, as its size grows with what padding would add or with pairs of positions.

Bounds are by what has to be there: the arguments, the outputs and their gradients.
"""

from __future__ import annotations

import pytest
import torch
from largest_tensor import LargestTensor
from torch import Tensor

from recattn import functional
from recattn.composite import self_attention as composite
from recattn.jagged import Jagged
from recattn.nn import AttentionalGRU

# Mostly short, so that padding to the longest is 20 times as much.
LENGTHS = torch.tensor([1000, *[40] * 50])
OFFSETS = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
TOTAL = int(OFFSETS[-1])


def largest(run: object, *arguments: object) -> int:
    """Elements of the largest tensor that a call and its backward make."""
    seen = LargestTensor()
    with seen.watching():
        result = run(*arguments)  # type: ignore[operator]
        result.sum().backward()
    return seen.elements


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("kind", ["gru", "augru"])
@pytest.mark.parametrize("reset_after", [True, False])
def test_attentional_gru_holds_no_padded_projection(kind: str, reset_after: bool) -> None:
    width, size = 12, 16
    layer = AttentionalGRU(width, size, kind=kind, reset_after=reset_after)
    items, scores = leaf(TOTAL, width), None if kind == "gru" else Jagged(leaf(TOTAL), OFFSETS)

    def run() -> Tensor:
        states, last = layer(Jagged(items, OFFSETS), scores)
        return states.values.sum() + last.sum()

    # All states; the projections of all items, 3H wide, are not there at once where they do not fit in a block.
    padded = len(LENGTHS) * int(LENGTHS.max()) * 3 * size
    compulsory = TOTAL * max(width, 4 * size)
    assert largest(run) <= compulsory < padded / 10


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"bias": 9}, {"dropout": 0.2}], ids=str)
def test_self_attention_holds_no_matrix_of_pairs(options: dict) -> None:
    heads, dim = 4, 8
    q, k, v = (leaf(TOTAL, heads * dim) for _ in range(3))
    table = leaf(options.pop("bias"), heads) if "bias" in options else None

    def run() -> Tensor:
        return functional.self_attention(q, k, v, OFFSETS, num_heads=heads, bias_table=table, **options)

    pairs = heads * int(LENGTHS.max()) ** 2  # of one sequence; of a padded batch 51 times as many
    room = composite.BLOCK_BYTES["cpu"] // 4
    assert largest(run) <= max(3 * TOTAL * heads * dim, room) < pairs / 10


def test_what_an_operator_makes_inside_is_seen() -> None:
    items = leaf(TOTAL, 2)
    layer = AttentionalGRU(2, 2, kind="gru")
    assert (
        largest(lambda: layer(Jagged(items, OFFSETS))[1]) > TOTAL * 4
    )  # the projections, which are of a block


def test_activation_unit_holds_no_hidden_units_of_all_positions() -> None:
    dim, hidden, length = 8, (80, 40), 20_000
    offsets = torch.tensor([0, length])
    query, keys = leaf(1, dim), leaf(length, dim)
    sizes = [4 * dim, *hidden, 1]
    weights = [leaf(m, n) for n, m in zip(sizes, sizes[1:], strict=False)]
    biases = [leaf(m) for m in sizes[1:]]

    def run() -> Tensor:
        return functional.activation_unit(query, keys, offsets, weights, biases)

    assert largest(run) <= 1 << 18 < length * hidden[0] // 4


def test_target_attention_holds_no_copy_of_a_history_per_candidate() -> None:
    dim, length, candidates = 16, 400, 300
    offsets, query_offsets = torch.tensor([0, length]), torch.tensor([0, candidates])
    query, keys, values = leaf(candidates, dim), leaf(length, dim), leaf(length, dim)

    def run() -> Tensor:
        return functional.target_attention(query, keys, values, offsets, query_offsets=query_offsets)

    assert largest(run) <= candidates * length < candidates * length * dim / 10
