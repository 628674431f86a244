"""target_attention as PyTorch's own tools see it, and against PyTorch's own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from target_attention_cases import Case, call, variant
from torch import Tensor

from recattn import functional
from recattn.ops.target_attention import forward_op

KINDS = {
    "one query": variant(heads=2),
    "no history": variant(lengths=[]),
    "bias": variant(bias="shared", heads=2, normalize="sigmoid"),
    "bias by head": variant(bias="by head", heads=2, value_dim=5, return_lse=True),
    "candidates": variant(candidates=[0, 3, 1, 4], bias="shared", return_lse=True),
    "rows": variant(table=40, heads=2),
    "candidates and rows": variant(table=40, candidates=[0, 3, 1, 4], bias="by head"),
}


def arguments(case: Case) -> tuple[Any, ...]:
    tensors = {name: t.nan_to_num().requires_grad_() for name, t in case.tensors().items()}
    options = case.options()
    return (
        tensors["query"],
        tensors["keys"],
        tensors["values"],
        case.offsets(),
        options.get("query_offsets"),
        options.get("rows"),
        tensors.get("bias"),
        case.heads,
        0.3,
        case.normalize,
        case.return_lse,
        "auto",
    )


@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS)
def test_schema_fake_and_autograd_agree_with_the_implementation(case: Case) -> None:
    checks = torch.library.opcheck(forward_op, arguments(case))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("normalize", ["softmax", "none", "exp", "sigmoid"])
@pytest.mark.parametrize("kind", ["one query", "bias", "bias by head", "candidates and rows"])
def test_gradients_are_those_of_finite_differences(kind: str, normalize: str) -> None:
    changes = {"lengths": [0, 3, 1, 5], "dim": 3, "slack": 0, "dtype": torch.float64, "normalize": normalize}
    case = variant(**vars(KINDS[kind]) | changes | {"return_lse": normalize == "softmax"})
    tensors = case.tensors()

    def function(*values: Tensor) -> Any:
        given = dict(zip(tensors, values, strict=True))
        result = functional.target_attention(
            given["query"],
            given["keys"],
            given["values"],
            case.offsets(),
            bias=given.get("bias"),
            **case.options(),
        )
        return (result[0], result[1].nan_to_num(neginf=0)) if case.return_lse else result

    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors.values()])


def test_a_second_derivative_raises() -> None:
    case = variant(dtype=torch.float64)
    query, keys, values = (t.requires_grad_() for t in case.tensors().values())
    out = functional.target_attention(query, keys, values, case.offsets())
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="target_attention: a second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["bias by head", "candidates", "rows"])
def test_compiles_whole(kind: str) -> None:
    case = KINDS[kind]
    torch.compiler.reset()
    compiled = torch.compile(functional.target_attention, fullgraph=True, backend="aot_eager")
    expected, got = (call(f, case, case.tensors()) for f in (functional.target_attention, compiled))
    for name, result in got.items():
        torch.testing.assert_close(result, expected[name], msg=name)


@pytest.mark.parametrize("candidates", [None, [3, 0, 17, 2]])
@pytest.mark.parametrize("heads", [1, 2])
def test_equals_scaled_dot_product_attention_of_each_history(
    heads: int, candidates: list[int] | None
) -> None:
    case = variant(
        lengths=[4, 9, 31, 70],
        heads=heads,
        candidates=candidates,
        bias="by head",
        dtype=torch.float64,
        slack=0,
    )

    def by_history(query: Tensor, keys: Tensor, values: Tensor, offsets: Tensor, **options: Any) -> Tensor:
        bounds = offsets.tolist()
        groups = list(range(len(bounds))) if candidates is None else options["query_offsets"].tolist()
        outs = []
        for b in range(len(bounds) - 1):
            tokens, targets = slice(bounds[b], bounds[b + 1]), slice(groups[b], groups[b + 1])
            q, k, v, bias = (
                x.unflatten(1, (heads, -1)).transpose(0, 1)
                for x in (query[targets], keys[tokens], values[tokens], options["bias"][tokens])
            )
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.mT)
            outs.append(out.transpose(0, 1).flatten(1))
        return torch.cat(outs)

    expected = call(by_history, case, case.tensors())
    for name, result in call(functional.target_attention, case, case.tensors()).items():
        torch.testing.assert_close(result, expected[name], rtol=1e-10, atol=1e-12, msg=name)
