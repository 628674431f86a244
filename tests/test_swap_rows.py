"""Histories that are slices of something longer are read in place, not copied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LENGTHS,
    LONGEST,
    MASKS,
    WIDTH,
    assert_fused_equals_own,
    import_or_skip,
    spread,
)
from torch import Tensor

from recattn.swap.histories import Padded, table_of

# By name, histories [B, L, D] within something [B, L + 3, D + 1], or a size that the slice decides.
SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "first": lambda x: x[:, :LONGEST],
    "last": lambda x: x[:, 3:],
    "columns": lambda x: x[:, 1 : LONGEST + 1, :WIDTH],
    "of several": lambda x: x.view(-1, 3, *x.shape[1:])[:, 1],
}
COPIED: dict[str, Callable[[Tensor], Tensor]] = {
    "every other": lambda x: x[:, ::2],
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one for all": lambda x: x[:1].expand(BATCH, -1, -1),
    "backwards": lambda x: x.flip(1),
}


def something() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(9, LONGEST + 3, WIDTH + 1)


@pytest.mark.parametrize("name", SLICES)
def test_a_slice_is_read_and_its_gradient_returned_without_a_copy(name: str) -> None:
    histories = SLICES[name](something()).detach().requires_grad_()
    table, step = table_of(histories)
    assert table.data_ptr() == histories.data_ptr()
    at = torch.arange(histories.shape[0])[:, None] * step + torch.arange(histories.shape[1])
    assert torch.equal(table[at], histories)
    upstream = torch.zeros_like(table)
    upstream[at] = torch.randn(histories.shape)
    (gradient,) = torch.autograd.grad(table, histories, upstream)
    assert torch.equal(gradient, upstream[at])
    assert gradient.data_ptr() == upstream.data_ptr()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", [*SLICES, *COPIED])
def test_rows_lead_to_the_items(name: str, masked: bool) -> None:
    histories = {**SLICES, **COPIED}[name](something())
    batch, longest = histories.shape[:2]
    valid = torch.randn(batch, longest) > 0 if masked else None
    layout = Padded(histories, valid).layout()
    total = int(layout["offsets"][-1])
    keys = layout["keys"]
    items = keys[:total] if layout["rows"] is None else keys[layout["rows"][:total]]
    assert torch.equal(items, histories.flatten(0, 1) if valid is None else histories[valid])


def call_of(library: str, width: int) -> tuple[Any, Callable[[Any, Tensor, Tensor], Any]]:
    """A layer of a library that takes histories of any strides, and how it is called."""
    if library == "deepctr-torch":
        pooling = import_or_skip("deepctr_torch.layers.sequence").AttentionSequencePoolingLayer
        layer = pooling((5, 3), "dice", embedding_dim=width, weight_normalization=True)
        return layer, lambda m, q, k: m(q.unsqueeze(1), k, LENGTHS)
    if library == "fuxictr":  # whose own code takes a view of what it concatenates
        attention = import_or_skip("fuxictr.pytorch.layers.attentions.target_attention").DIN_Attention
        layer = attention(width, attention_units=[5, 3], hidden_activations="dice")
        return layer, lambda m, q, k: m(q, k, MASKS["holes"])
    if library == "fuxictr multi-head":
        module = import_or_skip("fuxictr.pytorch.layers.attentions.target_attention")
        layer = module.MultiHeadTargetAttention(width, 6, num_heads=2)
        return layer, lambda m, q, k: m(q, k, MASKS["left"])
    if library == "recbole":
        cls = import_or_skip("recbole.model.layers").SequenceAttLayer
        layer = cls(torch.arange(LONGEST).view(1, -1), [4 * width, 5, 3], return_seq_weight=False)
        return layer, lambda m, q, k: m(q, k, LENGTHS)
    if library == "torch-rechub":
        unit = import_or_skip("torch_rechub.models.ranking.din").ActivationUnit
        return unit(width, dims=[5, 3], activation="sigmoid"), lambda m, q, k: m(k, q)
    encoder = import_or_skip("tzrec.modules.sequence").DINEncoder(
        width, width, "h", {"hidden_units": [5, 3]}, max_seq_length=4
    )
    return encoder, lambda m, q, k: m({"h.query": q, "h.sequence": k, "h.sequence_length": LENGTHS})


@pytest.mark.parametrize(
    "library",
    ["deepctr-torch", "fuxictr", "fuxictr multi-head", "recbole", "torch-rechub", "torch-easy-rec"],
)
@pytest.mark.parametrize("name", ["first", "last", "columns"])
def test_layers_pool_slices_as_their_libraries_do(library: str, name: str) -> None:
    whole = something()[:BATCH]
    width = SLICES[name](whole).shape[2]
    layer, call = call_of(library, width)
    torch.manual_seed(1)
    query = torch.randn(BATCH, width)
    remark = "without a mask, padding counts as items, as in the library" if library == "torch-rechub" else ""
    layer = spread(layer)
    assert_fused_equals_own(layer, lambda m, q, k: call(m, q, SLICES[name](k)), [query, whole], remark=remark)
