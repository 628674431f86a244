"""AFM: its formula."""

import pytest
import torch

from recattn.data import random_batch
from recattn.models import AFM
from recattn.reference import pairwise_pool

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}


def test_the_logits_are_the_formula_s() -> None:
    torch.manual_seed(0)
    model = AFM(**SIZES, dim=5, attention_hidden=4).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    batch = random_batch(torch.tensor([4, 0, 9]), **SIZES)
    logits = model(batch)
    for index in range(3):
        begin, end = batch.history.offsets[index : index + 2]
        user, item, category = batch.user[index], batch.item[index], batch.category[index]
        items = batch.history.values[begin:end]
        categories = batch.history_category.values[begin:end]
        embedding, length = model.embedding, max(len(items), 1)
        fields = torch.stack(
            [
                embedding.user.weight[user],
                embedding.item.weight[item],
                embedding.category.weight[category],
                embedding.item.weight[items].sum(0) / length,
                embedding.category.weight[categories].sum(0) / length,
            ]
        )
        layer = model.attention
        pooled = pairwise_pool(
            fields[None], layer.hidden.weight, layer.hidden.bias, layer.projection.weight[0]
        )
        expected = (
            model.bias
            + model.user_weight.weight[user]
            + model.item_weight.weight[item]
            + model.category_weight.weight[category]
            + model.history_item_weight.weight[items].sum(0) / length
            + model.history_category_weight.weight[categories].sum(0) / length
            + pooled[0] @ model.projection
        )
        torch.testing.assert_close(logits[index : index + 1], expected)


def test_it_starts_from_the_weights_of_no_one() -> None:
    """The linear part knows nothing before training, and p is of ones, as in the authors' code."""
    model = AFM(**SIZES, dim=5)
    assert not model.item_weight.weight.any()
    assert bool((model.projection == 1).all())


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="dropout: expected a probability"):
        AFM(**SIZES, dropout=1.0)
    with pytest.raises(ValueError, match="dim, hidden: expected at least 1, got 32 and 0"):
        AFM(**SIZES, attention_hidden=0)
