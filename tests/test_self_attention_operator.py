"""self_attention as PyTorch's own tools see it, its equality with PyTorch's own attention, and bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from self_attention_cases import Case, call, variant
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import recattn
from recattn import functional
from recattn.inspect.recording import recorded_launches
from recattn.ops.self_attention import forward_op

F64 = torch.float64


@pytest.mark.parametrize(
    "case", [variant(), variant(lengths=[]), variant(buckets=5, value_dim=7)], ids=["plain", "none", "bias"]
)
def test_schema_fake_and_autograd_agree_with_the_implementation(case: Case) -> None:
    tensors = {name: x.requires_grad_() for name, x in case.tensors().items()}
    arguments = (
        tensors["q"],
        tensors["k"],
        tensors["v"],
        case.offsets(),
        tensors.get("bias_table"),
        None,
        None,
    )
    checks = torch.library.opcheck(forward_op, (*arguments, case.heads, 0.3, False, False, 0.0, "auto"))
    assert set(checks.values()) == {"SUCCESS"}


@pytest.mark.parametrize("hide_self", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [{}, {"buckets": 4}, {"buckets": 5, "by_time": True}])
def test_gradients_are_those_of_finite_differences(
    bias: dict[str, int], causal: bool, hide_self: bool
) -> None:
    case = variant(
        lengths=[0, 3, 1, 5, 3],
        dim=3,
        value_dim=2,
        slack=0,
        dtype=F64,
        causal=causal,
        hide_self=hide_self,
        dropout=0.2,
        **bias,
    )
    tensors = case.tensors()

    def function(*values: Tensor) -> Tensor:
        torch.manual_seed(0)
        q, k, v, *table = values
        return functional.self_attention(
            q, k, v, case.offsets(), bias_table=table[0] if table else None, **case.options()
        )

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("causal", [False, True])
def test_it_equals_scaled_dot_product_attention_of_each_sequence(causal: bool) -> None:
    case = variant(dtype=F64, causal=causal, slack=0, value_dim=5)

    def each_alone(
        q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, *, num_heads: int, causal: bool, **_: Any
    ) -> Tensor:
        outs = []
        for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            heads = [x[begin:end].unflatten(1, (num_heads, -1)).transpose(0, 1) for x in (q, k, v)]
            outs.append(scaled_dot_product_attention(*heads, is_causal=causal).transpose(0, 1).flatten(1))
        return torch.cat(outs)

    expected = call(each_alone, case, case.tensors())
    with recattn.backend("torch"):
        got = call(functional.self_attention, case, case.tensors())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-12, msg=name)


def test_it_compiles_without_a_graph_break() -> None:
    case = variant(buckets=5, dropout=0.2)
    tensors = case.tensors()

    def function(q: Tensor, k: Tensor, v: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        return functional.self_attention(q, k, v, offsets, bias_table=table, num_heads=case.heads) * 2

    arguments = (*tensors.values(), case.offsets())
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=0)
    leaves = [x.requires_grad_() for x in tensors.values()]
    got = torch.autograd.grad(compiled(*arguments)[:-3].sum(), leaves)
    expected = torch.autograd.grad(function(*arguments)[:-3].sum(), leaves)
    torch.testing.assert_close(got, expected)


def test_a_second_derivative_raises() -> None:
    q = torch.randn(4, 3, requires_grad=True)
    out = functional.self_attention(q, q, q, torch.tensor([0, 4]))
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="self_attention: a second derivative"):
        grad.sum().backward()


def test_neither_lengths_nor_batch_sizes_compile_kernels_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    specs: dict[str, set[Any]] = {}
    for batch in range(1, 31):
        case = variant(lengths=torch.randint(0, 40, (batch,), generator=generator).tolist(), buckets=5)
        with recorded_launches() as launches, recattn.backend("triton"):
            call(functional.self_attention, case, case.tensors())
        for kernel, _, constants in launches:
            specs.setdefault(kernel.fn.__name__, set()).add(tuple(sorted(constants.items())))
    names = ("_spans_kernel", "_forward_kernel", "_queries_kernel", "_keys_kernel", "_table_kernel")
    assert {name: len(kinds) for name, kinds in specs.items()} == dict.fromkeys(names, 1)


def test_scores_are_never_held() -> None:
    tensors = variant(lengths=[2000], heads=4, dim=8).tensors()
    rows = 2003
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        leaves = [x.requires_grad_() for x in tensors.values()]
        out = functional.self_attention(*leaves, torch.tensor([0, 2000]), num_heads=4)
        out[:2000].sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < rows * rows  # a byte for each score of a head, where one takes four


B, T = 2, 5


def x(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"k": [1.0]}, TypeError, "k: expected a tensor, got list"),
    ({"k": x(T)}, ValueError, "k: expected shape [T, H·d], got [5]"),
    ({"k": torch.ones(T, 4, dtype=torch.int32)}, TypeError, "k: expected one of torch.float16"),
    ({"q": x(T + 1, 4)}, ValueError, "q: expected shape [5, 4], got [6, 4]"),
    ({"q": x(T, 4, dtype=F64)}, TypeError, "q: expected torch.float32, as the keys, got torch.float64"),
    ({"q": x(T, 4, device="meta")}, ValueError, "q: expected device cpu, as the keys, got meta"),
    ({"v": x(T - 1, 4)}, ValueError, "v: expected shape [5, H·dv], got [4, 4]"),
    ({"v": x(T, 3)}, ValueError, "v: expected a width that num_heads = 2 divides, got [5, 3]"),
    ({"num_heads": 3}, ValueError, "k: expected a width that num_heads = 3 divides, got [5, 4]"),
    ({"num_heads": 0}, ValueError, "num_heads: expected an integer of at least 1, got 0"),
    ({"offsets": torch.tensor([0.0, 5.0])}, TypeError, "offsets: expected int32 or int64, got torch.float32"),
    ({"offsets": torch.tensor([[0, 5]])}, ValueError, "offsets: expected [B + 1] with at least one element"),
    ({"dropout": 1.0}, ValueError, "dropout: expected a probability below 1, got 1.0"),
    ({"bias_table": x(4)}, ValueError, "bias_table: expected shape [R, 2], got [4]"),
    ({"bias_table": x(0, 2)}, ValueError, "bias_table: expected at least one row, got [0, 2]"),
    ({"bias_table": x(4, 2, dtype=F64)}, TypeError, "bias_table: expected torch.float32"),
    ({"bias_index": "time"}, ValueError, "bias_index: expected one of position, got 'time'"),
    (
        {"bias_index": torch.arange(T)},
        ValueError,
        'bias_index: expected "position", since no bias_table is given',
    ),
    ({"bias_index": x(T), "bias_table": x(4, 2)}, TypeError, "bias_index: expected int32 or int64"),
    (
        {"bias_index": torch.arange(T + 1), "bias_table": x(4, 2)},
        ValueError,
        "bias_index: expected shape [5], got [6]",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"q": x(T, 4), "k": x(T, 4), "v": x(T, 4), "offsets": torch.tensor([0, 2, 5]), "num_heads": 2}
    with pytest.raises(error, match="^" + re.escape(message)):
        functional.self_attention(**arguments | changes)
