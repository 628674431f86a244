"""activation_unit backward: a kernel for the gradients of the tokens, one for those of the weights.

Both compute the scores again. Given the log-sum-exp of a sequence its tokens are independent, so nothing passes
from tile to tile but sums. Weight gradients are summed per program, then over programs in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .mlp import (
    backpropagate,
    effective_layer,
    load_layers,
    load_matrix,
    load_slopes,
    load_units,
    narrowest,
    run_layers,
    score,
    widest,
)
from .primitives import (
    LN_2,
    LOG2_E,
    add_matrix,
    column_sums,
    dot,
    exp2,
    load_rows,
    load_vector,
    outer_sum,
    scale_columns,
    slab_count,
    slab_size,
    store_column,
    store_rows,
    zero_columns,
    zero_matrix,
)
from .schedule import find_sequence, rows_per_program


@triton.jit
def attention_backward(
    s, v, grad_out, grad_scores, delta, lse, valid, SOFTMAX: tl.constexpr, APPROX: tl.constexpr
):
    """The attention a and dL/ds, `[L]`, from the scores s; both zero where a row is not valid."""
    grad = grad_scores
    for i in tl.static_range(len(v)):
        grad += tl.sum(v[i].to(tl.float32) * grad_out[i].to(tl.float32)[None, :], 1)
    if SOFTMAX:
        a = tl.where(valid, exp2(s - lse, APPROX), 0.0)
        return a, a * (grad - delta) * LN_2
    else:
        return tl.where(valid, s, 0.0), tl.where(valid, grad, 0.0)


@triton.jit
def _backward_tokens_kernel(
    query,
    keys,
    values,
    offsets,
    first_bias,
    key_weight,
    product_weight,
    weights,
    biases,
    slopes,
    last_weight,
    last_bias,
    grad_out,
    grad_scores,
    delta,
    lse,
    grad_keys,
    grad_values,
    grad_first,
    part,
    grad_key_weight,
    grad_product_weight,
    batch,
    query_stride,
    keys_stride,
    values_stride,
    D: tl.constexpr,
    DV: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SEPARATE_VALUES: tl.constexpr,
    GRAD_SCORES: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROX: tl.constexpr,
    BLOCK: tl.constexpr,
    SLABS: tl.constexpr,
    WIDEST: tl.constexpr,
    LEAST_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dL/dk and dL/dv per token; dL/dq (but for its way through c) and dL/dc per sequence, side by side in
    grad_first `[B, D + H1]`; the gradients of the first layer's key and product per program."""
    program = tl.program_id(0)
    total = tl.load(offsets + batch)
    share = rows_per_program(total, tl.num_programs(0), LEAST_ROWS)
    begin = program.to(total.dtype) * share
    end = tl.minimum(begin + share, total)
    if begin >= end:
        return
    H1: tl.constexpr = HIDDEN[0]
    H1_WIDEST: tl.constexpr = widest(0, HIDDEN, SLABS)
    DTYPE: tl.constexpr = key_weight.dtype.element_ty
    sequence = find_sequence(offsets, batch, begin)
    layers = load_layers(weights, biases, HIDDEN, SLABS)
    slope = load_slopes(slopes, HIDDEN, SLABS, ACTIVATION)
    w = load_units(last_weight, len(HIDDEN) - 1, HIDDEN, SLABS)
    b = tl.load(last_bias)
    token = tl.arange(0, BLOCK)
    fresh = True
    while begin < end:
        first_row = tl.load(offsets + sequence)
        last_row = tl.load(offsets + sequence + 1)
        stop = tl.minimum(last_row, end)
        if begin < stop:
            owner = sequence.to(tl.int64)
            q = load_vector(query + owner * query_stride, D, WIDEST)
            g = load_vector(grad_out + owner * DV, DV, WIDEST)
            c = first_bias + owner * H1
            first = effective_layer(key_weight, product_weight, c, q, D, WIDEST, HIDDEN, SLABS, APPROX)
            log_mass = tl.load(lse + sequence) * LOG2_E
            shared_grad = tl.load(delta + sequence)
            moment = zero_matrix(H1, H1_WIDEST, D, WIDEST)  # Σ_t dL/dz1_t k_tᵀ, the gradient of W_eff
            grad_c = zero_columns(H1, H1_WIDEST)
            for start in tl.range(begin, stop, BLOCK, num_stages=STAGES):
                valid = token < (stop - start)
                row = start.to(tl.int64)
                k = load_rows(keys + row * keys_stride, token, keys_stride, valid, D, WIDEST)
                v = k
                if SEPARATE_VALUES:
                    v = load_rows(values + row * values_stride, token, values_stride, valid, DV, WIDEST)
                grad_a = tl.zeros([BLOCK], tl.float32)
                if GRAD_SCORES:
                    grad_a += tl.load(grad_scores + start + token, mask=valid, other=0.0)
                zs, hs = run_layers(k, first, layers, slope, ACTIVATION, APPROX, PRECISION)
                s = score(hs[len(HIDDEN) - 1], w, b)  # [BLOCK]
                a, ds = attention_backward(s, v, g, grad_a, shared_grad, log_mass, valid, SOFTMAX, APPROX)
                _, dzs = backpropagate(ds, w, layers, zs, hs, slope, ACTIVATION, APPROX, PRECISION)
                dz = dzs[len(HIDDEN) - 1]  # of the first layer
                if SEPARATE_VALUES:
                    dv = outer_product(a, g)
                    store_rows(grad_values + row * DV, dv, token, DV, valid, DV, WIDEST)
                    dk = zero_matrix(BLOCK, BLOCK, D, WIDEST)
                else:
                    dk = outer_product(a, g)
                dk = times_weight(dz, first[0], dk, PRECISION)
                store_rows(grad_keys + row * D, dk, token, D, valid, D, WIDEST)
                moment = outer_sum(dz, k, moment, PRECISION)
                grad_c = column_sums(dz, grad_c, DTYPE, PRECISION)
            whole = (begin == first_row) & (stop == last_row)
            slot = 2 * program + (begin == first_row).to(tl.int32)
            target = tl.where(whole, grad_first + owner * (D + H1), part + slot.to(tl.int64) * (D + H1))
            product = load_matrix(product_weight, H1, H1_WIDEST, 16, D, WIDEST)
            store_vector(target, column_dot(product, moment, len(q)), D, WIDEST)
            store_column(target + D, grad_c, H1, H1_WIDEST)
            offset = program.to(tl.int64) * (H1 * D)
            add_matrix(grad_key_weight + offset, moment, fresh, H1, H1_WIDEST, D, WIDEST)
            add_matrix(grad_product_weight + offset, scale_columns(moment, q), fresh, H1, H1_WIDEST, D, WIDEST)
            fresh = False
        begin = stop
        sequence += 1


@triton.jit
def _backward_weights_kernel(
    query,
    keys,
    values,
    offsets,
    first_bias,
    key_weight,
    product_weight,
    weights,
    biases,
    slopes,
    last_weight,
    last_bias,
    grad_out,
    grad_scores,
    delta,
    lse,
    grad_weights,
    grad_biases,
    grad_slopes,
    grad_last_weight,
    grad_last_bias,
    batch,
    query_stride,
    keys_stride,
    values_stride,
    D: tl.constexpr,
    DV: tl.constexpr,
    HIDDEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SEPARATE_VALUES: tl.constexpr,
    GRAD_SCORES: tl.constexpr,
    GRAD_SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
    APPROX: tl.constexpr,
    BLOCK: tl.constexpr,
    SLABS: tl.constexpr,
    WIDEST: tl.constexpr,
    LEAST_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of the layers behind the first, and of every slope, per program."""
