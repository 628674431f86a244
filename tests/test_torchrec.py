"""TorchRec's own tensors and embeddings beside recattn, where TorchRec is installed: see peers.txt."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from recattn import Jagged
from recattn.nn import ActivationUnit

pytest.importorskip("fbgemm_gpu", reason="peers.txt is not installed")
torchrec = pytest.importorskip("torchrec", reason="peers.txt is not installed")

LENGTHS = torch.tensor([2, 0, 3, 1])


def keyed() -> torchrec.KeyedJaggedTensor:
    """Clicks of the lengths above, behind one cart for each user."""
    ids = torch.arange(4 + int(LENGTHS.sum())) % 7
    lengths = torch.cat([torch.ones_like(LENGTHS), LENGTHS])
    return torchrec.KeyedJaggedTensor(["carts", "clicks"], ids, lengths=lengths)


def test_a_key_of_a_keyed_jagged_tensor_comes_in() -> None:
    clicks = Jagged.from_torchrec(keyed(), "clicks").validate()
    assert clicks.lengths.tolist() == LENGTHS.tolist()
    assert clicks.values.tolist() == [4, 5, 6, 0, 1, 2]


def test_what_goes_out_comes_back() -> None:
    x = Jagged(torch.randn(6, 3), torch.tensor([0, 2, 2, 5, 6]))
    out = x.to_torchrec()
    assert isinstance(out, torchrec.JaggedTensor)
    assert out.lengths().tolist() == LENGTHS.tolist()
    back = Jagged.from_torchrec(out)
    assert torch.equal(back.values, x.values)
    assert torch.equal(back.offsets, x.offsets)
    ids = x.with_values(torch.arange(6)).to_torchrec("clicks")
    assert isinstance(ids, torchrec.KeyedJaggedTensor)
    assert torch.equal(Jagged.from_torchrec(ids, "clicks").values, torch.arange(6))


def test_gradients_reach_the_table_of_an_embedding_collection() -> None:
    torch.manual_seed(0)
    config = torchrec.EmbeddingConfig(
        name="item", embedding_dim=4, num_embeddings=7, feature_names=["carts", "clicks"]
    )
    embedding = torchrec.EmbeddingCollection(tables=[config])
    layer = ActivationUnit(4, (6, 5))
    table = embedding.embeddings["item"].weight
    embedded = embedding(keyed())
    out = layer(embedded["carts"].values(), Jagged.from_torchrec(embedded["clicks"]))
    (got,) = torch.autograd.grad(out.square().sum(), table)
    carts, clicks = (Jagged.from_torchrec(keyed(), key) for key in ("carts", "clicks"))
    expected = layer(table[carts.values], clicks, table=table)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(got, *torch.autograd.grad(expected.square().sum(), table))


@pytest.mark.slow
def test_the_example_learns() -> None:
    example = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "torchrec_din.py"))
    losses = example["main"](steps=200)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])
