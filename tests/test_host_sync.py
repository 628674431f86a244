"""No operator or layer waits for a GPU, so that CUDA graphs may capture them, and each launches on its tensors' GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import activation_unit_cases
import activation_unit_statistics_cases
import attentional_gru_cases
import pairwise_pool_cases
import pytest
import self_attention_cases
import target_attention_cases
import torch
from on_gpu import HostSync, OnGPU, on_meta
from torch import Tensor
from torch._subclasses import FakeTensorMode

import recattn
from recattn import Jagged, functional, nn
from recattn.inspect.recording import recorded_launches
from recattn.jagged import offsets_of
from recattn.ops.library import implementation

LENGTHS = (3, 0, 40, 1)
SCALAR = "(item|_local_scalar_dense) waits for the device"
BF16 = torch.bfloat16


def forward_and_backward(call: Callable[[], Any]) -> int:
    """On a GPU whose tensors have no contents; how many kernels are launched."""
    with recorded_launches() as launches, OnGPU():
        outputs = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(
            [x for x in outputs if x.requires_grad], [torch.empty_like(x) for x in outputs if x.requires_grad]
        )
    return len(launches)


def case_on_gpu(cases: Any, function: Callable[..., Any], case: Any, **extra: Any) -> Callable[[], Any]:
    """The call of a case, its tensors moved."""
    calls: list[Any] = []

    def moved(*args: Any, **kwargs: Any) -> Any:
        def leaf(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return [leaf(y) for y in x]
            if not isinstance(x, Tensor):
                return x
            return on_meta(x.detach()).requires_grad_(x.requires_grad)

        if function is functional.self_attention:
            kwargs.pop("seed", None)  # which it draws itself
        calls.append(([leaf(x) for x in args], {name: leaf(x) for name, x in kwargs.items()}))
        raise Captured

    with pytest.raises(Captured):
        cases(moved, case, case.tensors(), **extra)
    args, kwargs = calls[0]
    return lambda: function(*args, **kwargs)


class Captured(Exception):
    """What an operator is called with is known."""


def statistics(function: Any, case: Any, tensors: Any) -> Any:
    return activation_unit_statistics_cases.statistics(function, case, tensors, 2)


MLP = {"lengths": LENGTHS, "dim": 18, "hidden": (20, 12)}
CALLS: dict[str, Callable[[], Any]] = {}
for name, changes in {
    "fp32": {},
    "bf16, scores": {"dtype": BF16, "return_scores": True},
    "short histories": {"dtype": BF16, "lengths": (3, 1, 0, 2)},
    "candidates": {"candidates": (2, 0, 3, 1)},
    "many candidates": {"candidates": (9, 9, 9, 9), "dtype": BF16},
    "rows": {"table": 20},
    "unique rows": {"table": 90, "unique_rows": True},
    "dice, dropout": {"activation": "dice", "dropout": 0.3},
    "wide": {"hidden": (136, 20), "dtype": BF16},
    "wide, dice, dropout": {"hidden": (136, 20), "activation": "dice", "dropout": 0.3},
}.items():
    CALLS[f"activation_unit, {name}"] = case_on_gpu(
        activation_unit_cases.call, functional.activation_unit, activation_unit_cases.Case(**MLP | changes)
    )
for name, changes in {"classic": {}, "wide": {"hidden": (136, 20), "dtype": BF16}}.items():
    CALLS[f"activation_unit_statistics, {name}"] = case_on_gpu(
        statistics, functional.activation_unit_statistics, activation_unit_cases.Case(**MLP | changes)
    )
for name, changes in {
    "fp32": {},
    "bias, log-sum-exp": {"bias": "by head", "return_lse": True},
    "candidates": {"candidates": (3, 0, 17, 2), "bias": "shared"},
    "rows": {"table": 20},
}.items():
    CALLS[f"target_attention, {name}"] = case_on_gpu(
        target_attention_cases.call,
        functional.target_attention,
        target_attention_cases.Case(lengths=LENGTHS, heads=2, **changes),
    )
for name, changes in {"plain": {}, "every option": {"causal": True, "buckets": 5, "dropout": 0.2}}.items():
    CALLS[f"self_attention, {name}"] = case_on_gpu(
        self_attention_cases.call,
        functional.self_attention,
        self_attention_cases.Case(lengths=LENGTHS, **changes),
    )
for name, changes in {
    "gru": {"kind": "gru"},
    "augru": {"kind": "augru"},
    "rows": {"table": 20, "row_scores": True},
    "unique rows": {"table": 90, "unique_rows": True},
    "many units": {"size": 100},
}.items():
    CALLS[f"attentional_gru, {name}"] = case_on_gpu(
        attentional_gru_cases.call,
        functional.attentional_gru,
        attentional_gru_cases.Case(lengths=LENGTHS, **changes),
    )
for name, changes in {"plain": {}, "every option": {"dropout": 0.2, "return_weights": True}}.items():
    CALLS[f"pairwise_pool, {name}"] = case_on_gpu(
        pairwise_pool_cases.call, functional.pairwise_pool, pairwise_pool_cases.Case(**changes)
    )


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_no_operator_waits_for_the_device(call: Callable[[], Any]) -> None:
    assert forward_and_backward(call) > 0


# As the docstrings have it.
WAIT = ("activation_unit, candidates", "activation_unit, many", "self_attention", "attentional_gru")


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(WAIT)])
def test_nor_does_the_path_without_kernels_but_where_documented(name: str) -> None:
    with recattn.backend("torch"):
        assert forward_and_backward(CALLS[name]) == 0


DIM = 6
LAYERS: dict[str, tuple[Callable[[], Any], bool]] = {
    "ActivationUnit": (lambda: nn.ActivationUnit(DIM, (5, 4)), True),
    "ActivationUnit, dice": (lambda: nn.ActivationUnit(DIM, (5, 4), activation="dice"), True),
    "TargetAttention": (lambda: nn.TargetAttention(DIM, num_heads=2), True),
    "TargetAttention, additive": (lambda: nn.TargetAttention(DIM, "additive"), True),
    "SelfAttention": (lambda: nn.SelfAttention(DIM, 2, buckets=4, dropout=0.1), False),
    "AttentionalGRU": (lambda: nn.AttentionalGRU(DIM, 5, kind="gru"), False),
}


@pytest.mark.parametrize("layout", ["jagged", "lengths", "mask"])
@pytest.mark.parametrize(("make", "takes_query"), LAYERS.values(), ids=LAYERS)
def test_no_layer_waits_for_the_device(make: Callable[[], Any], takes_query: bool, layout: str) -> None:
    layer = make().to("meta")
    lengths = torch.tensor(LENGTHS)
    padded = torch.empty(len(LENGTHS), 50, DIM, device="meta", requires_grad=True)
    history: Any = padded
    options: dict[str, Tensor] = {}
    if layout == "jagged":
        history = Jagged(padded.flatten(0, 1), on_meta(offsets_of(lengths)))
    elif layout == "lengths":
        options["lengths"] = on_meta(lengths)
    else:
        options["mask"] = torch.empty(len(LENGTHS), 50, dtype=torch.bool, device="meta")
    query = [torch.empty(len(LENGTHS), DIM, device="meta")] if takes_query else []

    def call() -> Any:
        out = layer(*query, history, **options)
        values = [
            x.values if isinstance(x, Jagged) else x for x in (out if isinstance(out, tuple) else (out,))
        ]
        return tuple(values)

    assert forward_and_backward(call) > 0


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda offsets: offsets[-1].item(), SCALAR),
        (lambda offsets: offsets.diff().nonzero(), "nonzero waits for the device"),
        (lambda offsets: offsets.tolist(), "no data"),
        (lambda offsets: bool(offsets[-1] > 3), "waits for the device"),
        (lambda offsets: offsets[offsets > 1], "nonzero"),
        (lambda offsets: offsets + torch.arange(5).to("meta"), "arange makes a tensor on the host"),
        (lambda offsets: torch.repeat_interleave(offsets), "without output_size"),
    ],
    ids=["item", "nonzero", "tolist", "bool", "a mask as index", "a tensor of the host", "repeat_interleave"],
)
def test_a_planted_wait_is_caught(planted: Callable[[Tensor], Any], message: str) -> None:
    with OnGPU(), pytest.raises((HostSync, NotImplementedError, RuntimeError), match=message):
        planted(torch.empty(5, dtype=torch.int64, device="meta"))


def test_a_wait_planted_in_an_operator_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    import recattn.kernels.target_attention as kernels

    forward = kernels.forward
    monkeypatch.setattr(kernels, "forward", lambda call: (call.offsets.max().item(), forward(call))[1])
    with pytest.raises(HostSync, match=SCALAR):
        forward_and_backward(CALLS["target_attention, fp32"])


# ---------------------------------------------------------------- several GPUs


class Seen(Exception):
    """Carries the GPU that was the current one."""


def test_operators_launch_on_the_gpu_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []

    def device(index: Any) -> Any:
        current.append(index)
        return nullcontext()

    def run(*_: Any, on_gpu: bool) -> Any:
        assert on_gpu
        raise Seen(current)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    with FakeTensorMode():
        x = torch.empty(3, device="cuda:1")
    with pytest.raises(Seen) as seen:
        implementation(run, "cuda")(None, x, "auto")
    assert seen.value.args == ([torch.device("cuda:1")],)
