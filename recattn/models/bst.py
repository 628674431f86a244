"""Behavior Sequence Transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recattn.data import Batch
from recattn.jagged import Jagged
from recattn.models.mlp import mlp
from recattn.models.ranking import RankingModel
from recattn.nn import SelfAttention


class BST(RankingModel):
    r"""Behavior Sequence Transformer: the history and, behind it, the target are tokens that attend to each other.

    .. math::
        x_t = [e_{item}, e_{category}]_t + p_{bucket(t)},\qquad
        bucket(t) = \lfloor \log_2(1 + time_{target} - time_t) \rfloor

        S = LN(x + Attention(x)),\qquad F = LN(S + W_2 LeakyReLU(W_1 S + b_1) + b_2)

        logit = MLP([e_{user}, F_{target}, mean_t F_t])

    where S and F repeat `num_blocks` times, with dropout on what is added to x and S.

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`. Tokens are `2 * dim` wide.
        num_heads: of the attention; it divides `2 * dim`.
        num_blocks: of attention and two linear layers.
        inner: the width between these; `2 * dim` if not given.
        time_buckets: how many time differences are told apart, of 1, 2, 4, ... seconds; longer ones count as the last.
        hidden: the widths of the hidden layers of the head, PReLU each.
        dropout: in the blocks, and behind each hidden layer of the head.

    Raises:
        ValueError: for an id count or width below 1, or an option that does not exist; in the call, for a batch
            without timestamps.

    Source: Chen et al., "Behavior Sequence Transformer for E-commerce Recommendation in Alibaba", DLP-KDD 2019; there
    is no code of the authors. The paper feeds all tokens, end to end, to a head of 1024, 512 and 256 LeakyReLU units,
    so histories have one fixed length (20) and 8 heads read them; here the head reads the target's token and the mean
    of all, which do not grow with the history. That time differences go in by their logarithm, added to the item, is
    ours: the paper says only that they are a feature of each token.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        num_heads: int = 4,
        num_blocks: int = 1,
        inner: int | None = None,
        time_buckets: int = 32,
        hidden: Sequence[int] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        width = 2 * dim
        inner = width if inner is None else inner
        for name, size in (("num_blocks", num_blocks), ("inner", inner), ("time_buckets", time_buckets)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.time = nn.Embedding(time_buckets, width)
        nn.init.normal_(self.time.weight, std=0.05)  # as the items
        self.blocks = nn.ModuleList(Block(width, num_heads, inner, dropout) for _ in range(num_blocks))
        self.head = mlp(5 * dim, hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        tokens = self.tokens(batch)
        for block in self.blocks:
            tokens = block(tokens)
        target = tokens.values.index_select(0, tokens.offsets[1:] - 1)
        user = self.embedding.user(batch.user)
        return self.head(torch.cat([user, target, tokens.mean()], dim=1)).squeeze(1)

    def tokens(self, batch: Batch) -> Jagged:
        """Each history and its target as vectors, `[T + B, 2 * dim]`."""
        if batch.timestamp is None or batch.history_timestamp is None:
            missing = "timestamp" if batch.timestamp is None else "history_timestamp"
            raise ValueError(f"{missing}: expected times, which BST reads, got None")
        columns = [batch.history.values, batch.history_category.values, batch.history_timestamp.values]
        target = torch.stack([batch.item, batch.category, batch.timestamp], dim=1)
        sequences = batch.history.with_values(torch.stack(columns, dim=1)).append(target)
        item, category, time = sequences.values.unbind(1)
        shown = batch.timestamp.index_select(0, sequences.segment_ids().clamp_max(batch.size - 1))
        x = self.embedding.items(item, category) + self.time(self.bucket(shown - time))
        return sequences.with_values(x)

    def bucket(self, seconds: Tensor) -> Tensor:
        """Of time differences, int64, the rows of the table; what lies in the future counts as now."""
        _, exponent = torch.frexp((seconds.clamp_min(0) + 1).to(torch.float64))
        return (exponent - 1).clamp_max(self.time.num_embeddings - 1).to(torch.int64)


class Block(nn.Module):
    """Attention and two linear layers, each added to its input and then normalised."""

    def __init__(self, width: int, num_heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, inner), nn.LeakyReLU(), nn.Linear(inner, width))
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Jagged) -> Jagged:
        x = tokens.values
        x = self.attention_norm(x + self.dropout(self.attention(tokens).values))
        x = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return tokens.with_values(x)
