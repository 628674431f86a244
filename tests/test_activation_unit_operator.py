"""activation_unit as PyTorch's own tools see it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activation_unit_cases import Case, activation_params, call, group, variant
from recattn.kernels import settings
from torch import Tensor

import recattn
from recattn import functional
from recattn.inspect.recording import recorded_launches
from recattn.ops.activation_unit import forward_op


def arguments(case: Case) -> tuple[Any, ...]:
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    params = activation_params(case, tensors)
    if not isinstance(params, list):
        params = []
    return (
        tensors["query"],
        tensors["keys"],
        case.offsets(),
        tensors.get("values"),
        case.data().get("query_offsets"),
        case.data().get("rows"),
        case.options()["seed"],
        group(tensors, "weight"),
        group(tensors, "bias"),
        [param for layer in params for param in (layer if isinstance(layer, tuple) else (layer,))],
        case.unique_rows,
        case.sparse_grad,
        list(case.features),
        case.activation,
        0.1,
        case.dropout,
        case.normalize,
        case.scale,
        case.return_scores,
        "auto",
    )


@pytest.mark.parametrize(
    "case",
    [
        variant(),
        variant(lengths=[]),
        variant(value_dim=7, return_scores=True, normalize="none"),
        variant(activation="prelu", hidden=(6,)),
        variant(activation="dice", dropout=0.3),
    ],
    ids=["plain", "no history", "values and scores", "prelu", "dice and dropout"],
)
def test_schema_fake_and_autograd_agree_with_the_implementation(case: Case) -> None:
    checks = torch.library.opcheck(forward_op, arguments(case))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("activation", ["sigmoid", "prelu", "silu", "gelu", "tanh", "dice"])
@pytest.mark.parametrize("normalize", ["softmax", "none"])
def test_gradients_are_those_of_finite_differences(activation: str, normalize: str, dropout: float) -> None:
    case = variant(
        lengths=[0, 3, 1, 5],
        dim=4,
        value_dim=3,
        hidden=(5, 4),
        slack=0,
        activation=activation,
        dropout=dropout,
        normalize=normalize,
        return_scores=True,
        dtype=torch.float64,
    )
    tensors = case.tensors()
    names = list(tensors)

    def function(*values: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, values, strict=True))
        return functional.activation_unit(
            given["query"],
            given["keys"],
            case.offsets(),
            group(given, "weight"),
            group(given, "bias"),
            values=given["values"],
            activation_params=activation_params(case, given),
            **case.options(),
        )

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_a_second_derivative_raises() -> None:
    case = variant(dtype=torch.float64)
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    weights = [t for name, t in tensors.items() if name.startswith("weight")]
    biases = [t for name, t in tensors.items() if name.startswith("bias")]
    out = functional.activation_unit(tensors["query"], tensors["keys"], case.offsets(), weights, biases)
    (grad,) = torch.autograd.grad(out.sum(), tensors["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="activation_unit: a second derivative"):
        grad.sum().backward()


def test_neither_lengths_nor_batch_sizes_compile_kernels_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    specs: dict[str, set[Any]] = {}
    for batch in range(1, 51):
        lengths = torch.randint(0, 40, (batch,), generator=generator).tolist()
        case = variant(lengths=lengths, return_scores=bool(batch % 2))
        with recorded_launches() as launches, recattn.backend("triton"):
            call(functional.activation_unit, case, case.tensors())
        for kernel, arguments, constants in launches:
            numbers = [
                name for name, x in zip(kernel.arg_names, arguments, strict=False) if isinstance(x, int)
            ]
            assert set(numbers) <= set(kernel.kwargs["do_not_specialize"] or ())
            assert not any(
                isinstance(x, int) for group in arguments if isinstance(group, tuple) for x in group
            )
            specs.setdefault(kernel.fn.__name__, set()).add(tuple(sorted(constants.items())))
    assert {name: len(kinds) for name, kinds in specs.items()} == {
        "_forward_kernel": 2,  # with scores and without
        "tokens_kernel": 2,
        "weights_kernel": 2,
        "_merge_kernel": 2,  # of the output, and of gradients
    }


def test_programs_take_equal_shares_whatever_the_lengths() -> None:
    """One history of 20 000 items among many short ones, by Zipf's law."""
    lengths = torch.clamp(20_000 / torch.arange(1, 4097), min=1).to(torch.int64)
    rows = int(lengths.sum())
    for launch in (settings.FORWARD["narrow half"], settings.BACKWARD_TOKENS["half"]):
        count = settings.programs(launch, rows, torch.device("cpu"))
        share = max(-(-rows // count), launch.least_rows)  # as schedule.rows_per_program
        shares = [min(share, rows - begin) for begin in range(0, rows, share)]
        assert max(shares) / (rows / len(shares)) <= 1.05
