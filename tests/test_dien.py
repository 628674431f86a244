"""DIEN: its formula and its auxiliary loss by loops, every option against the eager twin, and what it holds."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from watching import NoSync, largest_allocation

from recattn import Jagged
from recattn.data import Batch, random_batch
from recattn.models import DIEN
from recattn.models.dien import draw
from recattn.reference import attentional_gru

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}
LENGTHS = torch.tensor([4, 0, 9, 1, 2])
KINDS = ["gru", "agru", "aigru", "augru"]


def make(lengths: Tensor = LENGTHS, **options: Any) -> tuple[DIEN, Batch]:
    torch.manual_seed(0)
    model = DIEN(**SIZES, dim=3, attention_hidden=(7, 6), hidden=(8, 4), **options).double()
    for parameter in model.embedding.parameters():
        torch.nn.init.normal_(parameter)  # at the scale of the weights, for attention that is far from even
    batch = random_batch(lengths, **SIZES)
    return model, Batch(**{**vars(batch), "label": batch.label.double()})


def parts(batch: Batch, values: Tensor) -> list[Tensor]:
    """Of `[T, ...]` those of each history."""
    return list(values.split(batch.history.lengths.tolist()))


def extracted(model: DIEN, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The target, the history and the states of the extractor."""
    target = model.embedding.items(batch.item, batch.category)
    items = model.embedding.items(batch.history.values, batch.history_category.values)
    states, _ = attentional_gru(
        items,
        batch.history.offsets,
        None,
        *model.extractor.parameters(),
        reset_after=model.extractor.reset_after,
    )
    return target, items, states


def weights_of(model: DIEN, batch: Batch, target: Tensor, states: Tensor) -> Tensor:
    """Softmax over each history of the scores of one state after the other."""
    attention, rows = model.attention, []
    for q, history in zip(target, parts(batch, states), strict=True):
        q = attention.query(q[None])[0]
        scores = []
        for h in history:
            if attention.unit is None:
                scores.append(q @ h)
                continue
            x = torch.cat([q, h, q - h, q * h])
            for layer in attention.unit.layers[:-1]:
                x = torch.sigmoid(layer(x))
            scores.append(attention.unit.layers[-1](x)[0])
        rows += [torch.stack(scores).softmax(0)] if scores else []
    return torch.cat(rows)


@pytest.mark.parametrize("attention", ["bilinear", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"update": "official", "reset_after": False}], ids=["paper", "code"])
def test_the_logits_are_the_formula_s(kind: str, attention: str, options: dict[str, Any]) -> None:
    model, batch = make(kind=kind, attention=attention, **options)
    target, _, states = extracted(model, batch)
    cell = {"kind": kind, "update": model.evolution.update, "reset_after": model.evolution.reset_after}
    parameters = list(model.evolution.parameters())
    scores = None if kind == "gru" else weights_of(model, batch, target, states)
    evolved, final = attentional_gru(states, batch.history.offsets, scores, *parameters, **cell)
    if kind == "gru":
        scores = weights_of(model, batch, target, evolved)
        final = torch.stack([x.sum(0) for x in parts(batch, scores[:, None] * evolved)])
    x = torch.cat([model.embedding.user.weight[batch.user], target, final], 1)
    torch.testing.assert_close(model(batch), model.head(x).squeeze(1))


@pytest.mark.parametrize("implementation", ["fused", "eager"])
@pytest.mark.parametrize("auxiliary", ["dot", "mlp"])
def test_the_auxiliary_loss_is_the_mean_over_the_steps_of_each_history(
    auxiliary: str, implementation: str
) -> None:
    model, batch = make(auxiliary=auxiliary, auxiliary_weight=0.7)
    model.use(implementation)
    _, items, states = extracted(model, batch)
    network = model.auxiliary.network

    def probability(h: Tensor, e: Tensor) -> Tensor:
        return torch.sigmoid(h @ e if network is None else network(torch.cat([h, e]))[0])

    torch.manual_seed(3)
    drawn = draw(batch.history)
    ids, total, steps, bounds = batch.history.values, 0.0, 0, batch.history.offsets.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        for t in range(begin, end - 1):
            total -= probability(states[t], items[t + 1]).log()
            if ids[drawn[t]] != ids[t + 1]:
                total -= (1 - probability(states[t], items[drawn[t]])).log()
            steps += 1
    assert steps == 12
    labels = F.binary_cross_entropy_with_logits(model(batch), batch.label)
    torch.manual_seed(3)
    torch.testing.assert_close(model.loss(batch), labels + 0.7 * total / steps)


def test_draws_are_even_over_the_rows_of_histories_and_never_slack() -> None:
    torch.manual_seed(0)
    history = Jagged(torch.zeros(4005), torch.tensor([0, 2, 2, 5], dtype=torch.int32))
    counts = draw(history).bincount(minlength=6)
    assert counts[5:].tolist() == [0]
    assert counts.sum() == 4005
    assert counts[:5].sub(801).abs().max() < 5 * math.sqrt(801)
    assert draw(Jagged(torch.zeros(2), torch.tensor([0, 0]))).tolist() == [0, 0]


@pytest.mark.parametrize("auxiliary", ["dot", "mlp"])
@pytest.mark.parametrize("attention", ["bilinear", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_equals_its_eager_twin(kind: str, attention: str, auxiliary: str) -> None:
    model, batch = make(kind=kind, attention=attention, auxiliary=auxiliary)
    results = []
    for twin in (model, copy.deepcopy(model).use("eager")):
        torch.manual_seed(1)
        loss = twin.loss(batch)
        results.append([loss, *torch.autograd.grad(loss, list(twin.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-11)


def test_a_history_of_one_item_has_no_step() -> None:
    model, batch = make(torch.tensor([1, 0, 1]))
    torch.testing.assert_close(
        model.loss(batch), F.binary_cross_entropy_with_logits(model(batch), batch.label), rtol=0, atol=0
    )


def test_without_a_weight_nothing_is_drawn() -> None:
    model, batch = make(auxiliary_weight=0.0)
    before = torch.get_rng_state()
    loss = model.loss(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(loss, F.binary_cross_entropy_with_logits(model(batch), batch.label))


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_slack_behind_the_histories_changes_nothing(implementation: str) -> None:
    model, batch = make()
    model.use(implementation)

    def slack(column: Jagged) -> Jagged:
        return Jagged(F.pad(column.values, (0, 3), value=1), column.offsets)

    padded = Batch(
        **{name: slack(x) if isinstance(x, Jagged) else x for name, x in vars(batch).items()},
    )
    torch.testing.assert_close(model(padded), model(batch))
    model.auxiliary_weight = 1.0
    losses = []
    for each in (batch, padded):
        interests, _ = model.extractor(model.embedding(each).history)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("recattn.models.dien.draw", lambda x: torch.arange(len(x.values)) // 2)
            losses.append(model.auxiliary(interests, model.embedding(each).history, each.history.values))
    torch.testing.assert_close(*losses)


def test_order_matters() -> None:
    model, batch = make(torch.tensor([6]))
    flipped = {
        name: x.with_values(x.values.flip(0)) if isinstance(x, Jagged) else x
        for name, x in vars(batch).items()
    }
    assert not torch.allclose(model(batch), model(Batch(**flipped)), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["bilinear", "mlp"])
def test_training_waits_for_no_device(kind: str, attention: str) -> None:
    model, batch = make(kind=kind, attention=attention, auxiliary="mlp")
    with NoSync():
        model.loss(batch).backward()


def test_one_long_history_among_many_short_ones_pads_nothing() -> None:
    lengths = torch.full((64,), 3)
    lengths[5] = 600
    torch.manual_seed(0)
    model = DIEN(**SIZES, dim=8, hidden=(8,))
    batch = random_batch(lengths, **SIZES)
    width, total = 3 * 2 * 8, int(lengths.sum())
    padded = 4 * 64 * 600 * 2 * 8
    compulsory = 4 * total * width
    assert largest_allocation(lambda: model.loss(batch).backward()) <= 2 * compulsory < padded / 5
    model.use("eager")
    assert largest_allocation(lambda: model(batch)) >= padded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "lstm"}, "kind: expected one of"),
        ({"update": "mine"}, "update: expected one of"),
        ({"attention": "dot"}, "attention: expected one of"),
        ({"auxiliary": "bilinear"}, "auxiliary: expected one of"),
        ({"auxiliary_weight": -1.0}, r"auxiliary_weight: expected at least 0, got -1\.0"),
        ({"auxiliary_weight": math.nan}, "auxiliary_weight: expected at least 0, got nan"),
        ({"attention": "mlp", "attention_hidden": (8, 0)}, "hidden: expected positive widths"),
        ({"hidden": (8, 0)}, "hidden: expected positive widths"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DIEN(**SIZES, dim=4, **options)
