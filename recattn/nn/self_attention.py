"""Multi-head self-attention as a layer."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from recattn import functional
from recattn.jagged import Jagged, pack, valid_positions
from recattn.nn.histories import expect_sequences
from recattn.nn.twin import Twin
from recattn.reference import self_attention_padded

Sequences = TypeVar("Sequences", Jagged, Tensor)


class SelfAttention(Twin):
    r"""Each item of a sequence attends to the items of the same sequence.

    .. math::
        out = W_o [head_1, \dots, head_H],\qquad
        head_h = softmax(q_h k_h^T / \sqrt{d} + bias)\, v_h,\qquad [q, k, v] = W x

    Args:
        dim: D, the width of the items.
        num_heads: H, which divides D.
        causal: whether an item sees only itself and those before it.
        hide_self: whether an item does not see itself.
        buckets: R, rows of a learned bias `[R, H]`, see `recattn.functional.self_attention`; 0 for none.
        dropout: the probability that an attention weight is dropped in training.
        bias: whether the projections have one.
        device, dtype: of the parameters.

    Parameters are those of `projection`, for q, k and v, and of `output`, both `nn.Linear`, and `bias_table`.

    Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017; Chen et al., "Behavior Sequence Transformer",
    DLP-KDD 2019.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        causal: bool = False,
        hide_self: bool = False,
        buckets: int = 0,
        dropout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"dim, num_heads: expected a positive multiple, got {dim} and {num_heads}")
        functional.checks.check_dropout(dropout)
        if buckets < 0:
            raise ValueError(f"buckets: expected at least 0, got {buckets}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.projection = nn.Linear(dim, 3 * dim, bias=bias, **factory)
        self.output = nn.Linear(dim, dim, bias=bias, **factory)
        self.bias_table = nn.Parameter(torch.zeros(buckets, num_heads, **factory)) if buckets else None
        self.dim, self.num_heads, self.dropout = dim, num_heads, dropout
        self.causal, self.hide_self = causal, hide_self

    def forward(
        self,
        x: Sequences,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        bias_index: str | Tensor = "position",
    ) -> Sequences:
        """Attention within each sequence.

        Args:
            x: a `Jagged` of `[T, D]`; or padded, `[B, L, D]`, together with
            lengths: `[B]` integers, for right padding, or
            mask: `[B, L]`, bool or integers, non-zero where an item counts, in any pattern.
            bias_index: `"position"`, or integers `[T]` or `[B, L]`, such as bucketed times.

        Returns:
            The same layout; zero in the padding.

        Raises:
            TypeError, ValueError: as `recattn.functional.self_attention`, and if lengths or a mask come with a
                `Jagged`, or neither with a padded batch.
        """
        expect_sequences("x", x)
        if isinstance(x, Jagged):
            if lengths is not None or mask is not None:
                raise ValueError("lengths, mask: expected None, since x is not padded")
            self._check("x", x.values, ("T",))
            return x.with_values(self._attend(x.values, x.offsets, bias_index))
        self._check("x", x, ("B", "L"))
        valid = valid_positions(x, lengths, mask)
        rows, offsets = pack(valid)
        if isinstance(bias_index, Tensor):
            if bias_index.shape != valid.shape:
                raise ValueError(f"bias_index: expected {list(valid.shape)}, got {list(bias_index.shape)}")
            bias_index = bias_index.flatten().index_select(0, rows)
        out = self._attend(x.flatten(0, 1).index_select(0, rows), offsets, bias_index)
        # Each takes the row of the last valid position up to it, or the one in front of all rows.
        padded = nn.functional.pad(out, (0, 0, 1, 0)).index_select(0, valid.flatten().cumsum(0))
        return padded.unflatten(0, valid.shape).masked_fill(~valid.unsqueeze(2), 0)

    def _check(self, name: str, x: Tensor, leading: tuple[str, ...]) -> None:
        if x.dim() != len(leading) + 1 or x.shape[-1] != self.dim:
            raise ValueError(f"{name}: expected [{', '.join(leading)}, {self.dim}], got {list(x.shape)}")

    def _attend(self, x: Tensor, offsets: Tensor, bias_index: str | Tensor) -> Tensor:
        weight = self.projection.weight
        if x.device != weight.device:
            raise ValueError(f"x: expected device {weight.device}, as the parameters, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"x: expected {weight.dtype}, as the parameters, got {x.dtype}")
        # Projections read slack too, and a gradient of zero times NaN would be NaN in theirs.
        slack = torch.arange(x.shape[0], device=x.device) >= offsets[-1]
        x = x.masked_fill(slack.unsqueeze(1), 0)
        q, k, v = self.projection(x).chunk(3, 1)
        options: dict[str, Any] = {
            "num_heads": self.num_heads,
            "causal": self.causal,
            "hide_self": self.hide_self,
            "bias_table": self.bias_table,
            "dropout": self.dropout if self.training else 0.0,
        }
        if self.implementation == "fused":
            return self.output(functional.self_attention(q, k, v, offsets, bias_index=bias_index, **options))
        items = Jagged(x, offsets)
        q, k, v = (items.with_values(part).to_padded() for part in (q, k, v))
        if isinstance(bias_index, Tensor):
            bias_index = items.with_values(bias_index).to_padded()
        mask = torch.arange(q.shape[1], device=x.device) < items.lengths[:, None]
        out = self_attention_padded(q, k, v, mask, bias_index=bias_index, **options)
        packed = Jagged.from_padded(out, mask=mask).values
        rows = nn.functional.pad(packed, (0, 0, 0, max(x.shape[0] - packed.shape[0], 0)))[: x.shape[0]]
        return self.output(rows)

    def example(self, like: Tensor, offsets: Tensor) -> tuple[Any, ...]:
        return (Jagged(like.new_zeros(int(offsets[-1]), self.dim), offsets),)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, causal={self.causal}, hide_self={self.hide_self}"
