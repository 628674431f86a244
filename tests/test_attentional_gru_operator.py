"""attentional_gru as PyTorch's own tools see it, and what it says to bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from attentional_gru_cases import CELLS, Case, call, variant
from torch import Tensor

import recattn
from recattn import functional
from recattn.inspect.recording import recorded_launches
from recattn.ops.attentional_gru import forward_op


def arguments(case: Case) -> tuple[Any, ...]:
    tensors = {name: t.requires_grad_() for name, t in case.tensors().items()}
    return (
        tensors["inputs"],
        case.offsets(),
        tensors.get("scores"),
        *(tensors[name] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        tensors.get("h0"),
        case.options().get("rows"),
        case.unique_rows,
        case.row_scores,
        False,
        case.kind,
        case.update,
        case.reset_after,
        "auto",
    )


@pytest.mark.parametrize(
    "case",
    [
        variant(),
        variant(lengths=[]),
        variant(kind="gru", initial=False),
        variant(table=20, row_scores=True, slack=0),
        variant(table=20),
        variant(table=90, row_scores=True, unique_rows=True),
    ],
    ids=["plain", "no history", "neither scores nor states", "rows", "rows of inputs", "unique rows"],
)
def test_schema_fake_and_autograd_agree_with_the_implementation(case: Case) -> None:
    checks = torch.library.opcheck(forward_op, arguments(case))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("reset_after", [True, False])
@pytest.mark.parametrize(("kind", "update"), CELLS)
def test_gradients_are_those_of_finite_differences(kind: str, update: str, reset_after: bool) -> None:
    case = variant(
        lengths=[0, 3, 1, 4],
        width=3,
        size=2,
        slack=0,
        kind=kind,
        update=update,
        reset_after=reset_after,
        dtype=torch.float64,
    )
    inputs, offsets, scores, *parameters, h0 = arguments(case)[:8]

    def function(inputs: Tensor, weight: Tensor, *rest: Tensor) -> Any:
        a = rest[-1] if scores is not None else None
        return functional.attentional_gru(inputs, offsets, a, weight, *rest[:3], h0=rest[3], **case.options())

    given = [inputs, *parameters, h0, *([] if scores is None else [scores])]
    assert torch.autograd.gradcheck(function, given)


def test_a_second_derivative_raises() -> None:
    inputs, *rest, h0 = arguments(variant(dtype=torch.float64, slack=0))[:8]
    _, last = functional.attentional_gru(inputs, *rest, h0=h0, kind="augru")
    (grad,) = torch.autograd.grad(last.sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="attentional_gru: a second derivative"):
        grad.sum().backward()


def test_it_compiles_into_one_graph() -> None:
    case = variant(slack=0)
    compiled = torch.compile(functional.attentional_gru, fullgraph=True, backend="aot_eager")
    expected, got = (call(f, case, case.tensors()) for f in (functional.attentional_gru, compiled))
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], msg=name)


def test_neither_lengths_nor_batch_sizes_compile_kernels_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    specs: dict[str, set[Any]] = {}
    for batch in range(1, 40):
        lengths = torch.randint(0, 40, (batch,), generator=generator).tolist()
        with recorded_launches() as launches, recattn.backend("triton"):
            case = variant(lengths=lengths)
            call(functional.attentional_gru, case, case.tensors())
        for kernel, _, constants in launches:
            specs.setdefault(kernel.fn.__name__, set()).add(tuple(sorted(constants.items())))
    assert {name: len(kinds) for name, kinds in specs.items()} == dict.fromkeys(
        ("scan_kernel", "coefficients_kernel", "reverse_kernel", "gradients_kernel", "weights_kernel"), 1
    )


B, T, D, H = 2, 5, 3, 2


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"inputs": [[1.0]]}, TypeError, "inputs: expected a tensor, got list"),
    ({"inputs": x(B, T, D)}, ValueError, "inputs: expected shape [T, I], got [2, 5, 3]"),
    ({"inputs": x(T, 0)}, ValueError, "inputs: expected a width of at least 1, got [5, 0]"),
    ({"inputs": x(T, D).int()}, TypeError, "inputs: expected one of torch.float16"),
    ({"offsets": torch.tensor([0.0, 5.0])}, TypeError, "offsets: expected int32 or int64, got torch.float32"),
    ({"scores": None}, ValueError, "scores: expected a tensor for 'augru', got NoneType"),
    ({"kind": "gru"}, ValueError, "scores: expected None for 'gru', got Tensor"),
    ({"scores": x(T + 1)}, ValueError, "scores: expected shape [5], got [6]"),
    (
        {"scores": x(T).double()},
        TypeError,
        "scores: expected torch.float32, as the inputs, got torch.float64",
    ),
    ({"weight_ih": x(3 * H, D + 1)}, ValueError, "weight_ih: expected shape [6, 3], got [6, 4]"),
    ({"weight_hh": x(3 * H + 1, H)}, ValueError, "weight_hh: expected shape [6, 2], got [7, 2]"),
    ({"weight_hh": x(0, 0)}, ValueError, "weight_hh: expected a width of at least 1, got [0, 0]"),
    ({"bias_ih": x(3)}, ValueError, "bias_ih: expected shape [6], got [3]"),
    ({"bias_hh": None}, TypeError, "bias_hh: expected a tensor, got NoneType"),
    ({"h0": x(B + 1, H)}, ValueError, "h0: expected shape [2, 2], got [3, 2]"),
    (
        {"h0": x(B, H, device="meta")},
        ValueError,
        "h0: expected device cpu, as the inputs, got meta",
    ),
    ({"rows": torch.zeros(T)}, TypeError, "rows: expected int32 or int64, got torch.float32"),
    ({"rows": torch.zeros(T, 1).int()}, ValueError, "rows: expected shape [T], got [5, 1]"),
    ({"rows": torch.arange(T + 1)}, ValueError, "scores: expected shape [6], got [5]"),
    ({"row_scores": True}, ValueError, "row_scores: expected False, since no rows are given"),
    ({"sparse_grad": True}, ValueError, "sparse_grad: expected False, since no rows are given"),
    (
        {"rows": torch.arange(T), "row_scores": True, "kind": "gru", "scores": None},
        ValueError,
        "row_scores: expected False, since no scores are given",
    ),
    ({"kind": "lstm"}, ValueError, "kind: expected one of gru, agru, aigru, augru, got 'lstm'"),
    ({"update": "fast"}, ValueError, "update: expected one of paper, official, got 'fast'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message[:40] for *_, message in BAD])
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "inputs": x(T, D),
        "offsets": torch.tensor([0, 2, 5]),
        "scores": x(T),
        "weight_ih": x(3 * H, D),
        "weight_hh": x(3 * H, H),
        "bias_ih": x(3 * H),
        "bias_hh": x(3 * H),
        "kind": "augru",
    }
    with pytest.raises(error, match=re.escape(message)):
        functional.attentional_gru(**given | changes)


def test_contents_of_offsets_are_checked_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recattn.functional.checks.VALIDATE", True)
    given = [x(T, D), torch.tensor([0, 6]), None, x(3 * H, D), x(3 * H, H), x(3 * H), x(3 * H)]
    with pytest.raises(ValueError, match="offsets: expected the last to be at most 5"):
        functional.attentional_gru(*given)
    given[1] = torch.tensor([0, 4])
    rows = torch.tensor([0, T - 1, 0, 2, T])  # the last of which no history has
    functional.attentional_gru(*given, rows=rows)
    with pytest.raises(ValueError, match="rows: expected 0 to 4, got 0 to 5"):
        functional.attentional_gru(*given, rows=rows.flip(0))
