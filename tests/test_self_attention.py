"""self_attention: the kernels in Triton's interpreter and the composite path, against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from self_attention_cases import SEQUENCES, Case, assert_within_budget, call, variant
from torch import Tensor

import recattn
from recattn import functional, reference
from recattn.jagged import offsets_of

KINDS = {
    "full": {},
    "causal": {"causal": True},
    "hide_self": {"hide_self": True},
    "causal, hide_self": {"causal": True, "hide_self": True},
}
BIASES = {
    "by place": {"buckets": 9},
    "by place, one bucket": {"buckets": 1},
    "by place, never clamped": {"buckets": 300},
    "by time": {"buckets": 12, "by_time": True},
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(case: Case, backend: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    with recattn.backend(backend):
        return call(functional.self_attention, case, case.tensors() if tensors is None else tensors)


def check(case: Case, backend: str = "triton") -> None:
    assert_within_budget(case, run(case, backend), case.tensors())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES)
def test_kernels_equal_the_formula_over_every_kind_of_sequence(
    lengths: list[int], kind: dict[str, bool], precision: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=precision, **kind))


@pytest.mark.parametrize("value_dim", [None, 24])
@pytest.mark.parametrize(("heads", "dim"), [(8, 1), (3, 5), (1, 18), (2, 36), (1, 80), (1, 128)])
def test_kernels_equal_the_formula_at_every_width(
    heads: int, dim: int, value_dim: int | None, precision: torch.dtype
) -> None:
    check(variant(heads=heads, dim=dim, value_dim=value_dim, dtype=precision, lengths=[0, 40, 3]))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_kernels_equal_the_formula_with_bias_and_dropout(bias: dict[str, int], kind: dict[str, bool]) -> None:
    check(variant(dropout=0.4, lengths=[3, 0, 40, 9], **bias, **kind))


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_kernels_equal_the_formula_with_bias(bias: dict[str, int], precision: torch.dtype) -> None:
    check(variant(lengths=[3, 0, 40, 9], dtype=precision, **bias))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_composite_path_equals_the_formula(
    lengths: list[int], kind: dict[str, bool], dtype: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=dtype, **kind), "torch")
    check(variant(lengths=lengths, dtype=dtype, buckets=9, dropout=0.3, **kind), "torch")


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_the_composite_path_equals_the_formula_for_every_bias(bias: dict[str, int]) -> None:
    check(variant(dropout=0.3, **bias), "torch")


def test_the_composite_path_cuts_what_does_not_fit_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from recattn.composite import self_attention as composite

    monkeypatch.setitem(composite.BLOCK_BYTES, "cpu", 1 << 12)
    check(variant(causal=True, buckets=9, by_time=True, dropout=0.3), "torch")


SHORT = [5, 0, 20, 19, 3, 3, 2, 1, 11, 7, 16, 2] * 10


@pytest.mark.parametrize("lengths", [SHORT, [24] * 9], ids=["of many lengths", "of one"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_padding_short_sequences_changes_nothing(
    lengths: list[int], kind: dict[str, bool], dtype: torch.dtype
) -> None:
    check(variant(lengths=lengths, dtype=dtype, **kind), "torch")
    if lengths is SHORT and dtype == torch.float32:
        check(variant(lengths=lengths[:24], buckets=9, by_time=True, dropout=0.3, **kind), "torch")


def test_a_large_bias_does_not_overflow_in_the_padding() -> None:
    case = variant(lengths=SHORT, buckets=9)
    tensors = case.tensors()
    tensors["bias_table"] = tensors["bias_table"] + 300
    for name, result in run(case, "torch", tensors).items():
        assert torch.isfinite(result).all(), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "changes", [{"scale": 3.0}, {"scale": -0.5}, {"scale": 0.0}, {"scale": -2.0, "buckets": 4}]
)
def test_scale_may_be_any_number(changes: dict[str, float], backend: str) -> None:
    check(variant(lengths=[0, 40, 3], **changes), backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_offsets_may_be_int32(backend: str) -> None:
    check(variant(offsets_dtype=torch.int32), backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_large_scores_do_not_overflow(backend: str) -> None:
    check(variant(scale=300.0, lengths=[0, 40, 1, 64]), backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_an_item_that_sees_none_gets_zero(backend: str) -> None:
    case = variant(lengths=[1, 0, 1, 4], causal=True, hide_self=True)
    results = run(case, backend)
    alone = torch.tensor([0, 1, 2])
    assert (results["out"][alone] == 0).all()
    for name in ("grad q", "grad k", "grad v"):
        assert (results[name][:2] == 0).all(), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_slack_rows_are_neither_read_nor_given_a_gradient(backend: str) -> None:
    case = variant(slack=70, causal=True)
    results = run(case, backend)
    for name, result in results.items():
        assert (result[-case.slack :] == 0).all(), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_rows_may_lie_apart(backend: str) -> None:
    case = variant(buckets=7, lengths=[3, 40, 0, 20])
    tensors = case.tensors()
    strided = {
        name: torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, 0]
        for name, tensor in tensors.items()
    }
    transposed = {name: t.t().contiguous().t() for name, t in tensors.items()}
    expected = run(case, backend)
    for layout in (strided, transposed):
        for name, result in run(case, backend, layout).items():
            torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-5, msg=name)


def test_rows_may_lie_beyond_the_reach_of_32_bits() -> None:
    stride, rows = 1 << 24, 150  # of which only the pages with rows in them are ever touched
    storage = torch.UntypedStorage(2 * stride * rows)
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (rows, 32), (stride, 1))
    assert far.stride(0) * (rows - 1) > 2**31
    case = variant(lengths=[50, 0, 100], dtype=torch.float16, slack=0)
    tensors = case.tensors()
    far.copy_(tensors["k"])
    expected = run(case, "triton")
    for name, result in run(case, "triton", tensors | {"k": far}).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("by_time", [False, True])
def test_gradients_are_bitwise_repeatable(backend: str, by_time: bool) -> None:
    case = variant(lengths=[3, 60, 0, 20], buckets=8, by_time=by_time, dropout=0.2)
    first, second = run(case, backend), run(case, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_dropout_follows_the_seed_and_keeps_its_share() -> None:
    case = variant(lengths=[300], heads=1, dim=4, dropout=0.3)
    assert torch.equal(run(case, "torch")["out"], run(case, "torch")["out"])
    tensors = case.tensors() | {"q": torch.zeros(303, 4), "v": torch.ones(303, 4)}
    shares = [
        run(variant(**vars(case) | {"seed": seed}), "torch", tensors)["out"][:300, 0] for seed in range(4)
    ]
    assert not torch.equal(shares[0], shares[1])
    for share in shares:  # of 300 kept ones per row, over 0.7
        assert abs(float(share.mean()) - 1) < 0.01
        assert 0.02 < float(share.std()) < 0.06  # sqrt(0.3 / (0.7 · 300)) = 0.038


def test_a_backend_asked_for_by_name_never_falls_back() -> None:
    with pytest.raises(NotImplementedError, match=r'backend "triton".*float64'):
        run(variant(dtype=torch.float64), "triton")
    with pytest.raises(NotImplementedError, match=r'backend "triton".*up to 128 wide, not 200'):
        run(variant(dim=200, lengths=[3]), "triton")


def test_autocast_casts_and_gradients_keep_the_dtype_of_their_tensor() -> None:
    case = variant(buckets=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(case, "torch")
    assert results["out"].dtype == torch.bfloat16
    for name, result in results.items():
        if name.startswith("grad"):
            assert result.dtype == torch.float32


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_elements_of_a_row_may_lie_apart(causal: bool, backend: str) -> None:
    case = variant(lengths=[2, 0, 9], causal=causal)
    tensors = {name: x.t().contiguous().t() for name, x in case.tensors().items()}
    expected = run(case, backend)
    for name, result in run(case, backend, tensors).items():
        torch.testing.assert_close(result, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("scale", [-0.5, 0.0])
@pytest.mark.parametrize("causal", [False, True])
def test_the_scale_may_be_anything(causal: bool, scale: float, backend: str) -> None:
    check(variant(lengths=[2, 0, 9], causal=causal, scale=scale), backend)


@pytest.mark.parametrize("index", ["position", "time"])
def test_the_gradient_of_a_table_keeps_its_digits_over_many_sequences(index: str) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 30, (360,), generator=generator)
    total, offsets = int(lengths.sum()), offsets_of(lengths)
    *tensors, upstream = (torch.randn(total, 32, generator=generator) for _ in range(4))
    table = torch.randn(16, 2, generator=generator)
    stamps = torch.sort(torch.randint(0, 1000, (total,), generator=generator)).values

    def gradient(attention: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        bias_table = table.to(dtype).requires_grad_()
        out = attention(
            *(x.to(dtype) for x in tensors),
            offsets,
            num_heads=2,
            causal=True,
            bias_table=bias_table,
            bias_index="position" if index == "position" else stamps,
        )
        (grad,) = torch.autograd.grad(out, bias_table, upstream.to(dtype))
        return grad.double()

    exact = gradient(reference.self_attention, torch.float64)
    eager, fused = (
        (gradient(attention, torch.float32) - exact).norm()
        for attention in (reference.self_attention, functional.self_attention)
    )
    assert fused <= 2 * eager
