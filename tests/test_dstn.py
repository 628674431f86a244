"""DSTN: its formula by loops over sets, its variants, what it needs of a batch."""

import copy
from dataclasses import replace

import pytest
import torch
from accelerator import select_rows_with_slack
from torch import Tensor

from recattn.data import Batch, random_batch
from recattn.jagged import Jagged
from recattn.models import DSTN

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}
LENGTHS = torch.tensor([4, 0, 9, 1, 0, 30])
VARIANTS = ["pooling", "self", "interactive"]


def make(lengths: Tensor = LENGTHS, **options: object) -> tuple[DSTN, Batch]:
    torch.manual_seed(0)
    options = {"contextual": 3, "set_size": 4, "attention_hidden": (7,), "hidden": (8, 4), **options}
    model = DSTN(**SIZES, dim=4, **options).double()
    for parameter in model.embedding.parameters():
        torch.nn.init.normal_(parameter)  # at the scale of the weights, for attention that is far from even
    return model, random_batch(lengths, **SIZES)


def gradients(model: DSTN, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(model(batch).square().sum(), list(model.parameters())))


def rows_of_sets(model: DSTN, batch: Batch, index: int) -> list[list[int]]:
    assert batch.history_liked is not None
    begin, end = batch.history.offsets[index : index + 2].tolist()
    liked = batch.history_liked.values.tolist()
    rows = list(range(begin, end))
    return [
        rows[-model.contextual :],
        [row for row in rows if liked[row]][-model.set_size :],
        [row for row in rows if not liked[row]][-model.set_size :],
    ]


def vectors(model: DSTN, item: Tensor, category: Tensor) -> Tensor:
    return torch.cat([model.embedding.item.weight[item], model.embedding.category.weight[category]], -1)


def pooled(model: DSTN, number: int, target: Tensor, x: Tensor) -> Tensor:
    if model.variant == "pooling":
        return x.sum(0)
    first, last = model.pools[number].layers
    if model.variant == "self":
        return torch.softmax(last(torch.relu(first(x))), 0).T[0] @ x
    pairs = torch.cat([target.expand_as(x), x], 1)
    return torch.exp(last(torch.relu(first(pairs)))).T[0] @ x


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_the_formula_s(variant: str) -> None:
    model, batch = make(variant=variant)
    expected = []
    for index in range(batch.size):
        target = vectors(model, batch.item[index], batch.category[index])
        features = [model.embedding.user.weight[batch.user[index]], target]
        for number, rows in enumerate(rows_of_sets(model, batch, index)):
            chosen = torch.tensor(rows, dtype=torch.int64)
            x = vectors(model, batch.history.values[chosen], batch.history_category.values[chosen])
            features.append(pooled(model, number, target, x))
        expected.append(model.head(torch.cat(features)[None])[0])
    torch.testing.assert_close(model(batch), torch.cat(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_equals_its_eager_twin(variant: str) -> None:
    model, batch = make(variant=variant)
    twin = copy.deepcopy(model).use("eager")
    torch.testing.assert_close(model(batch), twin(batch), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(model, batch), gradients(twin, batch), rtol=1e-8, atol=1e-12)


def test_sets_overlap_where_items_belong_to_two() -> None:
    model, batch = make(torch.tensor([5, 0, 2]))
    liked = torch.tensor([True, True, False, True, True, False, False])
    batch = replace(batch, history_liked=batch.history.with_values(liked))
    items = vectors(model, batch.history.values, batch.history_category.values)
    shown, clicked, unclicked = model.sets(batch)
    expected = [([2, 3, 4, 5, 6], [0, 3, 3, 5]), ([0, 1, 3, 4], [0, 4, 4, 4]), ([2, 5, 6], [0, 1, 1, 3])]
    for found, (rows, offsets) in zip((shown, clicked, unclicked), expected, strict=True):
        assert isinstance(found, Jagged)
        assert found.offsets.tolist() == offsets
        torch.testing.assert_close(found.values, items[rows], rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_slack_as_an_accelerator_leaves_it_changes_nothing(
    variant: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make(variant=variant)
    model.use(implementation)
    logits, expected = model(batch), gradients(model, batch)
    monkeypatch.setattr("recattn.models.dstn.select_rows", select_rows_with_slack)
    torch.testing.assert_close(model(batch), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_an_accelerator_nothing_waits_for_the_host(variant: str) -> None:
    model, batch = make(variant=variant)
    logits = model.to("meta")(batch.to("meta"))  # has no contents that could be read
    assert logits.shape == (batch.size,)
    logits.sum().backward()


def test_only_interactive_weights_depend_on_the_target_and_tell_the_size_of_a_set() -> None:
    target, x = torch.randn(2, 1, 8, dtype=torch.float64)
    for variant in ("self", "interactive"):
        model, _ = make(variant=variant)
        pool = model.pools[0]
        one = pool(target, Jagged(x, torch.tensor([0, 1])))
        twice = pool(target, Jagged(x.repeat(2, 1), torch.tensor([0, 2])))
        torch.testing.assert_close(twice, one * (2 if variant == "interactive" else 1))
        keys = Jagged(torch.randn(3, 8, dtype=torch.float64), torch.tensor([0, 3]))
        assert torch.equal(pool(target, keys), pool(target + 1, keys)) == (variant == "self")


def test_interactive_weights_begin_at_the_mean_of_a_full_set_but_for_what_the_items_say() -> None:
    model = DSTN(**SIZES, dim=4, contextual=3, set_size=8, attention_hidden=(7, 5))
    for pool, size in zip(model.pools, (3, 8, 8), strict=True):
        torch.nn.init.zeros_(pool.layers[-1].weight)
        keys = Jagged(torch.randn(size, 8), torch.tensor([0, size]))
        torch.testing.assert_close(pool(torch.randn(1, 8), keys), keys.mean())


def test_a_like_moves_an_item_to_another_set() -> None:
    model, batch = make(torch.tensor([6]))
    assert batch.history_liked is not None
    other = replace(batch, history_liked=batch.history.with_values(~batch.history_liked.values))
    assert not torch.allclose(model(batch), model(other), atol=1e-4)


def test_sums_beyond_float16_are_finite_in_wider_types() -> None:
    pool = make()[0].pools[0].float()
    torch.nn.init.constant_(pool.layers[-1].bias, 12.0)  # exp(12) > 65504
    query, keys = torch.zeros(1, 8), torch.ones(1, 8)
    for dtype in (torch.float32, torch.bfloat16):
        assert pool.to(dtype)(query.to(dtype), Jagged(keys.to(dtype), torch.tensor([0, 1]))).isfinite().all()


def test_dropout_acts_in_training_only() -> None:
    model, batch = make(dropout=0.5)
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    torch.testing.assert_close(model(batch), model(batch), rtol=0, atol=0)


def test_a_batch_that_does_not_tell_likes_is_refused() -> None:
    model, batch = make()
    with pytest.raises(ValueError, match="history_liked: expected which items were liked, got None"):
        model(replace(batch, history_liked=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "I"}, "variant: expected one of pooling, self, interactive, got 'I'"),
        ({"contextual": 0}, "contextual: expected at least 1, got 0"),
        ({"set_size": 0}, "set_size: expected at least 1, got 0"),
        ({"attention_hidden": ()}, "hidden: expected positive widths"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
