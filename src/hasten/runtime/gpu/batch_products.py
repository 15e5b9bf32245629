"""Triton kernels for the linear layers of a decode step of 2 to 64 rows, each with all that follows it.

One program multiplies `ROWS` rows of a weight matrix [N, K] with all `M` rows of the batch: every weight is
read once. `tl.dot(weights, inputs)` has the weights on its first side, since that side must have 64 rows for
Hopper's `wgmma`, and a batch of 16 has not. Small matrices need more programs than they have tiles: `SPLITS`
programs share a tile, each takes a part of K, and the last to finish adds their sums in the order of K. No
sum depends on timing, on other rows or on a row's place: a row's result is the same in any company.

What follows a product is done in the same program, so a layer is five kernels, not twelve: a launch costs
about 1.3 us, and a layer of Qwen3-0.6B at 16 rows has 45 us.

- The norm before a product needs the whole row. What writes a row therefore writes it times the norm's
  weight, in bf16, with the sum of its squares in each tile; the product's result is multiplied with 1 / rms.
- fp8: inputs are rounded to e4m3 with one scale a row. What writes a row takes its largest magnitude (an
  atomic maximum does not depend on order). Up to 16 rows the product rounds its inputs itself; above, the
  tensor cores would wait for that (97 us a layer of an 8B model, not 88), so `quantise` rounds them once.
  A scale for each 128 inputs would need no maximum of a row, but a sum to wait for every 128 columns: it was
  slower at 16 rows and at 64.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import triton
import triton.language as tl

from hasten.runtime.gpu.peers import await_pairs, best_of_ranks, push_pairs
from hasten.runtime.gpu.shape import E4M3_MAX

LARGEST = tl.constexpr(E4M3_MAX)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Programmatic dependent launch: this kernel may have started while the one before it was ending.

    PDL: 0 is off; 1 starts programs as soon as those before have ended (0.5 to 3 % of a step); 2 lets them
    start before that, to prefetch. Small matrices gain by 2 (0.6B at 16 rows: 8 % of a step), large ones
    lose 3 %.
    """
    if PDL > 0:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """From here on nothing large is read: the next kernel's programs may take the memory's time."""
    if PDL > 1:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Bring the 128-byte lines that hold these addresses into the L2."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_weights(w, rows, column, K: tl.constexpr, PDL: tl.constexpr):
    """The first 512 bytes of each row from `column`, before this kernel may read what the last one wrote."""
    if PDL > 1:
        line: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
        columns = tl.minimum(column + tl.arange(0, 4) * line, K - 1)
        prefetch(w + rows.to(tl.int64)[:, None] * K + columns[None, :])


@triton.jit
def to_e4m3_factor(peaks, m):
    """What the rows' inputs are multiplied with before rounding to e4m3, [M]; 1 for a row of zeros."""
    largest = tl.load(peaks + m).to(tl.float32, bitcast=True)
    return tl.where(largest > 0, LARGEST / largest, 1.0)


@triton.jit
def first_column(split, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a split's part of K begins: at whole blocks."""
    return split * (K // BLOCK) // SPLITS * BLOCK


@triton.jit
def read_weights(w, rows, k, K: tl.constexpr):
    return tl.load(w + rows.to(tl.int64)[:, None] * K + k[None, :], eviction_policy="evict_first")


@triton.jit
def read_inputs(x, peaks, block, K: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr):
    """Inputs [BLOCK, M] of one block of columns; ROUND: bf16 becomes e4m3 on its way."""
    m, k = tl.arange(0, M), block * BLOCK + tl.arange(0, BLOCK)
    inputs = tl.load(x + m[None, :] * K + k[:, None])
    if ROUND:
        inputs = (inputs.to(tl.float32) * to_e4m3_factor(peaks, m)[None, :]).to(tl.float8e4nv)
    return inputs


@triton.jit
def one_product(w, x, peaks, rows, split, K: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
                BLOCK: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """Rows `rows` of w times all inputs over this split's part of K: float32 [ROWS, M]."""
    k = tl.arange(0, BLOCK)
    blocks: tl.constexpr = K // BLOCK
    acc = tl.zeros([ROWS, M], tl.float32)
    for i in range(split * blocks // SPLITS, (split + 1) * blocks // SPLITS):
        inputs = read_inputs(x, peaks, i, K, BLOCK, M, ROUND)
        acc = tl.dot(read_weights(w, rows, i * BLOCK + k, K), inputs, acc)
    return acc


@triton.jit
def two_products(w, x, peaks, first, second, split, K: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr,
                 BLOCK: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr):  # fmt: skip
    """The same for two sets of rows that are needed together: halves of a head, gate and up.

    Sets of less than 64 rows are multiplied as one, or they would not fill an instruction.
    """
    if ROWS < 64:
        both = one_product(
            w, x, peaks, tl.interleave(first, second), split, K, SPLITS, 2 * ROWS, BLOCK, M, ROUND
        )
        a, b = tl.split(tl.permute(tl.reshape(both, [ROWS, 2, M]), [0, 2, 1]))
    else:
        k = tl.arange(0, BLOCK)
        blocks: tl.constexpr = K // BLOCK
        a, b = tl.zeros([ROWS, M], tl.float32), tl.zeros([ROWS, M], tl.float32)
        for i in range(split * blocks // SPLITS, (split + 1) * blocks // SPLITS):
            inputs = read_inputs(x, peaks, i, K, BLOCK, M, ROUND)
            a = tl.dot(read_weights(w, first, i * BLOCK + k, K), inputs, a)
            b = tl.dot(read_weights(w, second, i * BLOCK + k, K), inputs, b)
    return a, b


@triton.jit
def write_part(parts, acc, index, ROWS: tl.constexpr, M: tl.constexpr):
    n, m = tl.arange(0, ROWS), tl.arange(0, M)
    tl.store(parts + index * (ROWS * M) + n[:, None] * M + m[None, :], acc)


@triton.jit
def add_parts(parts, index, STRIDE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr):
    """The sum of a tile's splits, in order; read past the L1: other multiprocessors wrote them."""
    n, m = tl.arange(0, ROWS), tl.arange(0, M)
    place = parts + index * (ROWS * M) + n[:, None] * M + m[None, :]
    acc = tl.load(place, cache_modifier=".cg")
    for s in tl.static_range(1, SPLITS):
        acc += tl.load(place + s * STRIDE * ROWS * M, cache_modifier=".cg")
    return acc


@triton.jit
def is_last(arrivals, count):
    """Whether count - 1 programs have written before this one. The last sets the counter back to 0."""
    tl.debug_barrier()  # every thread's part is written before one of them counts
    last = tl.atomic_add(arrivals, 1, sem="acq_rel") == count - 1
    if last:
        tl.store(arrivals, 0)
    return last


@triton.jit
def inverse_rms(
    squares, m, K: tl.constexpr, eps, SQUARES: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr
):
    """1 / rms of each row, [M], from SQUARES tiles' sums of squares."""
    t = tl.arange(0, BLOCK)[:, None]
    tiles = tl.load(squares + t * M + m[None, :], mask=t < SQUARES, other=0.0)
    return tl.rsqrt(tl.sum(tiles, 0) / K + eps)


@triton.jit
def unscaled(acc, scales, peaks, rows, m):
    """Sums of e4m3 products [ROWS, M] in the units of weights and inputs; bf16 has no scales."""
    if scales is not None:
        acc = acc * tl.load(scales + rows)[:, None] / to_e4m3_factor(peaks, m)[None, :]
    return acc


@triton.jit
def put_inputs(to, peaks, values, at, inside, m):
    """A tile [ROWS, M] of the next product's inputs, bf16. fp8: peaks[m] is raised to its largest."""
    rounded = values.to(tl.bfloat16)
    tl.store(to + at, rounded, mask=inside)
    if peaks is not None:  # floats of one sign order like integers
        largest = tl.max(tl.where(inside, tl.abs(rounded.to(tl.float32)), 0.0), 0)
        tl.atomic_max(peaks + m, largest.to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def quantise(x, peaks, out, K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Inputs of a product rounded to e4m3, [M, K]. Grid: (rows, blocks of K)."""
    row, k = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    inside = k < K
    value = tl.load(x + row * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * K + k, (value * to_e4m3_factor(peaks, row)).to(tl.float8e4nv), mask=inside)


# ---- queries, keys, values -------------------------------------------------------------------------


@triton.jit
def look_up(positions, table, cos, sin, cos_now, sin_now, places, TABLE: tl.constexpr, HALF_D: tl.constexpr,
            BLOCK: tl.constexpr, PAGE: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Once a step what every layer needs of a row's position. Grid: (rows,).

    cos_now, sin_now [M, D/2]: the row's angles; places [M]: page * PAGE + token in it, -1 for a row without a
    sequence. A layer's kernel then has one load to wait for, not position, then page, then angle.
    """
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    position = tl.load(positions + row)
    at = tl.maximum(position, 0)
    inside = i < HALF_D
    tl.store(cos_now + row * HALF_D + i, tl.load(cos + at * HALF_D + i, mask=inside, other=0.0), mask=inside)
    tl.store(sin_now + row * HALF_D + i, tl.load(sin + at * HALF_D + i, mask=inside, other=0.0), mask=inside)
    place = tl.load(table + row * TABLE + at // PAGE) * PAGE + at % PAGE
    tl.store(places + row, tl.where(position >= 0, place, -1))


@triton.jit
def in_int8(a, b, AXIS: tl.constexpr):
    """Both halves of keys or values as int8, and the scale of each: 1 / 127 of its largest magnitude."""
    peak = tl.maximum(tl.max(tl.abs(a), AXIS), tl.max(tl.abs(b), AXIS))
    factor = tl.expand_dims(tl.where(peak > 0, 127.0 / peak, 0.0), AXIS)
    return tl.floor(a * factor + 0.5).to(tl.int8), tl.floor(b * factor + 0.5).to(tl.int8), peak / 127.0


@triton.jit
def place_head(a, b, h, places, cos, sin, q_norm, k_norm, queries, keys, values, key_scales, value_scales,
               key_shift, eps, live, HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr,
               HALF: tl.constexpr, PAGE: tl.constexpr, SLAB: tl.constexpr, M: tl.constexpr,
               QK_NORM: tl.constexpr):  # fmt: skip
    """Norm, rotate and store one head. a: its dimensions 0 to D/2, b: the others, [HALF, M] each."""
    i, m = tl.arange(0, HALF), tl.arange(0, M)
    inside = (i < D // 2)[:, None]
    place = tl.load(places + m, mask=m < live, other=-1)
    if h < HEADS + KV:
        if QK_NORM:
            gamma = q_norm
            if h >= HEADS:
                gamma = k_norm
            r = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / D + eps)[None, :]
            a = a * r * tl.load(gamma + i, mask=i < D // 2, other=0.0)[:, None]
            b = b * r * tl.load(gamma + D // 2 + i, mask=i < D // 2, other=0.0)[:, None]
        angle = m[None, :] * (D // 2) + i[:, None]
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        a, b = a * c - b * s, b * c + a * s
        if key_shift is not None:
            shift = key_shift + tl.maximum(h - HEADS, 0) * D + i
            of_key = tl.where(h >= HEADS, 1.0, 0.0)
            a -= of_key * tl.load(shift, mask=i < D // 2, other=0.0)[:, None]
            b -= of_key * tl.load(shift + D // 2, mask=i < D // 2, other=0.0)[:, None]
    if h < HEADS:
        query = queries + m.to(tl.int64)[None, :] * (HEADS * D) + h * D + i[:, None]
        wanted = inside & (m >= 0)[None, :]
        tl.store(query, a.to(tl.bfloat16), mask=wanted)
        tl.store(query + D // 2, b.to(tl.bfloat16), mask=wanted)
    else:
        at = tl.maximum(place, 0).to(tl.int64)
        slab = (at // PAGE * KV + (h - HEADS) % KV) * SLAB
        cache = keys
        if h >= HEADS + KV:
            cache = values
        to = cache + (slab + at % PAGE * D)[None, :] + i[:, None]
        stored = inside & (place >= 0)[None, :]  # a row without a sequence has no page
        if key_scales is None:
            tl.store(to, a.to(tl.bfloat16), mask=stored)
            tl.store(to + D // 2, b.to(tl.bfloat16), mask=stored)
        else:
            low, high, scale = in_int8(a, b, 0)
            scales = key_scales
            if h >= HEADS + KV:
                scales = value_scales
            tl.store(to, low, mask=stored)
            tl.store(to + D // 2, high, mask=stored)
            tl.store(scales + slab // 4 + at % PAGE, scale, mask=place >= 0)


@triton.jit
def project_qkv(w, x, peaks, scales, bias, squares, parts, arrivals, places, cos, sin, q_norm, k_norm,
                queries, keys, values, key_scales, value_scales, key_shift, eps, live, E: tl.constexpr,
                HEADS: tl.constexpr, KV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
                PAGE: tl.constexpr, SLAB: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
                M: tl.constexpr,
                SQUARES: tl.constexpr, SQUARES_BLOCK: tl.constexpr,
                QK_NORM: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Norm, product, bias, q/k norm, rotation; queries to [M, H, D], keys and values into their pages.

    A tile is one head, in two halves, because a rotation pairs dimension i with i + D/2.
    Grid: (H + 2 K heads, SPLITS).
    """
    h, split = tl.program_id(0), tl.program_id(1)
    i, m = tl.arange(0, HALF), tl.arange(0, M)
    half = tl.minimum(i, D // 2 - 1)  # past the head's end: rows that exist, whose results nobody stores
    first = h * D + half
    column = first_column(split, E, SPLITS, BLOCK)
    prefetch_weights(w, first, column, E, PDL)
    prefetch_weights(w, first + D // 2, column, E, PDL)
    wait_for_previous(PDL)
    a, b = two_products(w, x, peaks, first, first + D // 2, split, E, SPLITS, HALF, BLOCK, M, ROUND)
    let_next_start(PDL)
    done = True
    if SPLITS > 1:
        heads: tl.constexpr = HEADS + 2 * KV
        write_part(parts, a, (split * heads + h) * 2, HALF, M)
        write_part(parts, b, (split * heads + h) * 2 + 1, HALF, M)
        done = is_last(arrivals + h, SPLITS)
    if done:
        if SPLITS > 1:
            a = add_parts(parts, h * 2, heads * 2, SPLITS, HALF, M)
            b = add_parts(parts, h * 2 + 1, heads * 2, SPLITS, HALF, M)
        scale = inverse_rms(squares, m, E, eps, SQUARES, M, SQUARES_BLOCK)[None, :]
        a = unscaled(a, scales, peaks, first, m) * scale
        b = unscaled(b, scales, peaks, first + D // 2, m) * scale
        if bias is not None:
            a += tl.load(bias + first)[:, None]
            b += tl.load(bias + first + D // 2)[:, None]
        inside = (i < D // 2)[:, None]
        place_head(tl.where(inside, a, 0.0), tl.where(inside, b, 0.0), h, places, cos, sin, q_norm, k_norm,
                   queries, keys, values, key_scales, value_scales, key_shift, eps, live, HEADS, KV, D, HALF,
                   PAGE, SLAB, M, QK_NORM)  # fmt: skip


# ---- what is added to the residual: o and down -----------------------------------------------------


@triton.jit
def add_to_residual(y, n, m, tile, residual, gamma, hidden, squares, next_peaks, E: tl.constexpr,
                    M: tl.constexpr):  # fmt: skip
    """residual += y; hidden = residual * gamma for the next product; sums of squares."""
    inside = (n < E)[:, None]
    at = m[None, :] * E + n[:, None]
    x = tl.load(residual + at, mask=inside, other=0.0) + y
    tl.store(residual + at, x, mask=inside)
    tl.store(squares + tile * M + m, tl.sum(tl.where(inside, x * x, 0.0), 0))
    scaled = x * tl.load(gamma + n, mask=n < E, other=0.0)[:, None]
    put_inputs(hidden, next_peaks, scaled, at, inside, m)


@triton.jit(do_not_specialize=["live", "place"])
def project_residual(w, x, peaks, scales, bias, parts, arrivals, residual, gamma, hidden, squares, next_peaks,
                     plain, peers, turn, live, place, K: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr,
                     BLOCK: tl.constexpr, SPLITS: tl.constexpr, M: tl.constexpr, ROUND: tl.constexpr,
                     RANKS: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Product, bias, residual, and what the next norm needs; or, where `plain` is given, the product alone.

    `plain` (float32 [M, E]) is for models that norm this product before they add it: `norm_and_add` follows.
    It follows too where RANKS GPUs have a part of the product each: the `live` rows of this one go to `peers`
    as words (hasten.runtime.gpu.peers), with the tag of this `place` of the PLACES of a step.
    Grid: (tiles of E, SPLITS).
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    n, m = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, M)
    rows = tl.minimum(n, E - 1) if E % ROWS else n
    prefetch_weights(w, rows, first_column(split, K, SPLITS, BLOCK), K, PDL)
    wait_for_previous(PDL)
    acc = one_product(w, x, peaks, rows, split, K, SPLITS, ROWS, BLOCK, M, ROUND)
    let_next_start(PDL)
    done = True
    tiles: tl.constexpr = (E + ROWS - 1) // ROWS
    if SPLITS > 1:
        write_part(parts, acc, split * tiles + tile, ROWS, M)
        done = is_last(arrivals + tile, SPLITS)
    if done:
        if SPLITS > 1:
            acc = add_parts(parts, tile, tiles, SPLITS, ROWS, M)
        acc = unscaled(acc, scales, peaks, rows, m)
        if bias is not None:
            acc += tl.load(bias + rows)[:, None]
        if peers is not None:
            push_pairs(peers, acc, tile, live, tl.load(turn) * PLACES + place, E, ROWS, M, RANKS)
        elif plain is not None:
            tl.store(plain + m[None, :] * E + n[:, None], acc, mask=(n < E)[:, None])
        else:
            add_to_residual(acc, n, m, tile, residual, gamma, hidden, squares, next_peaks, E, M)


@triton.jit(do_not_specialize=["place"])
def norm_and_add(y, words, stop, turn, place, post_gamma, residual, gamma, hidden, squares, next_peaks, eps,
                 E: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, RANKS: tl.constexpr,
                 RANKS_BLOCK: tl.constexpr, PLACES: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """residual += y, or norm(y) * post_gamma where it is given, and what the next norm needs. Grid: (rows,).

    y is float32 [M, E], or where `words` are given what all ranks sent with the tag of this place.
    """
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    inside = k < E
    x = tl.load(residual + row * E + k, mask=inside, other=0.0)
    if words is not None:
        v = await_pairs(words, stop, tl.load(turn) * PLACES + place, row, E, BLOCK // 2, STRIDE, RANKS,
                        RANKS_BLOCK)  # fmt: skip
    else:
        v = tl.load(y + row * E + k, mask=inside, other=0.0)
    if post_gamma is not None:
        v = v * tl.rsqrt(tl.sum(v * v, 0) / E + eps) * tl.load(post_gamma + k, mask=inside, other=0.0)
    put_row(x + v, row, residual, gamma, hidden, squares, next_peaks, E, BLOCK)


@triton.jit
def put_row(x, row, residual, gamma, hidden, squares, peaks, E: tl.constexpr, BLOCK: tl.constexpr):
    """One whole row of the residual stream, and what the next norm needs: one sum of squares."""
    k = tl.arange(0, BLOCK)
    inside = k < E
    tl.store(residual + row * E + k, x, mask=inside)
    tl.store(squares + row, tl.sum(x * x, 0))
    scaled = (x * tl.load(gamma + k, mask=inside, other=0.0)).to(tl.bfloat16)
    tl.store(hidden + row * E + k, scaled, mask=inside)
    if peaks is not None:
        tl.store(peaks + row, tl.max(tl.abs(scaled.to(tl.float32)), 0).to(tl.int32, bitcast=True))


# ---- gate and up -----------------------------------------------------------------------------------


@triton.jit
def activate(gate, up, GELU: tl.constexpr):
    if GELU:  # the tanh form; tanh(z) = 1 - 2 / (exp(2 z) + 1)
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0)) * up
    else:
        return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def project_gate_up(w, x, peaks, scales, bias, squares, parts, arrivals, out, next_peaks, eps,
                    E: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                    SPLITS: tl.constexpr, M: tl.constexpr, SQUARES: tl.constexpr, SQUARES_BLOCK: tl.constexpr,
                    GELU: tl.constexpr, ROUND: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Norm, both products, activation: bf16 [M, F]. Grid: (tiles of F, SPLITS)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    n, m = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, M)
    rows = tl.minimum(n, F - 1) if F % ROWS else n
    column = first_column(split, E, SPLITS, BLOCK)
    prefetch_weights(w, rows, column, E, PDL)
    prefetch_weights(w, rows + F, column, E, PDL)
    wait_for_previous(PDL)
    gate, up = two_products(w, x, peaks, rows, rows + F, split, E, SPLITS, ROWS, BLOCK, M, ROUND)
    let_next_start(PDL)
    done = True
    tiles: tl.constexpr = (F + ROWS - 1) // ROWS
    if SPLITS > 1:
        write_part(parts, gate, (split * tiles + tile) * 2, ROWS, M)
        write_part(parts, up, (split * tiles + tile) * 2 + 1, ROWS, M)
        done = is_last(arrivals + tile, SPLITS)
    if done:
        if SPLITS > 1:
            gate = add_parts(parts, tile * 2, tiles * 2, SPLITS, ROWS, M)
            up = add_parts(parts, tile * 2 + 1, tiles * 2, SPLITS, ROWS, M)
        scale = inverse_rms(squares, m, E, eps, SQUARES, M, SQUARES_BLOCK)[None, :]
        gate = unscaled(gate, scales, peaks, rows, m) * scale
        up = unscaled(up, scales, peaks, rows + F, m) * scale
        if bias is not None:
            gate += tl.load(bias + rows)[:, None]
            up += tl.load(bias + rows + F)[:, None]
        at, inside = m[None, :] * F + n[:, None], (n < F)[:, None]
        put_inputs(out, next_peaks, activate(gate, up, GELU), at, inside, m)


# ---- the head --------------------------------------------------------------------------------------


@triton.jit
def project_head(w, x, peaks, scales, squares, logits, best, best_id, eps, softcap, E: tl.constexpr,
                 V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr,
                 SQUARES: tl.constexpr, SQUARES_BLOCK: tl.constexpr, SOFTCAP: tl.constexpr,
                 ROUND: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Norm, product, soft-cap; each tile's best logit and its id (the lowest of equals), logits where wanted.

    A tile with a logit that is no number has none as its best: `pick` then chooses no token.

    Greedy decoding reads the tiles' best: 64 rows of logits would be 39 MB. Grid: (tiles of V,).
    """
    tile = tl.program_id(0)
    n, m = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, M)
    rows = tl.minimum(n, V - 1) if V % ROWS else n
    prefetch_weights(w, rows, 0, E, PDL)
    wait_for_previous(PDL)
    acc = one_product(w, x, peaks, rows, 0, E, 1, ROWS, BLOCK, M, ROUND)
    let_next_start(PDL)
    acc = acc * inverse_rms(squares, m, E, eps, SQUARES, M, SQUARES_BLOCK)[None, :]
    acc = unscaled(acc, scales, peaks, rows, m)
    if SOFTCAP:
        acc = softcap * (1.0 - 2.0 / (tl.exp(2.0 * acc / softcap) + 1.0))
    if logits is not None:
        tl.store(logits + m.to(tl.int64)[None, :] * V + n[:, None], acc, mask=(n < V)[:, None])
    acc = tl.where((n < V)[:, None], acc, float("-inf"))
    top = tl.where(tl.max((acc != acc).to(tl.int32), 0) > 0, float("nan"), tl.max(acc, 0))
    tiles: tl.constexpr = (V + ROWS - 1) // ROWS
    tl.store(best + m * tiles + tile, top)
    tl.store(best_id + m * tiles + tile, tl.min(tl.where(acc == top[None, :], n[:, None], V - 1), 0))


# ---- both ends of a step ---------------------------------------------------------------------------


@triton.jit
def begin(embed, tokens, gamma, residual, hidden, squares, peaks, turn, embed_scale, E: tl.constexpr,
          BLOCK: tl.constexpr, TILES: tl.constexpr, TILES_BLOCK: tl.constexpr, PEAKS: tl.constexpr,
          PEAKS_BLOCK: tl.constexpr, M: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """Embed each row's token; clear the largest magnitudes of all layers. Grid: (rows,).

    Layer 0 adds `TILES` sums of squares like every other layer (one kernel serves all), so the others are 0.
    `turn` counts steps, for the tags of what several GPUs send each other.
    """
    row, k = tl.program_id(0), tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    if turn is not None:  # noqa: SIM102 - the outer one is decided when this is compiled
        if row == 0:
            tl.store(turn, tl.load(turn) + 1)
    t = tl.arange(0, TILES_BLOCK)
    tl.store(squares + t * M + row, 0.0, mask=(t > 0) & (t < TILES))
    if peaks is not None:
        p = tl.arange(0, PEAKS_BLOCK)
        tl.store(peaks + p * M + row, 0, mask=(p > 0) & (p < PEAKS))
    token = tl.maximum(tl.load(tokens + row), 0).to(tl.int64)
    x = tl.load(embed + token * E + k, mask=k < E, other=0.0).to(tl.float32) * embed_scale
    put_row(x, row, residual, gamma, hidden, squares, peaks, E, BLOCK)


@triton.jit
def pick(best, best_id, tokens, positions, emitted, peers, words, stop, turn, first, V: tl.constexpr,
         TILES: tl.constexpr, BLOCK: tl.constexpr, RING: tl.constexpr, VOCAB: tl.constexpr,
         ROWS: tl.constexpr, RANKS: tl.constexpr, RANKS_BLOCK: tl.constexpr, PLACES: tl.constexpr,
         PDL: tl.constexpr):  # fmt: skip
    """Each row's greedy token becomes its next input; its position moves on. Grid: (rows,).

    -1 says that there is none: a logit is no number. `emitted` [rows, RING] keeps the token of position p at
    p % RING: the host may read some steps late. Where RANKS GPUs have V of the VOCAB logits each, this one's
    from `first` on, they agree first.
    """
    row, t = tl.program_id(0), tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    inside = t < TILES
    value = tl.load(best + row * TILES + t, mask=inside, other=float("-inf"))
    which = tl.load(best_id + row * TILES + t, mask=inside, other=V - 1)
    top = tl.max(value, 0)
    token = tl.min(tl.where(value == top, which, V - 1), 0) + first
    token = tl.where(tl.max((value != value).to(tl.int32), 0) > 0, -1, token)
    if peers is not None:
        tag = tl.load(turn) * PLACES
        token = best_of_ranks(peers, words, stop, tag, row, top, token, VOCAB, ROWS, RANKS, RANKS_BLOCK)
    position = tl.load(positions + row)
    if position >= 0:
        tl.store(tokens + row, token)
        tl.store(emitted + row * RING + (position + 1) % RING, token)
        tl.store(positions + row, position + 1)
