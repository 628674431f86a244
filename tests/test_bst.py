"""BST: its formula against torch's attention sequence by sequence, its times, its options, and what it holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from watching import NoSync, largest_allocation

from recattn import Jagged
from recattn.data import Batch, random_batch
from recattn.models import BST

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}
LENGTHS = torch.tensor([4, 0, 9, 1, 0])


def make(lengths: Tensor = LENGTHS, **options: Any) -> tuple[BST, Batch]:
    torch.manual_seed(0)
    model = BST(**SIZES, dim=6, **{"num_heads": 3, "hidden": (8, 4), **options}).double()
    for parameter in (*model.embedding.parameters(), *model.time.parameters()):
        nn.init.normal_(parameter)
    batch = random_batch(lengths, **SIZES)
    return model, replace(batch, label=batch.label.double())


def by_torch(block: nn.Module, x: Tensor) -> Tensor:
    """A block over one sequence `[L, D]`."""
    layer = block.attention
    attention = nn.MultiheadAttention(layer.dim, layer.num_heads, dtype=x.dtype)
    with torch.no_grad():
        attention.in_proj_weight.copy_(layer.projection.weight)
        attention.in_proj_bias.copy_(layer.projection.bias)
        attention.out_proj.weight.copy_(layer.output.weight)
        attention.out_proj.bias.copy_(layer.output.bias)

    def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * norm.weight + norm.bias

    x = normed(x + attention(x, x, x)[0], block.attention_norm)
    first, _, second = block.feed_forward
    return normed(x + second(F.leaky_relu(first(x), 0.01)), block.feed_forward_norm)


@pytest.mark.parametrize("options", [{}, {"num_blocks": 2, "inner": 5, "num_heads": 12}], ids=["one", "two"])
def test_the_logits_are_the_formula_s(options: dict[str, Any]) -> None:
    model, batch = make(**options)
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    item, category, user = (
        table.weight for table in (model.embedding.item, model.embedding.category, model.embedding.user)
    )
    rows = []
    for b in range(batch.size):
        mine = slice(*batch.history.offsets[b : b + 2].tolist())
        items = torch.cat([batch.history.values[mine], batch.item[b : b + 1]])
        categories = torch.cat([batch.history_category.values[mine], batch.category[b : b + 1]])
        ago = batch.timestamp[b] - torch.cat(
            [batch.history_timestamp.values[mine], batch.timestamp[b : b + 1]]
        )
        x = torch.cat([item[items], category[categories]], 1)
        x = x + model.time.weight[(1 + ago.double()).log2().floor().long()]
        for block in model.blocks:
            x = by_torch(block, x)
        rows.append(torch.cat([user[batch.user[b]], x[-1], x.mean(0)]))
    torch.testing.assert_close(model(batch), model.head(torch.stack(rows)).squeeze(1))


def test_time_differences_are_told_apart_by_their_logarithm() -> None:
    model, _ = make(time_buckets=6)
    seconds = torch.tensor([-9, 0, 1, 2, 3, 6, 7, 30, 31, 62, 63, 1 << 40])
    assert model.bucket(seconds).tolist() == [0, 0, 1, 1, 2, 2, 3, 4, 5, 5, 5, 5]


def test_powers_of_two_are_not_rounded_into_the_bucket_below_or_above() -> None:
    model, _ = make(time_buckets=50)
    powers = 1 << torch.arange(1, 48)
    assert model.bucket(powers - 1).tolist() == list(range(1, 48))
    assert model.bucket(powers - 2).tolist() == list(range(47))


def test_order_is_in_the_times_alone() -> None:
    model, batch = make(torch.tensor([6]))
    flipped = {
        name: x.with_values(x.values.flip(0)) if isinstance(x, Jagged) else x
        for name, x in vars(batch).items()
    }
    torch.testing.assert_close(model(Batch(**flipped)), model(batch))
    times = replace(batch, history_timestamp=flipped["history_timestamp"])
    assert not torch.allclose(model(times), model(batch), atol=1e-4)


@pytest.mark.parametrize("missing", ["timestamp", "history_timestamp"])
def test_a_batch_without_times_is_refused(missing: str) -> None:
    model, batch = make()
    with pytest.raises(ValueError, match=f"^{missing}: expected times, which BST reads, got None"):
        model(replace(batch, **{missing: None}))


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slack_behind_the_histories_changes_nothing(implementation: str, dtype: torch.dtype) -> None:
    model, batch = make()
    model.use(implementation)

    def slack(column: Jagged) -> Jagged:
        return Jagged(F.pad(column.values, (0, 3), value=1), column.offsets.to(dtype))

    padded = {name: slack(x) if isinstance(x, Jagged) else x for name, x in vars(batch).items()}
    torch.testing.assert_close(model(Batch(**padded)), model(batch))


def test_dropout_acts_in_training_only_and_alike_in_both_twins() -> None:
    model, batch = make(dropout=0.4, num_blocks=2)
    assert not torch.equal(model(batch), model(batch))
    losses = []
    for twin in (model, copy.deepcopy(model).use("eager")):
        torch.manual_seed(1)
        losses.append(twin.loss(batch))
    torch.testing.assert_close(*losses)
    model.eval()
    assert torch.equal(model(batch), model(batch))


def test_training_waits_for_no_device() -> None:
    model, batch = make(dropout=0.1)
    with NoSync():
        model.loss(batch).backward()


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_no_tensor_grows_with_the_square_of_a_length() -> None:
    model = BST(**SIZES, dim=8, num_heads=4, hidden=(8,))
    lengths = torch.full((16,), 3)
    lengths[5] = 2000
    batch = random_batch(lengths, **SIZES)
    tokens = 4 * (int(lengths.sum()) + 16) * 3 * 2 * 8  # bytes of queries, keys and values
    tile = 1 << 20  # of scores, of any length
    assert largest_allocation(lambda: model.loss(batch).backward()) <= max(2 * tokens, tile)
    short = random_batch(torch.tensor([3, 3, 300, 3]), **SIZES)
    scores = 4 * 4 * 301**2  # bytes, of one sequence
    assert largest_allocation(lambda: model.loss(short).backward()) <= scores / 4
    model.use("eager")
    assert largest_allocation(lambda: model(short)) >= 4 * scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "dim, num_heads: expected a positive multiple, got 8 and 5"),
        ({"num_blocks": 0}, "num_blocks: expected at least 1, got 0"),
        ({"inner": 0}, "inner: expected at least 1, got 0"),
        ({"time_buckets": 0}, "time_buckets: expected at least 1, got 0"),
        ({"hidden": (8, 0)}, "hidden: expected positive widths"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BST(**SIZES, dim=4, **options)
