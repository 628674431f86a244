"""The weighted sum of values over tokens, kept as a tile from one tile of tokens to the next.

The tile has 16 equal rows where a matrix unit makes it. EXACT takes plain FMAs instead, and rows that are yet to be
summed: across threads that can wait until all tokens are in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import LN_2, dot, exp2


@triton.jit
def weigh(s, NORMALIZE: tl.constexpr, APPROX: tl.constexpr):
    """The weights that scores give where no sum over the history normalises them. Scores are in base 2 for exp, and
    have the sign turned too for sigmoid, see `normal_form`."""
    if NORMALIZE == "exp":
        return exp2(s, APPROX)
    elif NORMALIZE == "sigmoid":
        return 1 / (1 + exp2(s, APPROX))
    else:
        tl.static_assert(NORMALIZE == "none")
        return s


@triton.jit
def weigh_backward(grad, a, NORMALIZE: tl.constexpr):
    """dL/ds from dL/da, where a = weigh(s)."""
    if NORMALIZE == "exp":
        return grad * a * LN_2
    elif NORMALIZE == "sigmoid":
        return grad * a * (a - 1) * LN_2
    else:
        return grad


@triton.constexpr_function
def pool_rows(tokens, exact):
    return tokens // 2 if exact else 16


@triton.jit
def pool_slab(p, v, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    ROWS: tl.constexpr = acc.shape[0]
    if EXACT:
        # Rows that lie 8 apart are in one thread, where products have left them.
        terms = tl.reshape(p[:, None] * v, [ROWS // 8, 2, 8, v.shape[1]])
        return acc + tl.reshape(tl.sum(terms, 1), [ROWS, v.shape[1]])
    else:
        rows = tl.broadcast_to(p.to(v.dtype)[None, :], [ROWS, v.shape[0]])
        return dot(rows, v, acc, PRECISION)


@triton.jit
def pool(p, values, acc, EXACT: tl.constexpr, PRECISION: tl.constexpr):
    """`acc` with `Σ_t p_t v_t` added, slabs `[pool_rows, size]`."""
    out = ()
    for i in tl.static_range(len(values)):
        out = out + (pool_slab(p, values[i], acc[i], EXACT, PRECISION),)
    return out


@triton.jit
def pooled(acc, EXACT: tl.constexpr):
    """What `pool` has summed up, in the first row of slabs."""
    out = ()
    for i in tl.static_range(len(acc)):
        if EXACT:
            out = out + (tl.sum(acc[i], 0)[None, :],)
        else:
            # Rows 8 apart are in one thread: half of them can be dropped there, before they move.
            halves = tl.permute(tl.reshape(acc[i], [2, 8, acc[i].shape[1]]), (1, 2, 0))
            half, _same = tl.split(halves)
            out = out + (half,)
    return out
