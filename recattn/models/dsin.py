"""Deep Session Interest Network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recattn.data import Batch
from recattn.data.sessions import Sessions, split_sessions
from recattn.jagged import Jagged
from recattn.models.mlp import mlp
from recattn.models.ranking import RankingModel
from recattn.nn import AttentionalGRU, SelfAttention, TargetAttention


class DSIN(RankingModel):
    r"""Deep Session Interest Network: what the user wanted in each session, how that went on from session to
    session, and which of it has to do with this item.

    .. math::
        Q_k &= X_k + BE_k,\qquad BE_{(k,t,c)} = w^K_k + w^T_t + w^C_c \\
        I_k &= mean_t\, FFN(SelfAttention(Q_k)) \\
        H_k &= [\overrightarrow{GRU}(I)_k, \overleftarrow{GRU}(I)_k] \\
        U^I &= \sum_k softmax_k(I_k^T W^I q)\, I_k,\qquad U^H = \sum_k softmax_k(H_k^T W^H q)\, H_k \\
        logit &= MLP([e_{user}, q, U^I, U^H])

    where :math:`q = [e_{item}, e_{category}]` and :math:`X_k` are the items of session k, embedded alike. A
    session ends where `session_gap` passes until the next item; k counts sessions from the most recent one, t the
    items of a session, c the units of an item's vector. Attention and FFN have a residual connection each.

    Args:
        num_users, num_items, num_categories, dim: see `RankingModel`.
        session_gap: the longest pause within a session, in seconds.
        max_sessions: how many sessions are kept, the most recent.
        max_session_length: how many items of a session are kept, the most recent.
        num_heads: of self-attention; it divides `2 * dim`.
        hide_self: whether an item does not attend to itself.
        layer_norm: whether layer normalisation follows attention and FFN, as in the paper. It brings interests to unit
            variance beside embeddings that begin far below it, and training starts more slowly and less stably.
        attention: the similarity of both pools, see `recattn.nn.TargetAttention`; `"mlp"` for that of the code.
        attention_hidden: the widths of the hidden layers of a similarity that is a network; by default those of the
            code for `"mlp"`, 64 and 16.
        hidden: the widths of the hidden layers of the head, PReLU each.
        dropout: behind self-attention, FFN and each hidden layer of the head.

    Raises:
        ValueError: for an id count, limit or width below 1, or an option that does not exist; and for a batch without
            `history_timestamp`.

    Source: Feng et al., "Deep Session Interest Network for Click-Through Rate Prediction", IJCAI 2019. There the
    sessions pass through a bi-directional LSTM, in the authors' code through two layers whose directions are averaged;
    here through two GRUs next to each other, one of them over the sessions in reverse. Their code further pools by
    DIN's activation unit with hidden layers of 64 and 16, hides each item from itself, and, as here, does not normalise
    layers; its means count padded positions. The script that trains it adds sinusoids in place of the bias, with
    which the loss became NaN.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        num_categories: int,
        *,
        dim: int = 32,
        session_gap: int = 1800,
        max_sessions: int = 10,
        max_session_length: int = 20,
        num_heads: int = 4,
        hide_self: bool = False,
        layer_norm: bool = False,
        attention: str = "bilinear",
        attention_hidden: Sequence[int] | None = None,
        hidden: Sequence[int] = (200, 80),
        dropout: float = 0.0,
    ) -> None:
        super().__init__(num_users, num_items, num_categories, dim)
        width = 2 * dim
        for name, limit in (("max_sessions", max_sessions), ("max_session_length", max_session_length)):
            if limit < 1:
                raise ValueError(f"{name}: expected at least 1, got {limit}")
        if session_gap < 0:
            raise ValueError(f"session_gap: expected at least 0, got {session_gap}")
        self.session_gap = session_gap
        self.max_sessions, self.max_session_length = max_sessions, max_session_length
        self.bias_encoding = BiasEncoding(max_sessions, max_session_length, width)
        self.interest = SessionInterest(
            width, num_heads, hide_self=hide_self, layer_norm=layer_norm, dropout=dropout
        )
        self.gru = AttentionalGRU(width, dim, kind="gru")
        self.reverse_gru = AttentionalGRU(width, dim, kind="gru")
        if attention == "mlp" and attention_hidden is None:
            attention_hidden = (64, 16)
        self.interest_pool = TargetAttention(width, attention, hidden=attention_hidden)
        self.state_pool = TargetAttention(width, attention, hidden=attention_hidden)
        self.head = mlp(dim + 3 * width, hidden, dropout=dropout)

    def forward(self, batch: Batch) -> Tensor:
        """`[B]` logits."""
        if batch.history_timestamp is None:
            raise ValueError("history_timestamp: expected timestamps to find sessions by, got None")
        sessions = split_sessions(
            batch.history_timestamp,
            self.session_gap,
            max_sessions=self.max_sessions,
            max_length=self.max_session_length,
        )
        user = self.embedding.user(batch.user)
        target = self.embedding.items(batch.item, batch.category)
        items = self.embedding.items(
            batch.history.values[sessions.rows], batch.history_category.values[sessions.rows]
        )
        encoded = Jagged(items + self.bias_encoding(sessions), sessions.offsets)
        interests = Jagged(self.interest(encoded), sessions.histories)  # [S, 2 * dim]
        states, _ = self.gru(interests)
        reverse_states, _ = self.reverse_gru(interests.reversed())
        states = interests.with_values(torch.cat([states.values, reverse_states.reversed().values], dim=1))
        features = [user, target, self.interest_pool(target, interests), self.state_pool(target, states)]
        return self.head(torch.cat(features, dim=1)).squeeze(1)


class BiasEncoding(nn.Module):
    """What tells an item's place: a number per session, most recent first, one per position in the session, and one
    per unit of the item's vector, added up.

    Args:
        sessions, positions: how many there are; what is beyond counts as the last of them.
        width: of items.
    """

    def __init__(self, sessions: int, positions: int, width: int) -> None:
        super().__init__()
        self.session = nn.Parameter(torch.empty(sessions, 1))
        self.position = nn.Parameter(torch.empty(positions, 1))
        self.unit = nn.Parameter(torch.empty(width))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.05)  # as the embeddings

    def forward(self, sessions: Sessions) -> Tensor:
        """`[R, width]`."""
        items = Jagged(sessions.rows, sessions.offsets)
        row = torch.arange(sessions.rows.shape[0], device=items.device)
        begin, _ = items.bounds()
        position = (row - begin).clamp_max(self.position.shape[0] - 1)

        number = torch.arange(sessions.offsets.shape[0] - 1, device=items.device)
        _, end = Jagged(number, sessions.histories).bounds()
        ordinal = torch.nn.functional.pad(end - 1 - number, (0, 1))  # slack rows are of one session more
        ordinal = ordinal[items.segment_ids()].clamp_max(self.session.shape[0] - 1)
        # embedding adds up its gradient in a fixed order
        lookup = nn.functional.embedding
        return lookup(ordinal, self.session) + lookup(position, self.position) + self.unit


class SessionInterest(nn.Module):
    """A transformer block over each session and the mean of what it gives: sessions `[R, width]` to `[S, width]`.

    Args:
        width, num_heads, hide_self: see `recattn.nn.SelfAttention`.
        layer_norm: whether both halves end in layer normalisation.
        dropout: behind both.
    """

    def __init__(
        self, width: int, num_heads: int, *, hide_self: bool, layer_norm: bool, dropout: float
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, num_heads, hide_self=hide_self)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) if layer_norm else nn.Identity() for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, sessions: Jagged) -> Tensor:
        x = sessions.values
        x = self.norms[0](x + self.dropout(self.attention(sessions).values))
        x = self.norms[1](x + self.dropout(self.feed_forward(x)))
        return sessions.with_values(x).mean()
