"""pairwise_pool: the kernels in Triton's interpreter and the composite path, against the formula in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pairwise_pool_cases import Case, assert_within_budget, call, eager, exact, variant
from recattn.kernels import pairwise_pool_settings as settings
from torch import Tensor

import recattn
from recattn import functional
from recattn.composite import pairwise_pool as composite
from recattn.inspect.recording import recorded_launches

BACKENDS = ("triton", "torch")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(case: Case, backend: str, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    with recattn.backend(backend):
        return call(functional.pairwise_pool, case, case.tensors() if tensors is None else tensors)


def check(case: Case, backend: str = "triton") -> None:
    assert_within_budget(case, run(case, backend), case.tensors())


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "return_weights": True}], ids=["plain", "rich"])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_composite_path_equals_the_formula(
    dtype: torch.dtype, count: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = variant(count=count, dtype=dtype, **options)
    monkeypatch.setitem(composite.BLOCK_BYTES, "cpu", 5 * 8 * case.dim * max(count * (count - 1) // 2, 1))
    check(case, "torch")


@pytest.mark.parametrize("count", [0, 1, 2, 3, 9])
def test_kernels_equal_the_formula_for_every_number_of_fields(count: int, precision: torch.dtype) -> None:
    check(variant(count=count, dtype=precision))


@pytest.mark.slow
def test_kernels_equal_the_formula_for_many_fields() -> None:
    check(variant(count=24, batch=3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("dim", "hidden"), [(1, 1), (16, 16), (40, 3), (5, 33), pytest.param(64, 64, marks=pytest.mark.slow)]
)
def test_kernels_equal_the_formula_at_every_width(dim: int, hidden: int, precision: torch.dtype) -> None:
    check(variant(count=5, dim=dim, hidden=hidden, dtype=precision))


@pytest.mark.parametrize("options", [{"dropout": 0.3}, {"return_weights": True}], ids=["dropout", "weights"])
def test_kernels_drop_and_return_what_the_formula_does(
    options: dict[str, Any], precision: torch.dtype
) -> None:
    check(variant(dtype=precision, **options))


@pytest.mark.parametrize("batch", [0, 1, 16, 17])
def test_kernels_take_batches_of_any_size(batch: int) -> None:
    check(variant(batch=batch, count=4))


@pytest.mark.parametrize("hidden", [6, 40])
def test_programs_that_share_the_pairs_give_what_one_gives(
    hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = variant(count=11, batch=2, hidden=hidden)
    alone = run(case, "triton")
    monkeypatch.setattr(settings, "shares", lambda *_: 3)
    shared = run(case, "triton")
    for name in alone:
        torch.testing.assert_close(shared[name], alone[name], rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fields_need_not_be_contiguous(backend: str) -> None:
    case = variant(count=4)
    tensors = case.tensors()
    expected = run(case, backend, tensors)
    fields = tensors["fields"]
    views = {
        "slice": torch.cat((fields, fields), 1)[:, :4],
        "wide rows": torch.cat((fields, fields), 2)[:, :, : case.dim],
        "fields first": fields.transpose(0, 1).contiguous().transpose(0, 1),
        "columns first": fields.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": fields[:1].expand_as(fields),
    }
    for name, view in views.items():
        if name == "expanded":
            expected = run(case, backend, tensors | {"fields": view.contiguous()})
        got = run(case, backend, tensors | {"fields": view})
        for key in expected:
            assert torch.equal(got[key], expected[key]), (name, key)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_beyond_the_range_of_exp_are_fine(backend: str) -> None:
    tensors = variant().tensors()
    tensors["projection"] *= 1e4
    assert all(x.isfinite().all() for x in run(variant(), backend, tensors).values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unusual_sample_leaves_the_others_alone(backend: str) -> None:
    case = variant()
    tensors = case.tensors()
    before = run(case, backend, tensors)
    tensors["fields"][3] = torch.nan
    after = run(case, backend, tensors)
    for name in ("out", "grad fields"):
        rest = torch.arange(case.batch) != 3
        assert torch.equal(before[name][rest], after[name][rest])
        assert after[name][3].isnan().any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [3, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_batches_keep_the_budget_without_an_allowance(
    dtype: torch.dtype, count: int, backend: str
) -> None:
    """Over many draws, as on four samples eager code is lucky now and then. What matters is to round the products
    where eager code does, since that decides which units a ReLU closes, and to compare dL/da with a delta of the same
    numbers: of a rounded output it made errors up to five times as large, products rounded elsewhere fourteen. In
    float32 it is a delta of the output at all, and a log-sum-exp, that three fields notice."""
    errors: dict[str, list[list[Tensor]]] = {}
    for seed in range(16):
        case = Case(batch=4, count=count, dim=16, hidden=16, dtype=dtype, seed=seed)
        tensors = case.tensors()
        truth = exact(case, tensors)
        for which, results in enumerate((run(case, backend, tensors), eager(case, tensors))):
            for name, value in results.items():
                error = (value.double() - truth[name]).square().mean()
                errors.setdefault(name, [[], []])[which].append(error)
    for name, (ours, theirs) in errors.items():
        assert torch.stack(ours).mean().sqrt() <= 2 * torch.stack(theirs).mean().sqrt(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "return_weights": True}], ids=["plain", "rich"])
def test_one_pair_gives_the_network_no_gradient_at_all(
    options: dict[str, Any], precision: torch.dtype, backend: str
) -> None:
    got = run(variant(count=2, dtype=precision, **options), backend)
    for name in ("weight", "bias", "projection"):
        assert (got[f"grad {name}"] == 0).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("hidden", [6, 40])
def test_gradients_are_bitwise_repeatable(hidden: int, backend: str) -> None:
    case = variant(batch=40, count=5, hidden=hidden, dropout=0.2)
    first, second = run(case, backend), run(case, backend)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_fields_may_lie_beyond_the_reach_of_32_bits() -> None:
    stride, batch = 1 << 26, 40  # of which only the pages with samples in them are ever touched
    storage = torch.UntypedStorage(2 * stride * batch)
    far = torch.empty(0, dtype=torch.float16).set_(storage, 0, (batch, 3, 16), (stride, 16, 1))
    assert far.stride(0) * (batch - 1) > 2**31
    case = variant(batch=batch, count=3, dim=16, dtype=torch.float16)
    tensors = case.tensors()
    far.copy_(tensors["fields"])
    with recattn.backend("triton"), torch.no_grad():
        got = functional.pairwise_pool(far, *list(tensors.values())[1:])
        expected = functional.pairwise_pool(*tensors.values())
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("hidden", "backward"), [(6, {"_backward_kernel"}), (40, {"_fields_kernel", "_network_kernel"})]
)
def test_batch_sizes_do_not_compile_kernels_anew(hidden: int, backward: set[str]) -> None:
    specs: dict[str, set[Any]] = {}
    for batch in range(1, 100, 14):
        case = variant(batch=batch, hidden=hidden)
        with recorded_launches() as launches, recattn.backend("triton"):
            call(functional.pairwise_pool, case, case.tensors())
        for kernel, _, constants in launches:
            specs.setdefault(kernel.fn.__name__, set()).add(tuple(sorted(constants.items())))
    assert {name: len(found) for name, found in specs.items()} == dict.fromkeys(
        {"_forward_kernel"} | backward, 1
    )


def test_what_no_kernel_takes_is_named() -> None:
    for case, reason in (
        (variant(dtype=torch.float64), "no kernel computes in torch.float64"),
        (replace(variant(), dim=100), "up to 64 wide, not 100"),
        (replace(variant(), batch=1, count=300), "up to 256 fields, not 300"),
    ):
        with recattn.backend("triton"), pytest.raises(NotImplementedError, match=reason):
            functional.pairwise_pool(*case.tensors().values())
