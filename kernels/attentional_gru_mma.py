"""attentional_gru forward in 16 bits on NVIDIA GPUs, its layouts written out: one barrier per step, two if
the reset gate comes before the product.

A warp owns 16 units of all gates, so that gates never leave the threads that compute them, and eight sequences are the
columns of the narrowest mma. Weights stay in registers. The state, rounded, and the next inputs cross shared memory in
two buffers that take turns: what a step writes, the next one reads behind the barrier between them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from .arguments import get
from .primitives import slab_count, slab_size, slab_start

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # as Triton 3.6 has it


@gluon.constexpr_function
def tile_layout(spec):
    """Of `[units, block]`: each warp has 16 units."""
    return gl.NVMMADistributedLayout([2, 0], [spec.units // 16, 1], [16, 8])


@gluon.constexpr_function
def operand_layout(index, spec):
    return gl.DotOperandLayout(index, tile_layout(spec), 2)


@gluon.constexpr_function
def unit_layout(spec):
    """Of `[units, block]` in memory: where a thread has rows g and g + 8 of a tile, it has units 2g and 2g + 1 of the
    same sequences. Two units of a sequence then are one load, one store, one packed product."""
    warps = [[16 << i, 0] for i in range(spec.units.bit_length() - 5)]
    lanes = [[0, 2], [0, 4], [2, 0], [4, 0], [8, 0]]
    return gl.DistributedLinearLayout([[1, 0], [0, 1]], lanes, warps, [], [spec.units, spec.block])


@gluon.jit
def unit_of(row):
    """The unit that a row of a tile is."""
    return row // 16 * 16 + row % 8 * 2 + row % 16 // 8


@gluon.jit
def as_units(tile, SPEC: gl.constexpr):
    """A tile, whose rows are `unit_of` it, by unit: nothing leaves its thread."""
    UNITS: gl.constexpr = get(SPEC, "units")
    BLOCK: gl.constexpr = get(SPEC, "block")
    tile = tile.reshape([UNITS // 16, 2, 8, BLOCK]).permute([0, 2, 1, 3]).reshape([UNITS, BLOCK])
    return gl.convert_layout(tile, unit_layout(SPEC))


@gluon.constexpr_function
def input_layout(spec):
    """Of the inputs on their way from memory, `[columns, block]`, four elements of a row to a thread."""
    return gl.BlockedLayout([4, 1], [spec.columns // 4, 128 // spec.columns], [1, spec.units // 16], [0, 1])


@gluon.constexpr_function
def staged_layout(columns):
    """Of `[columns, block]` in shared memory: a sequence's elements lie together, sequences are shifted so that banks
    differ."""
    return gl.SwizzledSharedLayout(8, max(1, 64 // columns), min(8, columns // 8), [0, 1])


@gluon.jit
def tanh(x):
    return gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def load_weight(pointer, gate: gl.constexpr, factor: gl.constexpr, WIDTH: gl.constexpr, SPEC: gl.constexpr):
    """A gate's third of `[3H, WIDTH]` times a factor, as slabs `[units, size]`, in the registers of its products."""
    SIZE: gl.constexpr = get(SPEC, "size")
    LAYOUT: gl.constexpr = operand_layout(0, SPEC)
    row = unit_of(gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, LAYOUT)))[:, None]
    slabs = ()
    for i in gl.static_range(slab_count(WIDTH, 64)):
        column = (
            slab_start(i, WIDTH, 64)
            + gl.arange(0, slab_size(i, WIDTH, 64), gl.SliceLayout(0, LAYOUT))[None, :]
        )
        inside = (row < SIZE) & (column < WIDTH)
        slab = gl.load(pointer + (gate * SIZE + row) * WIDTH + column, mask=inside, other=0.0)
        slabs = slabs + ((slab.to(gl.float32) * factor).to(slab.dtype),)
    return slabs


@gluon.jit
def load_bias(pointer, gate: gl.constexpr, SPEC: gl.constexpr):
    """A gate's third of `[3H]`: `[units, 1]`."""
    SIZE: gl.constexpr = get(SPEC, "size")
    unit = unit_of(gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, tile_layout(SPEC))))
    return gl.load(pointer + gate * SIZE + unit, mask=unit < SIZE, other=0.0).to(gl.float32)[:, None]


@gluon.jit
def read(buffer, WIDTH: gl.constexpr, SPEC: gl.constexpr):
    """What a buffer holds, as slabs `[size, block]`, in the registers of its products."""
    slabs = ()
    for i in gl.static_range(slab_count(WIDTH, 64)):
        slab = buffer.slice(slab_start(i, WIDTH, 64), slab_size(i, WIDTH, 64))
        slabs = slabs + (slab.load(operand_layout(1, SPEC)),)
    return slabs


@gluon.jit
def multiply(weights, operand, acc):
    """Adds weights times an operand, slab by slab."""
    for i in gl.static_range(len(weights)):
        acc = mma_v2(weights[i], operand[i], acc)
    return acc


@gluon.jit
def source(data, begin, length, t, READ: gl.constexpr, SPEC: gl.constexpr):
    """Where the inputs of step t are, if that is to be `READ`, or else where the sequence begins."""
    if READ and get(SPEC, "indexed"):
        return gl.load(data.index + begin + t, mask=t < length, other=0).to(gl.int64)
    else:
        return begin


@gluon.jit
def load_attention(data, at, begin, length, t, SPEC: gl.constexpr):
    """Of step t, whose inputs are `at`: `[block]`."""
    if get(SPEC, "weighs") and get(SPEC, "scored"):
        return gl.load(data.scores + at, mask=t < length, other=0.0).to(gl.float32)
    elif get(SPEC, "weighs"):
        return gl.load(data.scores + begin + t, mask=t < length, other=0.0).to(gl.float32)
    else:
        return gl.zeros([get(SPEC, "block")], gl.float32, gl.SliceLayout(0, unit_layout(SPEC)))


@gluon.jit
def load_inputs(data, at, begin, length, t, SPEC: gl.constexpr):
    """Of step t, whose inputs are `at`: `[columns, block]`, on their way."""
    LAYOUT: gl.constexpr = input_layout(SPEC)
    column = gl.arange(0, get(SPEC, "columns"), gl.SliceLayout(1, LAYOUT))[:, None]
    valid = t < length
    mask = valid[None, :] & (column < get(SPEC, "width"))
    if not get(SPEC, "indexed"):
        at = begin + t
    x = gl.load(data.inputs + at[None, :] * get(SPEC, "stride") + column, mask=mask, other=0.0)
    if get(SPEC, "scaled"):
        score = data.scores + at if get(SPEC, "scored") else data.scores + begin + t
        a = gl.load(score, mask=valid, other=0.0).to(gl.float32)
        x = (x.to(gl.float32) * a[None, :]).to(x.dtype)
    return x


@gluon.jit
def move_to(tz, a, SPEC: gl.constexpr):
    """How far the state moves to the candidate, where the keep gate is (tz + 1) / 2."""
    if get(SPEC, "cell") == "agru":
        return a
    elif get(SPEC, "cell") == "paper":
        return 0.5 * a - 0.5 * a * tz
    elif get(SPEC, "cell") == "official":
        return (0.5 + 0.5 * a) + (0.5 * a - 0.5) * tz
    else:
        return 0.5 - 0.5 * tz


@gluon.jit
def step(
    data, states, t, h, ahead, rows, input_rows, now, then, reset, x_now, x_then, input_weights, state_weights, biases,
    SPEC: gl.constexpr,
):  # fmt: skip
    """Step t: the state after it, and what `read_ahead` has for the step two on."""
    SIZE: gl.constexpr = get(SPEC, "size")
    WIDTH: gl.constexpr = get(SPEC, "width")
    begin, length = rows
    a, x, score_at, x_at = ahead
    x_then.store(x)
    x = load_inputs(data, x_at, input_rows[0], input_rows[1], t + 3, SPEC)
    x_at = source(data, input_rows[0], input_rows[1], t + 5, True, SPEC)
    zero = gl.zeros([get(SPEC, "units"), get(SPEC, "block")], gl.float32, tile_layout(SPEC))
    operand = read(x_now, WIDTH, SPEC)
    r = multiply(input_weights[0], operand, zero + biases[0])
    n = multiply(input_weights[2], operand, zero + biases[2])
    tz = r
    if get(SPEC, "keeps"):
        tz = multiply(input_weights[1], operand, zero + biases[1])
    operand = read(now, SIZE, SPEC)
    r = tanh(as_units(multiply(state_weights[0], operand, r), SPEC))
    if get(SPEC, "reset_after"):
        hidden = as_units(multiply(state_weights[2], operand, zero + biases[3]), SPEC)
        n = as_units(n, SPEC) + hidden + r * hidden
    else:
        reset.store((h + r * h).to(states.dtype.element_ty))
    if get(SPEC, "keeps"):
        tz = tanh(as_units(multiply(state_weights[1], operand, tz), SPEC))
    if not get(SPEC, "reset_after"):
        n = as_units(multiply(state_weights[2], read(reset, SIZE, SPEC), n), SPEC)
    n = tanh(n)
    move = move_to(tz, a[None, :], SPEC)
    h = h - move * h + move * n  # with nothing but the last product behind n
    rounded = h.to(states.dtype.element_ty)
    then.store(rounded)
    unit = gl.arange(0, get(SPEC, "units"), gl.SliceLayout(1, unit_layout(SPEC)))[:, None]
    place = states + (begin + t)[None, :] * SIZE + unit
    gl.store(place, rounded, mask=(t < length)[None, :] & (unit < SIZE))
    a = load_attention(data, score_at, begin, length, t + 2, SPEC)
    return h, (a, x, source(data, begin, length, t + 4, get(SPEC, "scored"), SPEC), x_at)


@gluon.jit
def read_ahead(data, rows, input_rows, t, SPEC: gl.constexpr):
    """Before step t: its attention, the inputs of the step behind it, and where those of the next ones are."""
    begin, length = rows
    input_begin, input_length = input_rows
    score_at = source(data, begin, length, t, get(SPEC, "scored"), SPEC)
    a = load_attention(data, score_at, begin, length, t, SPEC)
    x_at = source(data, input_begin, input_length, t + 1, True, SPEC)
    x = load_inputs(data, x_at, input_begin, input_length, t + 1, SPEC)
    score_at = source(data, begin, length, t + 2, get(SPEC, "scored"), SPEC)
    return a, x, score_at, source(data, input_begin, input_length, t + 3, True, SPEC)


@gluon.jit
def rows_of(data, SPEC: gl.constexpr, LAYOUT: gl.constexpr):
    """The program's sequences, which of them there are, where they begin, and their lengths: `[block]` each."""
    slot = gl.program_id(0) * get(SPEC, "block") + gl.arange(0, get(SPEC, "block"), gl.SliceLayout(0, LAYOUT))
    live = slot < data.batch
    sequence = gl.load(data.order + slot, mask=live, other=0).to(gl.int64)
    begin = gl.load(data.offsets + sequence, mask=live, other=0).to(gl.int64)
    end = gl.load(data.offsets + sequence + 1, mask=live, other=0).to(gl.int64)
    return sequence, live, begin, (end - begin).to(gl.int32)


@gluon.jit
def clear_slack(pointer, data, SPEC: gl.constexpr):
    """Zeroes the rows `[size]` behind the last sequence."""
    SIZE: gl.constexpr = get(SPEC, "size")
    LAYOUT: gl.constexpr = gl.SliceLayout(1, tile_layout(SPEC))
    unit = gl.arange(0, get(SPEC, "units"), LAYOUT)
    row = gl.load(data.offsets + data.batch).to(gl.int64) + gl.program_id(0)
    while row < data.rows:
        nothing = gl.zeros([get(SPEC, "units")], pointer.dtype.element_ty, LAYOUT)
        gl.store(pointer + row * SIZE + unit, nothing, mask=unit < SIZE)
        row += gl.num_programs(0)


@gluon.jit
def scan_mma_kernel(data, states, last, SPEC: gl.constexpr):
    SIZE: gl.constexpr = get(SPEC, "size")
    UNITS: gl.constexpr = get(SPEC, "units")
    BLOCK: gl.constexpr = get(SPEC, "block")
    COLUMNS: gl.constexpr = get(SPEC, "columns")
    LAYOUT: gl.constexpr = unit_layout(SPEC)
    STATE: gl.constexpr = staged_layout(UNITS)
    dtype: gl.constexpr = states.dtype.element_ty
    sequence, live, begin, length = rows_of(data, SPEC, LAYOUT)
    _, _, input_begin, input_length = rows_of(data, SPEC, input_layout(SPEC))
    clear_slack(states, data, SPEC)
    unit = gl.arange(0, UNITS, gl.SliceLayout(1, LAYOUT))[:, None]
    kept = live[None, :] & (unit < SIZE)
    place = sequence[None, :] * SIZE + unit
    start = gl.zeros([UNITS, BLOCK], dtype, LAYOUT)
    if get(SPEC, "initial"):
        start = gl.load(data.initial + place, mask=kept, other=0.0)
    # Sigmoid is tanh in other clothes: half of r and z, and half of what r scales.
    input_weights = ()
    state_weights = ()
    for gate in gl.static_range(3):
        input_weights = input_weights + (
            load_weight(data.weight_ih, gate, 0.5 if gate < 2 else 1.0, get(SPEC, "width"), SPEC),
        )
        state_weights = state_weights + (load_weight(data.weight_hh, gate, 0.5, SIZE, SPEC),)
    candidate = load_bias(data.bias_ih, 2, SPEC)
    hidden = load_bias(data.bias_hh, 2, SPEC)
    if not get(SPEC, "reset_after"):
        candidate += hidden
    biases = (
        0.5 * (load_bias(data.bias_ih, 0, SPEC) + load_bias(data.bias_hh, 0, SPEC)),
        0.5 * (load_bias(data.bias_ih, 1, SPEC) + load_bias(data.bias_hh, 1, SPEC)),
        candidate,
        0.5 * hidden,
    )
    even = gl.allocate_shared_memory(dtype, [UNITS, BLOCK], STATE)
    odd = gl.allocate_shared_memory(dtype, [UNITS, BLOCK], STATE)
    reset = even  # what the reset gate leaves of a state
    if not get(SPEC, "reset_after"):
        reset = gl.allocate_shared_memory(dtype, [UNITS, BLOCK], STATE)
    x_even = gl.allocate_shared_memory(dtype, [COLUMNS, BLOCK], staged_layout(COLUMNS))
    x_odd = gl.allocate_shared_memory(dtype, [COLUMNS, BLOCK], staged_layout(COLUMNS))
    rows = (begin, length)
    input_rows = (input_begin, input_length)
    x_at = source(data, input_begin, input_length, 0, True, SPEC)
    x_even.store(load_inputs(data, x_at, input_begin, input_length, 0, SPEC))
    ahead0 = read_ahead(data, rows, input_rows, 0, SPEC)
    ahead1 = read_ahead(data, rows, input_rows, 1, SPEC)
    even.store(start)
    barrier()  # here, as else the compiler puts a third into the loop
    h = start.to(gl.float32)
    for t in range(0, gl.max(length, 0), 2):
        h, ahead0 = step(
            data, states, t, h, ahead0, rows, input_rows, even, odd, reset, x_even, x_odd, input_weights,
            state_weights, biases, SPEC,
        )  # fmt: skip
        h, ahead1 = step(
            data, states, t + 1, h, ahead1, rows, input_rows, odd, even, reset, x_odd, x_even, input_weights,
            state_weights, biases, SPEC,
        )  # fmt: skip
    # A thread reads what it has written itself.
    ended = gl.load(
        states + (begin + length - 1)[None, :] * SIZE + unit, mask=kept & (length > 0)[None, :], other=0.0
    )
    gl.store(last + place, gl.where((length > 0)[None, :], ended, start), mask=kept)
