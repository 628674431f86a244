"""`semantics="valid"`: empty histories give 0, and whatever else differs from the library is in the report."""

from __future__ import annotations

import copy

import pytest
import torch
from swap_cases import LENGTHS, assert_same
from swap_layers import LAYERS, Example, example
from torch import nn

import recattn

# Of layers that take empty histories, what the report says.
EMPTY = {
    "deepctr_torch AttentionSequencePoolingLayer": "an empty history gives 0, not the mean of its padding",
    "fuxictr DIN_Attention": "",
    "fuxictr MultiHeadTargetAttention": "an empty history gives 0, not the mean of its padding",
    "recbole SequenceAttLayer": "",
    "tzrec DINEncoder": "an empty history gives 0, not the mean of its padding",
    "tzrec SimpleAttention": "an empty history gives 0, not the mean of its padding",
}
STATISTICS = "batch statistics over valid positions only"


def valid(name: str, training: bool) -> tuple[Example, nn.Module, str]:
    """A layer, its twin with valid semantics, and the remarks on that."""
    found = example(name)
    found.layer.train(training)
    twin = copy.deepcopy(found.layer)
    report = recattn.fuse(twin, semantics="valid")
    assert report
    assert all(row.swapped for row in report), report
    return found, twin, "; ".join(row.reason for row in report)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_what_the_report_does_not_mention_is_the_library_s(name: str, training: bool) -> None:
    found, twin, said = valid(name, training)
    if STATISTICS in said and training:
        return
    out, own = found.out(twin), found.out(found.layer)
    if "an empty history" in said:
        out, own = out[LENGTHS > 0], own[LENGTHS > 0]
    assert_same([out], [own], 1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_history_gives_0(name: str, training: bool) -> None:
    found, twin, said = valid(name, training)
    assert (found.out(twin)[LENGTHS == 0] == 0).all()
    assert EMPTY[name] in said
    if not EMPTY[name]:
        assert "an empty history" not in said
        assert (found.out(found.layer)[LENGTHS == 0] == 0).all()


def test_statistics_are_those_of_the_items_whatever_the_padding_holds() -> None:
    for name in ("deepctr_torch AttentionSequencePoolingLayer", "tzrec DINEncoder"):
        found, twin, said = valid(name, training=True)
        assert STATISTICS in said
        other = copy.deepcopy(twin)
        out = found.out(twin)
        padding = torch.arange(6) >= LENGTHS[:, None]
        if isinstance(found.inputs[0], dict):
            embedded = dict(found.inputs[0])
            embedded["h.sequence"] = embedded["h.sequence"].masked_fill(padding[..., None], 7.0)
            noisy = other(embedded)
        else:
            query, keys, lengths = found.inputs
            noisy = other(query, keys.masked_fill(padding[..., None], 7.0), lengths)
        assert torch.equal(out, noisy)
        assert_same(list(other.buffers()), list(twin.buffers()), 0)
