"""activation_unit forward where the MLP is wide: a kernel for the scores.

What is left, softmax and pooling, the kernel of all other calls does: it reads the scores instead of computing them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import settings
from .arguments import Histories, Spec, get
from .normal_form import NormalForm
from .wide import score_tokens


@triton.jit(do_not_specialize=["batch", "count"])
def score_kernel(data, batch, owners, net, scores, count, SPEC: tl.constexpr):
    BLOCK: tl.constexpr = get(SPEC, "block")
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    if begin >= tl.load(data.offsets + batch):
        return
    position, valid, s = score_tokens(data, batch, owners, net, begin, count, SPEC)
    tl.store(scores + position, s, mask=valid)


def score_all(data: Histories, net: NormalForm, spec: Spec, launch: settings.Launch, scores: Tensor) -> None:
    """The score of every position of a history into `scores [T]`, in the base that `normal_form` gives them."""
    count = scores.shape[0]
    score_kernel[(triton.cdiv(count, launch.block),)](
        data,
        data.offsets.numel() - 1,
        owners(data.offsets, count),
        net.network,
        scores,
        count,
        SPEC=spec,
        num_warps=launch.num_warps,
    )


def owners(offsets: Tensor, count: int) -> Tensor:
    """`[count]`, the sequence of each position; of slack the number of sequences."""
    positions = torch.arange(count, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), positions, right=True, out_int32=True)
