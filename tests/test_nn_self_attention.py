"""nn.SelfAttention: layouts, the eager twin, parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import recattn
from recattn.jagged import Jagged, offsets_of
from recattn.nn import SelfAttention

LENGTHS = torch.tensor([3, 0, 7, 1])
D = 6


def layer(**options: Any) -> SelfAttention:
    torch.manual_seed(0)
    made = SelfAttention(D, 2, dtype=torch.float64, **options)
    if made.bias_table is not None:
        nn.init.normal_(made.bias_table)
    return made


def jagged(slack: int = 2) -> Jagged:
    values = torch.randn(int(LENGTHS.sum()) + slack, D, dtype=torch.float64)
    return Jagged(values, offsets_of(LENGTHS))


def gradients(made: SelfAttention, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), list(made.parameters()), allow_unused=True))


@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"hide_self": True, "buckets": 4}, {"buckets": 3, "bias": False}]
)
@pytest.mark.parametrize("by_time", [False, True])
def test_the_eager_twin_computes_the_same(options: dict[str, Any], by_time: bool) -> None:
    made, x = layer(**options), jagged()
    extra: dict[str, Any] = {}
    if by_time and made.bias_table is not None:
        extra["bias_index"] = torch.arange(len(x.values)) // 2
    fused = made(x, **extra).values[:-2]
    expected = gradients(made, fused)
    made.use("eager")
    eager = made(x, **extra).values[:-2]
    torch.testing.assert_close(eager, fused)
    torch.testing.assert_close(gradients(made, eager), expected)


@pytest.mark.parametrize("left", [False, True])
def test_padded_batches_give_what_jagged_ones_do(left: bool) -> None:
    made, x = layer(buckets=4), jagged(slack=0)
    index = torch.arange(len(x.values)) * 3
    mask = torch.arange(8) < LENGTHS[:, None]
    padded, padded_index = x.to_padded(8, torch.nan), x.with_values(index).to_padded(8)
    if left:
        mask, padded, padded_index = mask.flip(1), padded.flip(1), padded_index.flip(1)
        x = Jagged(padded[mask], x.offsets)
        index = padded_index[mask]
    expected = made(x, bias_index=index)
    got = made(padded, mask=mask, bias_index=padded_index)
    torch.testing.assert_close(got[mask], expected.values)
    assert (got[~mask] == 0).all()
    if not left:
        torch.testing.assert_close(made(padded, lengths=LENGTHS, bias_index=padded_index), got)


def test_it_equals_multihead_attention() -> None:
    made, x = layer(), jagged(slack=0)
    peer = nn.MultiheadAttention(D, 2, batch_first=True, dtype=torch.float64)
    peer.in_proj_weight.data.copy_(made.projection.weight.data)
    peer.in_proj_bias.data.copy_(made.projection.bias.data)
    peer.out_proj.load_state_dict(made.output.state_dict())
    padded, mask = x.to_padded(), torch.arange(7) < LENGTHS[:, None]
    expected, _ = peer(padded, padded, padded, key_padding_mask=~mask)
    torch.testing.assert_close(made(x).values, expected[mask])


def test_dropout_is_for_training_only() -> None:
    made, x = layer(dropout=0.5), jagged(slack=0)
    torch.manual_seed(1)
    first, second = made(x).values, made(x).values
    assert not torch.equal(first, second)
    made.eval()
    assert torch.equal(made(x).values, made(x).values)


def test_it_compiles_without_a_graph_break() -> None:
    made, x = layer(buckets=3), jagged(slack=0)
    compiled = torch.compile(
        lambda values: made(Jagged(values, x.offsets)).values, fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x.values), made(x).values)


def test_a_batch_of_nothing() -> None:
    made = layer()
    assert made(
        torch.zeros(0, 4, D, dtype=torch.float64), lengths=torch.zeros(0, dtype=torch.int64)
    ).shape == (0, 4, D)
    with recattn.backend("torch"):
        out = made(torch.zeros(2, 4, D, dtype=torch.float64), lengths=torch.tensor([0, 0]))
    assert (out == 0).all()


def test_bad_input_is_named() -> None:
    made = layer()
    with pytest.raises(ValueError, match="dim, num_heads: expected a positive multiple, got 5 and 2"):
        SelfAttention(5, 2)
    with pytest.raises(ValueError, match=r"x: expected \[T, 6\], got \[3, 4\]"):
        made(Jagged(torch.zeros(3, 4), torch.tensor([0, 3])))
    with pytest.raises(ValueError, match="lengths, mask: expected None, since x is not padded"):
        made(jagged(), lengths=LENGTHS)
    with pytest.raises(ValueError, match="lengths, mask: expected exactly one of the two"):
        made(torch.zeros(2, 3, D))


def test_slack_rows_never_reach_the_projections() -> None:
    made, x = layer(buckets=4), jagged()
    expected = gradients(made, made(x).values[:-2])
    x.values[-2:] = torch.nan
    torch.testing.assert_close(gradients(made, made(x).values[:-2]), expected, rtol=0, atol=0)
    padding = torch.full((2, 3, D), torch.nan, dtype=torch.float64)
    nothing = made(padding, lengths=torch.tensor([0, 0]))
    assert all(g is None or not g.any() for g in gradients(made, nothing))
