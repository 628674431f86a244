"""DIN: its formula, and fused layers against their eager twins."""

import copy

import pytest
import torch
from torch import Tensor

from recattn.data import Batch, random_batch
from recattn.models import DIN
from recattn.reference import activation_unit

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}
LENGTHS = torch.tensor([4, 0, 9, 1, 0])


def make(lengths: Tensor = LENGTHS, **options: object) -> tuple[DIN, Batch]:
    torch.manual_seed(0)
    model = DIN(**SIZES, dim=5, attention_hidden=(7, 6), hidden=(8, 4), **options).double()
    for parameter in model.embedding.parameters():
        torch.nn.init.normal_(parameter)  # at the scale of the weights, for attention that is far from even
    batch = random_batch(lengths, **SIZES)
    return model, batch


def logits_and_gradients(model: DIN, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    logits = model(batch)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, batch.label.to(logits.dtype))
    return logits, list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("normalize", ["softmax", "none"])
@pytest.mark.parametrize("activation", ["sigmoid", "relu", "prelu"])
@pytest.mark.parametrize("lengths", [LENGTHS, torch.zeros(3, dtype=torch.int64)], ids=["mixed", "all empty"])
def test_fused_equals_its_eager_twin(normalize: str, activation: str, lengths: Tensor) -> None:
    model, batch = make(lengths, normalize=normalize, activation=activation)
    twin = copy.deepcopy(model).use("eager")
    fused, fused_gradients = logits_and_gradients(model, batch)
    eager, eager_gradients = logits_and_gradients(twin, batch)
    assert fused.shape == (len(lengths),)
    torch.testing.assert_close(fused, eager, rtol=1e-10, atol=1e-12)
    for one, two in zip(fused_gradients, eager_gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


def test_the_logits_are_the_formula_s() -> None:
    model, batch = make()
    item, category = model.embedding.item.weight, model.embedding.category.weight
    target = torch.cat([item[batch.item], category[batch.category]], 1)
    keys = torch.cat([item[batch.history.values], category[batch.history_category.values]], 1)
    layers = model.attention.layers
    pooled = activation_unit(
        target,
        keys,
        batch.history.offsets,
        [layer.weight for layer in layers],
        [layer.bias for layer in layers],
    )
    assert isinstance(pooled, Tensor)
    x = torch.cat([model.embedding.user.weight[batch.user], target, pooled], 1)
    torch.testing.assert_close(model(batch), model.head(x).squeeze(1))


def test_the_history_matters_and_its_order_does_not() -> None:
    model, batch = make(torch.tensor([6]))
    reversed_batch = Batch(
        batch.user,
        batch.item,
        batch.category,
        batch.history.with_values(batch.history.values.flip(0)),
        batch.history_category.with_values(batch.history_category.values.flip(0)),
        batch.label,
    )
    torch.testing.assert_close(model(batch), model(reversed_batch))
    other = batch.history.with_values((batch.history.values + 1) % SIZES["num_items"])
    changed = Batch(batch.user, batch.item, batch.category, other, batch.history_category, batch.label)
    assert not torch.allclose(model(batch), model(changed), atol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    model, batch = make(dropout=0.5)
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    assert torch.equal(model(batch), model(batch))


def test_use_switches_the_attention_and_keeps_the_parameters() -> None:
    model, _ = make()
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.use("eager")
    assert model.attention.implementation == "eager"
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"num_users": 0}, "num_users: expected at least 1, got 0"),
        ({"hidden": (8, 0)}, "hidden: expected positive widths"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"activation": "step"}, "activation: expected one of"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIN(**{**SIZES, **options})


def test_a_batch_of_disagreeing_shapes_is_refused() -> None:
    _, batch = make()
    with pytest.raises(ValueError, match=r"user: expected \[5\], got \[4\]"):
        Batch(batch.user[:4], batch.item, batch.category, batch.history, batch.history_category, batch.label)
    empty = random_batch(torch.zeros(5, dtype=torch.int64), **SIZES).history
    with pytest.raises(ValueError, match="history_category: expected values"):
        Batch(batch.user, batch.item, batch.category, batch.history, empty, batch.label)
