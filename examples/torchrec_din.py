"""TorchRec's embeddings in front of recattn's attention: DIN over a KeyedJaggedTensor.

pip install --no-deps -r peers.txt
python examples/torchrec_din.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from recattn import Jagged
from recattn.nn import ActivationUnit

ITEMS, DIM, BATCH = 200, 16, 64


class TorchRecDIN(nn.Module):
    """One table for the target, which is a feature of one id each, and for the history, of any number of ids."""

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__()
        item = EmbeddingConfig(
            name="item", embedding_dim=dim, num_embeddings=num_items, feature_names=["target", "history"]
        )
        self.embedding = EmbeddingCollection(tables=[item])
        self.attention = ActivationUnit(dim, (32, 16), activation="dice")
        self.head = nn.Sequential(nn.Linear(2 * dim, 32), nn.PReLU(), nn.Linear(32, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """`[B]` logits."""
        embedded = self.embedding(features)
        target = embedded["target"].values()
        pooled = self.attention(target, Jagged.from_torchrec(embedded["history"]))
        return self.head(torch.cat([target, pooled], dim=1)).squeeze(1)


def batch(generator: torch.Generator) -> tuple[KeyedJaggedTensor, Tensor]:
    """Users who like the items that they have seen before, and no others."""
    lengths = torch.randint(0, 20, (BATCH,), generator=generator)
    target = torch.randint(0, ITEMS, (BATCH,), generator=generator)
    history = torch.randint(0, ITEMS, (int(lengths.sum()),), generator=generator)
    label = (torch.rand(BATCH, generator=generator) < 0.5) & (lengths > 0)
    last = lengths.cumsum(0)[label] - 1
    history[last] = target[label]
    ones = torch.ones_like(target)
    features = KeyedJaggedTensor(
        ["target", "history"], torch.cat([target, history]), lengths=torch.cat([ones, lengths])
    )
    return features, label.to(torch.float32)


def main(steps: int = 300) -> list[float]:
    """Trains, and returns the loss of each step."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = TorchRecDIN(ITEMS, DIM)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(steps):
        features, label = batch(generator)
        loss = nn.functional.binary_cross_entropy_with_logits(model(features), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} at first, {sum(losses[-20:]) / 20:.3f} at the end")
