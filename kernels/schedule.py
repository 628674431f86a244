"""The balanced schedule: every program takes the same number of rows, wherever sequences begin and end.

Program p takes the rows `[p·share, (p+1)·share)`. A sequence that a program sees only part of is *cut*. Its parts
go to slots, two per program: 2p for a sequence that another program began, 2p + 1 for one that it began itself.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rows_per_program(total, programs, LEAST: tl.constexpr):
    return tl.maximum(tl.cdiv(total, programs), LEAST)


@triton.jit
def find_sequence(offsets, batch, row):
    """The last sequence that begins at or before `row`, 255 probes at a time: two rounds serve 65 536."""
    low = batch * 0
    span = batch
    while span > 1:
        step = tl.cdiv(span, 256)
        probe = low + (1 + tl.arange(0, 256)) * step
        begin = tl.load(offsets + probe, mask=probe < low + span, other=row + 1)
        skipped = tl.sum((begin <= row).to(tl.int32))
        low += skipped * step
        span = tl.minimum(step, span - skipped * step)
    return low


@triton.jit
def slot_of(program, begin, stop, first_row, last_row):
    """Where the rows from begin to stop of a sequence go: the slot of a part, or -1 if they are all of it."""
    whole = (begin == first_row) & (stop == last_row)
    return tl.where(whole, -1, 2 * program + (begin == first_row).to(tl.int32))


@triton.jit(do_not_specialize=["batch", "programs"])
def _merge_kernel(
    part,
    part_state,
    offsets,
    out,
    peak_mass,
    places,
    batch,
    programs,
    WIDTH: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    PLACED: tl.constexpr,
    LEAST_ROWS: tl.constexpr,
):
    """One program per boundary between two programs, and per lane. It works if the sequence that the boundary cuts
    began in the program before, so that each cut sequence is joined once, its parts in order."""
    program = tl.program_id(0) + 1
    lane = tl.program_id(1)
    part += lane * 2 * programs * WIDTH
    part_state += lane * 4 * programs
    total = tl.load(offsets + batch)
    share = rows_per_program(total, programs, LEAST_ROWS)
    row = program.to(tl.int64) * share
    if row >= total:
        return
    sequence = find_sequence(offsets, batch, row)
    first_row = tl.load(offsets + sequence)
    last_row = tl.load(offsets + sequence + 1)
    first = sequence.to(tl.int64)
    last = first + 1
    if PLACED:
        first = tl.load(places[0] + sequence) + lane
        last = tl.load(places[1] + sequence)
    if (first_row == row) | (first_row < row - share) | (first >= last):
        return
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    kept = inside & (column < (last - first) * ROW)
    slot = 2 * program - 1
    acc = tl.load(part + slot * WIDTH + column, mask=inside, other=0.0)  # [BLOCK]
    if SOFTMAX:
        peak = tl.load(part_state + 2 * slot)
        mass = tl.load(part_state + 2 * slot + 1)
    while row < last_row:
        slot = 2 * program
        term = tl.load(part + slot * WIDTH + column, mask=inside, other=0.0)
        if SOFTMAX:
            term_peak = tl.load(part_state + 2 * slot)
            higher = tl.maximum(peak, term_peak)
            factor = tl.exp2(peak - higher)
            term_factor = tl.exp2(term_peak - higher)
            mass = mass * factor + tl.load(part_state + 2 * slot + 1) * term_factor
            acc = acc * factor + term * term_factor
            peak = higher
        else:
            acc += term
        program += 1
        row += share
    if SOFTMAX:
        acc /= mass
        tl.store(peak_mass + 2 * first, peak)
        tl.store(peak_mass + 2 * first + 1, mass)
    tl.store(out + first * ROW + column, acc.to(out.dtype.element_ty), mask=kept)


def merge(
    part: Tensor,
    part_state: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    peak_mass: Tensor,
    programs: int,
    least_rows: int,
    places: tuple[Tensor, Tensor] | None = None,
    lanes: int = 1,
) -> None:
    """Joins the parts `[2·programs, width]` of cut sequences into their rows of `out [B, width]`: sums, or with
    each part's `(maximum, sum)` of exponentials in base 2, the softmax's average and,
    in `peak_mass [B, 2]`, the same of it all.

    With `places`, `[B]` each, a sequence goes to the rows of `out` from its first to before its second place, as far as
    a part is wide; with `lanes`, `part [lanes, 2·programs, width]`, lane i begins i rows further on.
    """
    if programs == 1:
        return
    width = part.shape[1]
    _merge_kernel[(programs - 1, lanes)](
        part,
        part if part_state is None else part_state,
        offsets,
        out,
        peak_mass,
        (offsets, offsets) if places is None else places,
        offsets.numel() - 1,
        programs,
        WIDTH=width,
        ROW=out.shape[1],
        BLOCK=triton.next_power_of_2(width),
        SOFTMAX=part_state is not None,
        PLACED=places is not None,
        LEAST_ROWS=least_rows,
        num_warps=1,
    )
