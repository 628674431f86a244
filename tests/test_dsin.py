"""DSIN: its formula by loops over sessions, its options, what it needs of a batch."""

from dataclasses import replace

import pytest
import torch
from accelerator import select_rows_with_slack
from torch import Tensor

from recattn.data import Batch, random_batch
from recattn.models import DSIN
from recattn.nn import AttentionalGRU
from recattn.reference import activation_unit

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}
LENGTHS = torch.tensor([12, 0, 9, 1, 0, 30])


def make(lengths: Tensor = LENGTHS, **options: object) -> tuple[DSIN, Batch]:
    torch.manual_seed(0)
    options = {"max_sessions": 3, "max_session_length": 4, "num_heads": 2, "hidden": (8, 4), **options}
    model = DSIN(**SIZES, dim=4, **options).double()
    for parameter in [*model.embedding.parameters(), *model.bias_encoding.parameters()]:
        torch.nn.init.normal_(parameter)  # at the scale of the weights, for attention that is far from even
    return model, random_batch(lengths, **SIZES)


def gradients(model: DSIN, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(model(batch).square().sum(), list(model.parameters())))


def vectors(model: DSIN, item: Tensor, category: Tensor) -> Tensor:
    return torch.cat([model.embedding.item.weight[item], model.embedding.category.weight[category]], -1)


def sessions_of(batch: Batch, index: int, model: DSIN) -> list[Tensor]:
    """Rows of each session that counts."""
    assert batch.history_timestamp is not None
    begin, end = batch.history.offsets[index : index + 2].tolist()
    times = batch.history_timestamp.values.tolist()
    found: list[list[int]] = []
    for row in range(begin, end):
        if row == begin or times[row] - times[row - 1] > model.session_gap:
            found.append([])
        found[-1].append(row)
    kept = found[-len(model.bias_encoding.session) :]
    return [torch.tensor(rows[-len(model.bias_encoding.position) :]) for rows in kept]


def interest_of(model: DSIN, x: Tensor, hide_self: bool) -> Tensor:
    """A session `[L, D]` to its interest `[D]`."""
    block = model.interest
    q, k, v = (
        part.unflatten(1, (2, -1)).transpose(0, 1) for part in block.attention.projection(x).chunk(3, 1)
    )
    scores = q @ k.mT / q.shape[2] ** 0.5
    if hide_self:
        scores = scores - torch.diag(torch.full((len(x),), torch.inf)).nan_to_num(0, posinf=torch.inf)
    attention = torch.softmax(scores, 2).nan_to_num(0)
    x = block.norms[0](x + block.attention.output((attention @ v).transpose(0, 1).flatten(1)))
    return block.norms[1](x + block.feed_forward(x)).mean(0)


def torch_gru(cell: AttentionalGRU, x: Tensor) -> Tensor:
    gru = torch.nn.GRU(cell.input_size, cell.hidden_size).double()
    gru.load_state_dict(cell.state_dict())
    return gru(x)[0]


def logit_of(model: DSIN, batch: Batch, index: int, hide_self: bool, attention: str) -> Tensor:
    target = vectors(model, batch.item[index], batch.category[index])
    encoding, interests = model.bias_encoding, []
    sessions = sessions_of(batch, index, model)
    for number, rows in enumerate(sessions):
        x = vectors(model, batch.history.values[rows], batch.history_category.values[rows])
        ordinal = len(sessions) - 1 - number
        x = x + encoding.session[ordinal] + encoding.position[: len(rows)] + encoding.unit
        interests.append(interest_of(model, x, hide_self))
    pooled = [torch.zeros_like(target)] * 2
    if interests:
        i = torch.stack(interests)
        h = torch.cat([torch_gru(model.gru, i), torch_gru(model.reverse_gru, i.flip(0)).flip(0)], 1)
        pooled = [pool(p, target, x, attention) for p, x in ((model.interest_pool, i), (model.state_pool, h))]
    features = [model.embedding.user.weight[batch.user[index]], target, *pooled]
    return model.head(torch.cat(features)[None])[0]


def pool(layer: torch.nn.Module, target: Tensor, keys: Tensor, attention: str) -> Tensor:
    if attention == "bilinear":
        return torch.softmax(keys @ layer.projection.weight @ target, 0) @ keys
    layers, one = layer.unit.layers, torch.tensor([0, len(keys)])
    weights, biases = [x.weight for x in layers], [x.bias for x in layers]
    return activation_unit(target[None], keys, one, weights, biases)[0]


@pytest.mark.parametrize("hide_self", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("attention", ["bilinear", "mlp"])
def test_the_logits_are_the_formula_s(hide_self: bool, layer_norm: bool, attention: str) -> None:
    network = {"attention_hidden": (6, 5)} if attention == "mlp" else {}
    model, batch = make(hide_self=hide_self, layer_norm=layer_norm, attention=attention, **network)
    counts = [len(sessions_of(batch, index, model)) for index in range(batch.size)]
    assert {0, 1, 3} <= set(counts)  # none, one, and more than are kept
    expected = [logit_of(model, batch, i, hide_self, attention) for i in range(batch.size)]
    torch.testing.assert_close(model(batch), torch.cat(expected))


@pytest.mark.parametrize("implementation", ["fused", "eager"])
def test_slack_as_an_accelerator_leaves_it_changes_nothing(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make()
    model.use(implementation)
    logits, expected = model(batch), gradients(model, batch)
    monkeypatch.setattr("recattn.data.sessions.select_rows", select_rows_with_slack)
    torch.testing.assert_close(model(batch), logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("attention", ["bilinear", "mlp"])
def test_on_an_accelerator_nothing_waits_for_the_host(attention: str) -> None:
    model, batch = make(attention=attention)
    model, batch = model.to("meta"), batch.to("meta")  # has no contents that could be read
    logits = model(batch)
    assert logits.shape == (batch.size,)
    logits.sum().backward()


def test_what_is_before_the_sessions_that_are_kept_does_not_matter() -> None:
    model, batch = make(torch.tensor([30]))
    assert batch.history_timestamp is not None
    rows = torch.cat(sessions_of(batch, 0, model))
    gone = torch.ones(30, dtype=torch.bool).index_fill(0, rows, False)
    assert gone.any()
    items = batch.history.values
    other = replace(batch, history=batch.history.with_values(torch.where(gone, (items + 1) % 20, items)))
    torch.testing.assert_close(model(other), model(batch), rtol=0, atol=0)
    changed = replace(batch, history=batch.history.with_values(torch.where(gone, items, (items + 1) % 20)))
    assert not torch.allclose(model(changed), model(batch), atol=1e-4)


def test_time_alone_decides_what_a_session_is() -> None:
    model, batch = make(torch.tensor([6]), session_gap=100)
    times = torch.arange(6) * 10
    together = replace(batch, history_timestamp=batch.history.with_values(times))
    shifted = replace(batch, history_timestamp=batch.history.with_values(times * 5 + 3))
    apart = replace(batch, history_timestamp=batch.history.with_values(times * 11))
    torch.testing.assert_close(model(together), model(shifted), rtol=0, atol=0)
    assert not torch.allclose(model(together), model(apart), atol=1e-4)


def test_dropout_acts_in_training_only() -> None:
    model, batch = make(dropout=0.5)
    assert not torch.equal(model(batch), model(batch))
    model.eval()
    torch.testing.assert_close(model(batch), model(batch), rtol=0, atol=0)


def test_a_batch_without_timestamps_is_refused() -> None:
    model, batch = make()
    with pytest.raises(
        ValueError, match="history_timestamp: expected timestamps to find sessions by, got None"
    ):
        model(replace(batch, history_timestamp=None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"session_gap": -1}, "session_gap: expected at least 0, got -1"),
        ({"max_sessions": 0}, "max_sessions: expected at least 1, got 0"),
        ({"max_session_length": 0}, "max_session_length: expected at least 1, got 0"),
        ({"num_heads": 3}, "num_heads: expected a positive multiple, got 8 and 3"),
        ({"attention": "cosine"}, "score: expected one of .*, got 'cosine'"),
        ({"attention_hidden": (4,)}, "hidden: expected None for bilinear"),
        ({"dropout": 1.0}, r"dropout: expected a probability in \[0, 1\), got 1\.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
