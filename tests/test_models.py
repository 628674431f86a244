"""What holds of every ranking model: fused layers against their eager twins, options, training."""

import copy

import pytest
import torch
from torch import Tensor

from recattn.data import Batch, random_batch
from recattn.models import MODELS, RankingModel

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}
MIXED, EMPTY = torch.tensor([4, 0, 9, 1, 0]), torch.zeros(3, dtype=torch.int64)


@pytest.fixture(params=sorted(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, lengths: Tensor = MIXED) -> tuple[RankingModel, Batch]:
    torch.manual_seed(0)
    model = MODELS[name](**SIZES, dim=4).double()
    for parameter in model.embedding.parameters():
        torch.nn.init.normal_(parameter)  # at the scale of the weights, for attention that is far from even
    batch = random_batch(lengths, **SIZES)
    batch = Batch(**{**vars(batch), "label": batch.label.double()})
    return model, batch


def loss_and_gradients(model: RankingModel, batch: Batch) -> tuple[Tensor, list[Tensor | None]]:
    torch.manual_seed(1)
    loss = model.loss(batch)
    return loss, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))


@pytest.mark.parametrize("lengths", [MIXED, EMPTY], ids=["mixed", "all empty"])
def test_fused_equals_its_eager_twin(name: str, lengths: Tensor) -> None:
    model, batch = make(name, lengths)
    twin = copy.deepcopy(model).use("eager")
    assert model(batch).shape == (len(lengths),)
    torch.testing.assert_close(model(batch), twin(batch), rtol=1e-9, atol=1e-11)
    fused, fused_gradients = loss_and_gradients(model, batch)
    eager, eager_gradients = loss_and_gradients(twin, batch)
    torch.testing.assert_close(fused, eager, rtol=1e-9, atol=1e-11)
    for one, two in zip(fused_gradients, eager_gradients, strict=True):
        assert two is not None or one is None or not one.any()
        if two is not None:
            torch.testing.assert_close(
                torch.zeros_like(two) if one is None else one, two, rtol=1e-7, atol=1e-10
            )


def test_every_parameter_takes_part(name: str) -> None:
    model, batch = make(name)
    _, gradients = loss_and_gradients(model, batch)
    named = zip(dict(model.named_parameters()), gradients, strict=True)
    assert [parameter for parameter, gradient in named if gradient is None] == []


def test_no_example_sees_another(name: str) -> None:
    """Nor does it matter how long the others' histories are."""
    model, batch = make(name)
    model.eval()
    together = model(batch)
    for index, length in enumerate(MIXED.tolist()):
        first = int(batch.history.offsets[index])
        rows = slice(first, first + length)
        history = type(batch.history)(batch.history.values[rows], torch.tensor([0, length]))
        alone = Batch(
            **{
                key: column[index : index + 1]
                if isinstance(column, Tensor)
                else history.with_values(column.values[rows])
                for key, column in vars(batch).items()
            }
        )
        torch.testing.assert_close(model(alone)[0], together[index])


def test_it_learns_what_it_is_shown(name: str) -> None:
    model, batch = make(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    torch.manual_seed(2)
    first = model.loss(batch)
    loss = first
    for _ in range(40):
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first.item()


def test_a_state_dict_goes_from_one_to_another(name: str) -> None:
    model, batch = make(name)
    torch.manual_seed(5)
    other = MODELS[name](**SIZES, dim=4).double()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(batch), model.eval()(batch), rtol=0, atol=0)


@pytest.mark.parametrize("option", ["num_users", "num_items", "num_categories", "dim"])
def test_bad_sizes_are_named(name: str, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: expected at least 1, got 0"):
        MODELS[name](**{**SIZES, "dim": 4, option: 0})
