"""Random calls of every operator, and how far from the formula in float64 a result may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import activation_unit_cases
import activation_unit_statistics_cases
import attentional_gru_cases
import pairwise_pool_cases
import self_attention_cases
import target_attention_cases
import torch
from hypothesis import strategies as st
from torch import Tensor

import recattn
from recattn import functional, reference

# Of the root mean square of a result's error, over one plus that of the result.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 0.1}
ACTIVATIONS = ("sigmoid", "relu", "leaky_relu", "prelu", "silu", "gelu", "tanh", "identity", "dice")
KINKED = ("relu", "leaky_relu", "prelu")
NORMALIZATIONS = ("softmax", "none", "exp", "sigmoid")


def strided(x: Tensor) -> Tensor:
    """Rows apart, with NaN between them."""
    return torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0]


def shifted(x: Tensor) -> Tensor:
    """Between NaN in the same storage, at an address that is no multiple of 16."""
    storage = x.new_full((x.numel() + 2,), torch.nan)
    storage[1:-1] = x.flatten()
    return storage[1:-1].view(x.shape)


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t() if x.dim() == 2 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "strided": strided,
    "shifted": shifted,
    "transposed": transposed,
}


@dataclass(frozen=True)
class Example:
    """One call: with a case module's `call`, of the operator and of its formula."""

    call: Callable[..., dict[str, Tensor]]
    function: Callable[..., Any]
    formula: Callable[..., Any]
    case: Any
    layout: str
    backend: str
    changes: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises unless the result and every gradient are those of the formula."""
        tensors = self.case.tensors()
        exact = self.call(self.formula, self.case, {name: x.double() for name, x in tensors.items()})
        given = {name: LAYOUTS[self.layout](x) for name, x in tensors.items()}
        with recattn.backend(self.backend):
            got = self.call(self.function, self.case, given, **self.changes)
        assert got.keys() == exact.keys()
        for name, result in got.items():
            error = error_of(result.to_dense(), exact[name])
            assert error <= TOLERANCE[self.case.dtype], f"{name}: error {error:.1e} in {self}"


def error_of(result: Tensor, truth: Tensor) -> float:
    """Infinite where the two are not finite in the same places."""
    finite = truth.isfinite()
    if result.shape != truth.shape:
        return float("inf")
    if not torch.equal(result[~finite].double(), truth[~finite]) or not result[finite].isfinite().all():
        return float("inf")
    return rms(result[finite].double() - truth[finite]) / (1 + rms(truth[finite]))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


# ---------------------------------------------------------------- strategies


@st.composite
def lengths(draw: st.DrawFn, small: bool) -> tuple[int, ...]:
    """Of histories: many empty, some short, now and then one that is long."""
    usual = st.one_of(st.just(0), st.just(1), st.integers(2, 9), st.integers(10, 17 if small else 40))
    drawn = draw(st.lists(usual, max_size=4 if small else 8))
    longest = draw(st.sampled_from((0, 0, 0, 35 if small else 130)))
    return tuple(draw(st.permutations([*drawn, longest]))) if longest else tuple(drawn)


def common(draw: st.DrawFn, backend: str) -> dict[str, Any]:
    dtypes = (torch.float64,) if backend == "torch" else (torch.float32, torch.bfloat16)
    return {
        "lengths": draw(lengths(backend == "triton")),
        "dtype": draw(st.sampled_from(dtypes)),
        "slack": draw(st.integers(0, 3)),
        "offsets_dtype": draw(st.sampled_from((torch.int64, torch.int32))),
        "seed": draw(st.integers(0, 2**31)),
    }


def candidates(draw: st.DrawFn, histories: int) -> tuple[int, ...] | None:
    if not draw(st.booleans()):
        return None
    return tuple(draw(st.lists(st.integers(0, 4), min_size=histories, max_size=histories)))


def network(draw: st.DrawFn, backend: str) -> dict[str, Any]:
    options = common(draw, backend)
    features = draw(st.permutations(("q", "k", "q-k", "q*k")))
    total = sum(options["lengths"])
    table = draw(st.one_of(st.none(), st.integers(1, 30)))
    unique = table is not None and draw(st.booleans())
    options |= {
        "dim": draw(st.integers(1, 20)),
        "hidden": tuple(draw(st.lists(st.integers(1, 24), min_size=1, max_size=3))),
        "features": tuple(features[: draw(st.integers(1, 4))]),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "dropout": draw(st.sampled_from((0.0, 0.0, 0.3))),
        "candidates": candidates(draw, len(options["lengths"])),
        "table": table if table is None or not unique else table + total,
        "unique_rows": unique,
    }
    # Rounding must not decide on which side of a kink a unit is: cases redraw keys until it does not.
    redrawn = options["candidates"] is None and table is None and options["features"] != ("q",)
    if options["dtype"] != torch.float64 and options["activation"] in KINKED and not redrawn:
        options["activation"] = "silu"
    return options


class UnitCase(activation_unit_cases.Case):
    """In float64 no unit is that near to a kink."""

    def _keep_off_kinks(self, tensors: dict[str, Tensor], normal: Callable[..., Tensor]) -> None:
        if self.dtype != torch.float64:
            super()._keep_off_kinks(tensors, normal)


@st.composite
def activation_unit(draw: st.DrawFn, backend: str) -> Example:
    options = network(draw, backend)
    case = UnitCase(
        **options,
        value_dim=draw(st.one_of(st.none(), st.integers(1, 12))),
        normalize=draw(st.sampled_from(NORMALIZATIONS)),
        scale=draw(st.sampled_from((1.0, 0.7, -0.5, 0.0))),
        return_scores=options["candidates"] is None and draw(st.booleans()),
        sparse_grad=options["table"] is not None and draw(st.booleans()),
    )
    return Example(
        activation_unit_cases.call,
        functional.activation_unit,
        reference.activation_unit,
        case,
        draw(st.sampled_from(sorted(LAYOUTS))),
        backend,
        {"unique_rows": case.unique_rows, "sparse_grad": case.sparse_grad},
    )


@st.composite
def activation_unit_statistics(draw: st.DrawFn, backend: str) -> Example:
    case = UnitCase(**network(draw, backend))
    layer = draw(st.integers(1, len(case.hidden)))

    def call(function: Any, case: Any, tensors: Any) -> dict[str, Tensor]:
        return activation_unit_statistics_cases.statistics(function, case, tensors, layer)

    return Example(
        call,
        functional.activation_unit_statistics,
        reference.activation_unit_statistics,
        case,
        draw(st.sampled_from(sorted(LAYOUTS))),
        backend,
    )


@st.composite
def target_attention(draw: st.DrawFn, backend: str) -> Example:
    options = common(draw, backend)
    normalize = draw(st.sampled_from(NORMALIZATIONS))
    case = target_attention_cases.Case(
        **options,
        heads=draw(st.integers(1, 4)),
        dim=draw(st.integers(1, 20)),
        value_dim=draw(st.one_of(st.none(), st.integers(1, 12))),
        candidates=candidates(draw, len(options["lengths"])) or None,
        table=draw(st.one_of(st.none(), st.integers(1, 30))),
        bias=draw(st.sampled_from((None, "shared", "by head"))),
        scale=draw(st.sampled_from((None, 1.0, 0.3, -0.5, 0.0))) if normalize != "exp" else None,
        normalize=normalize,
        return_lse=normalize == "softmax" and draw(st.booleans()),
    )
    return Example(
        target_attention_cases.call,
        functional.target_attention,
        reference.target_attention,
        case,
        draw(st.sampled_from(sorted(LAYOUTS))),
        backend,
    )


@st.composite
def self_attention(draw: st.DrawFn, backend: str) -> Example:
    buckets = draw(st.one_of(st.none(), st.integers(1, 12)))
    case = self_attention_cases.Case(
        **common(draw, backend),
        heads=draw(st.integers(1, 4)),
        dim=draw(st.integers(1, 20)),
        value_dim=draw(st.one_of(st.none(), st.integers(1, 12))),
        scale=draw(st.sampled_from((None, 1.0, 0.3, -0.5, 0.0))),
        causal=draw(st.booleans()),
        hide_self=draw(st.booleans()),
        buckets=buckets,
        by_time=buckets is not None and draw(st.booleans()),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.3))),
    )
    return Example(
        self_attention_cases.call,
        functional.self_attention,
        reference.self_attention,
        case,
        draw(st.sampled_from(sorted(LAYOUTS))),
        backend,
    )


@st.composite
def attentional_gru(draw: st.DrawFn, backend: str) -> Example:
    kind, update = draw(st.sampled_from(attentional_gru_cases.CELLS))
    options, unique = common(draw, backend), draw(st.booleans())
    table = draw(st.one_of(st.none(), st.integers(1, 30)))
    if table is not None and unique:
        table += sum(options["lengths"])
    case = attentional_gru_cases.Case(
        **options,
        table=table,
        unique_rows=unique and table is not None,
        row_scores=table is not None and kind != "gru" and draw(st.booleans()),
        rows_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        width=draw(st.integers(1, 20)),
        size=draw(st.integers(1, 20)),
        kind=kind,
        update=update,
        reset_after=draw(st.booleans()),
        initial=draw(st.booleans()),
    )
    return Example(
        attentional_gru_cases.call,
        functional.attentional_gru,
        reference.attentional_gru,
        case,
        draw(st.sampled_from(sorted(LAYOUTS))),
        backend,
        {"sparse_grad": table is not None and draw(st.booleans())},
    )


@st.composite
def pairwise_pool(draw: st.DrawFn, backend: str) -> Example:
    case = pairwise_pool_cases.Case(
        batch=draw(st.integers(0, 20)),
        count=draw(st.integers(0, 12)),
        dim=draw(st.integers(1, 20)),
        hidden=draw(st.integers(1, 20)),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.3))),
        return_weights=draw(st.booleans()),
        # In bfloat16 rounding decides which units its ReLU opens.
        dtype=torch.float64 if backend == "torch" else torch.float32,
        seed=draw(st.integers(0, 2**31)),
    )
    return Example(
        pairwise_pool_cases.call,
        functional.pairwise_pool,
        reference.pairwise_pool,
        case,
        draw(st.sampled_from(sorted(LAYOUTS))),
        backend,
    )


OPERATORS = {
    strategy.__name__: strategy
    for strategy in (
        activation_unit,
        activation_unit_statistics,
        target_attention,
        self_attention,
        attentional_gru,
        pairwise_pool,
    )
}
