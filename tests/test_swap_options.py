"""Every option of every constructor of a layer that `recattn.fuse` replaces: the layer is equal fused, or left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LENGTHS,
    LONGEST,
    MASKS,
    TOLERANCES,
    WIDTH,
    assert_fused_equals_own,
    import_or_skip,
    spread,
)
from torch import Tensor, nn

import recattn


@dataclass(frozen=True)
class Left:
    """A value of an option with which a layer is left to the library, and what the report says."""

    value: Any
    reason: str


@dataclass(frozen=True)
class Layer:
    """A layer's class, what it is made with, and by option the values that are tried, one at a time.

    Args:
        call: of the layer and a query `[B, D]` and histories `[B, L, D]`; the masks are in turn those of `MASKS`.
        fixed: options that the sizes of the batch decide.
    """

    module: str
    name: str
    base: Mapping[str, Any]
    values: Mapping[str, Sequence[Any]]
    call: Callable[[Any, Tensor, Tensor, str], Any]
    fixed: Sequence[str] = ()
    remark: Mapping[str, str] = field(default_factory=dict)  # of the report, by option; "" for all


HIDDEN = ((4,), (5, 3), (80, 40), (6, 5, 4, 3))
CLASSES = (nn.Tanh, nn.SiLU, nn.GELU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.ReLU6, nn.Softplus)
NOT_BUILT = "is not built"


def _by_length(layer: Any, query: Tensor, keys: Tensor, kind: str) -> Any:
    mask = MASKS[kind] if layer.supports_masking else None
    return layer(query.unsqueeze(1), keys, LENGTHS, mask)


def _embedded(layer: Any, query: Tensor, keys: Tensor, _: str) -> Any:
    query = query[:, : layer._query_dim]
    return layer({"h.query": query, "h.sequence": keys, "h.sequence_length": LENGTHS})


def _tried(built: Sequence[Any], left: Sequence[Any]) -> list[Any]:
    return [*built, *(Left(value, NOT_BUILT) for value in left)]


DROPPED = "training drops other units than the library would"
LAYERS = {
    "deepctr-torch pooling": Layer(
        "deepctr_torch.layers.sequence",
        "AttentionSequencePoolingLayer",
        {"att_hidden_units": (5, 3), "embedding_dim": WIDTH},
        {
            "att_hidden_units": HIDDEN,
            "att_activation": _tried(
                ["sigmoid", "linear", "relu", "dice", "prelu", *CLASSES[:6]], CLASSES[6:]
            ),
            "weight_normalization": [True, False],
            "return_score": [True, False],
            "supports_masking": [True, False],
            "kwargs": [],
        },
        _by_length,
        fixed=["embedding_dim"],
    ),
    "fuxictr DIN": Layer(
        "fuxictr.pytorch.layers.attentions.target_attention",
        "DIN_Attention",
        {"embedding_dim": WIDTH, "attention_units": [5, 3]},
        {
            "attention_units": list(map(list, HIDDEN)),
            "hidden_activations": [
                *("ReLU", "sigmoid", "tanh", "prelu", "dice", "GELU", "SiLU", "LeakyReLU", None),
                ["ReLU", "ReLU"],
                Left(["ReLU", "Tanh"], "different activations of hidden layers"),
                Left("softmax", "Softmax is not built"),
                Left("Softplus", "Softplus is not built"),
            ],
            "output_activation": [
                *(None, "sigmoid"),
                *(Left(name, "of the score is not built") for name in ("relu", "tanh")),
                Left("softmax", "Softmax is not built"),
            ],
            "dropout_rate": [0, 0.3, [0.3, 0.3], Left([0.3, 0.1], "different dropout of hidden layers")],
            "batch_norm": [True, False],
            "use_softmax": [True, False],
        },
        lambda layer, query, keys, kind: layer(query, keys, MASKS[kind]),
        fixed=["embedding_dim"],
        remark={"dropout_rate": DROPPED},
    ),
    "fuxictr multi-head": Layer(
        "fuxictr.pytorch.layers.attentions.target_attention",
        "MultiHeadTargetAttention",
        {"input_dim": WIDTH, "attention_dim": 6},
        {
            "attention_dim": [2, 8],
            "num_heads": [1, 2, 3],
            "dropout_rate": [0, 0.3],
            "use_scale": [True, False],
            "use_qkvo": [True, False],
        },
        lambda layer, query, keys, kind: layer(query, keys, MASKS[kind]),
        fixed=["input_dim"],
        remark={"dropout_rate": "in eval only: dropout of the attention is not built"},
    ),
    "recbole": Layer(
        "recbole.model.layers",
        "SequenceAttLayer",
        {"mask_mat": torch.arange(LONGEST).view(1, -1), "att_hidden_size": [4 * WIDTH, 5, 3]},
        {
            "mask_mat": [Left(torch.arange(1, LONGEST + 1).view(1, -1), "other than positions")],
            "att_hidden_size": [[4 * WIDTH, *units] for units in HIDDEN],
            "activation": _tried(
                ["sigmoid", "tanh", "relu", "leakyrelu", "dice", "none", None, *CLASSES[:6]], CLASSES[6:]
            ),
            "softmax_stag": [True, False],
            "return_seq_weight": [True, False],
        },
        lambda layer, query, keys, _: layer(query, keys, LENGTHS),
    ),
    "torch-rechub": Layer(
        "torch_rechub.models.ranking.din",
        "ActivationUnit",
        {"emb_dim": WIDTH, "dims": [5, 3], "activation": "relu"},
        {
            "dims": [None, *map(list, HIDDEN)],
            "activation": _tried(
                ["sigmoid", "relu", "dice", "prelu", "leakyrelu", *CLASSES[:6]], ["softmax", *CLASSES[6:]]
            ),
            "use_softmax": [True, False],
        },
        lambda layer, query, keys, _: layer(keys, query),
        fixed=["emb_dim"],
        remark={"": "without a mask, padding counts as items, as in the library"},
    ),
    "torch-rechub with Dice": Layer(
        "torch_rechub.models.ranking.din",
        "ActivationUnit",
        {"emb_dim": WIDTH, "dims": [5, 3], "activation": "dice"},
        {"dims": [None, *map(list, HIDDEN)], "activation": ["dice"], "use_softmax": [True, False]},
        lambda layer, query, keys, _: layer(keys, query),
        fixed=["emb_dim"],
        remark={"": "without a mask, padding counts as items, as in the library"},
    ),
    "torch-easy-rec DIN": Layer(
        "tzrec.modules.sequence",
        "DINEncoder",
        {"sequence_dim": WIDTH, "query_dim": WIDTH, "input": "h", "attn_mlp": {"hidden_units": [5, 3]}},
        {
            "query_dim": [1, WIDTH],
            "attn_mlp": [
                *({"hidden_units": list(units)} for units in HIDDEN),
                *(
                    {"hidden_units": [5, 3], "activation": name}
                    for name in (
                        "nn.ReLU",
                        "nn.Sigmoid",
                        "nn.Tanh",
                        "nn.PReLU",
                        "nn.SiLU",
                        "nn.GELU",
                        "Dice",
                        "",
                    )
                ),
                {"hidden_units": [5, 3], "activation": "nn.LeakyReLU(negative_slope=0.2)"},
                {"hidden_units": [5, 3], "use_bn": True, "activation": "Dice"},
                {"hidden_units": [5, 3], "bias": False},
                Left({"hidden_units": [5, 3], "use_ln": True}, "LayerNorm is not built"),
                Left({"hidden_units": [5, 3], "activation": "nn.Softplus"}, "Softplus is not built"),
                Left({"hidden_units": [5, 3], "dropout_ratio": [0.1, 0.2]}, "different dropout"),
            ],
            "max_seq_length": [0, 1, 4, LONGEST, 9],
            "kwargs": [],
        },
        _embedded,
        fixed=["sequence_dim", "input"],
    ),
    "torch-easy-rec dot": Layer(
        "tzrec.modules.sequence",
        "SimpleAttention",
        {"sequence_dim": WIDTH, "query_dim": WIDTH, "input": "h"},
        {"max_seq_length": [0, 1, 4, LONGEST, 9], "kwargs": []},
        _embedded,
        fixed=["sequence_dim", "query_dim", "input"],
    ),
}
MASKED = ("deepctr-torch pooling", "fuxictr DIN", "fuxictr multi-head")  # the others take no mask
CASES = [
    pytest.param(key, option, value, id=f"{key}-{option}-{index}")
    for key, layer in LAYERS.items()
    for option, values in layer.values.items()
    for index, value in enumerate(values)
]


@pytest.mark.parametrize("key", LAYERS)
def test_no_option_of_the_constructor_is_forgotten(key: str) -> None:
    layer = LAYERS[key]
    cls = getattr(import_or_skip(layer.module), layer.name)
    assert set(inspect.signature(cls).parameters) == {*layer.values, *layer.fixed}


@pytest.mark.parametrize(("key", "option", "value"), CASES)
def test_an_option_is_equal_or_left(key: str, option: str, value: Any) -> None:
    layer = LAYERS[key]
    cls = getattr(import_or_skip(layer.module), layer.name)
    left = isinstance(value, Left)
    torch.manual_seed(0)
    built = spread(cls(**{**layer.base, option: value.value if left else value}))
    if left:
        (row,) = recattn.fuse(built)
        assert not row.swapped
        assert value.reason in row.reason
        return
    dropped = bool(option == "dropout_rate" and value)
    (row,) = recattn.fuse(built, backend="torch")
    recattn.unfuse(built)
    expected = layer.remark.get(option, "") if dropped else layer.remark.get("", "")
    assert row.reason.startswith(expected)
    assert bool(row.reason) == bool(expected)
    torch.manual_seed(1)
    batch = [torch.randn(BATCH, WIDTH), torch.randn(BATCH, LONGEST, WIDTH)]
    for training in (False,) if dropped else (True, False):
        for kind, dtype in ((kind, dtype) for dtype in TOLERANCES for kind in MASKS):
            if kind != "left" and (dtype == torch.float32 or key not in MASKED):
                continue
            assert_fused_equals_own(
                built.train(training),
                lambda m, q, k, kind=kind: layer.call(m, q, k, kind),
                batch,
                dtype,
                remark=row.reason,
                backend="torch",
                least=10 if training and key.startswith("torch-rechub") else 1,
            )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("key", LAYERS)
def test_random_histories(key: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch = int(torch.randint(2, 30, (), generator=generator))
    lengths = torch.randint(0, LONGEST + 2, (batch,), generator=generator)
    lengths[torch.randint(batch, (), generator=generator)] = 0
    monkeypatch.setitem(globals(), "LENGTHS", lengths)
    monkeypatch.setitem(MASKS, "left", torch.rand(batch, LONGEST, generator=generator) < lengths[:, None] / 7)
    layer = LAYERS[key]
    built = spread(getattr(import_or_skip(layer.module), layer.name)(**layer.base))
    inputs = [torch.randn(batch, *size, generator=generator) for size in ((WIDTH,), (LONGEST, WIDTH))]
    (row,) = recattn.fuse(built, backend="torch")
    recattn.unfuse(built)
    for training in (True, False):
        assert_fused_equals_own(
            built.train(training),
            lambda m, q, k: layer.call(m, q, k, "left"),
            inputs,
            remark=row.reason,
            backend="torch",
        )
