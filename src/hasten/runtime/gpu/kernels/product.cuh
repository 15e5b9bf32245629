// One matrix times one vector, the work of a decode step. How it is shared out, and what each choice gained, is in
// docs/gpu.md; the layout of the weights is made by hasten/runtime/gpu/tiles.py.
//
// A tile is 8 rows; block b owns tiles b, b + BLOCKS, ... of every matrix. The columns are shared among the warps: warp
// w owns the same SPAN columns of every tile, so it waits for its own slice of the input alone, keeps it in registers
// as operand of its tensor core instructions, and no block barrier stands between the arrival of x and the products.
// One barrier remains, before the warps' sums of a row are added up.
//
// mma.m16n8k16 has the weights as A: its rows g and g + 8 are both row g of the tile, at different columns, so one
// instruction takes 8 rows x 32 columns. x is B, as high + low part (two 16-bit floats, so that it loses nothing): n =
// 0, 1 for rows 0..7, n = 2, 3 for rows 8..15. The sum of row g is c0 + c1 in lane 4 g and c2 + c3 in lane 4 g + 1.
enum { BF16 = 0, FP8 = 1, INT8 = 2, INT4 = 3 };

template <int ID_, int TYPE_, int GROUP_, int MINIMUM_, int ROWS_, int COLS_, int PAIR_>
struct Product {
  static constexpr int ID = ID_, TYPE = TYPE_, GROUP = GROUP_, ROWS = ROWS_, COLS = COLS_;
  static constexpr bool MINIMUM = MINIMUM_ != 0, PAIR = PAIR_ != 0;           // PAIR: tiles of gate and up take turns
  static constexpr int STEP_WORDS = TYPE == BF16 ? 4 : TYPE == INT4 ? 1 : 2;  // 32-bit words a lane, of 8 weights
  static constexpr int STEPS = ceil_div(ceil_div(COLS, 32), WARPS), SPAN = STEPS * 32;
  static constexpr int UNIT = GROUP ? gcd(GROUP, SPAN) : SPAN, UNIT_STEPS = UNIT / 32;  // columns a stored scale is for
  static constexpr int NUMBERS = GROUP ? 1 + MINIMUM_ : 0;                              // fp16 numbers a unit and row
  static constexpr bool ROW_SCALE = TYPE != BF16 && !GROUP;                             // fp32, in every stage
  static COMPILE_TIME int align() {  // steps a stage must hold a multiple of: whole units, whole 16-byte loads
    const int unit = GROUP ? UNIT_STEPS : 1, load = 4 / STEP_WORDS;
    return unit / gcd(unit, load) * load;
  }
  static COMPILE_TIME int stage_bytes(int steps) {
    return WARPS * 128 * STEP_WORDS * steps + WARPS * 16 * NUMBERS * ceil_div(steps, UNIT_STEPS) + 32 * ROW_SCALE;
  }
  static COMPILE_TIME int most_steps() {
    int steps = align();
    while (stage_bytes(steps + align()) <= SLOT_BYTES) steps += align();
    return steps;
  }
  static constexpr int STAGE_STEPS = min_of(STEPS, round_up(ceil_div(STEPS, ceil_div(STEPS, most_steps())), align()));
  static constexpr int STAGES = ceil_div(STEPS, STAGE_STEPS);  // a tile, a slot of the ring each
  static COMPILE_TIME int steps_of(int stage) { return min_of(STAGE_STEPS, STEPS - stage * STAGE_STEPS); }
  static constexpr int LAST_BYTES = stage_bytes(STEPS - (STAGES - 1) * STAGE_STEPS);
  static constexpr int TILE_BYTES = (STAGES - 1) * stage_bytes(STAGE_STEPS) + LAST_BYTES;
  static constexpr int TILES = ceil_div(ROWS, 8);                      // pairs of tiles where PAIR
  static constexpr int MOST_TILES = ceil_div(TILES, BLOCKS) << PAIR_;  // a block
  static constexpr int WORDS = STEPS * STEP_WORDS;                     // a lane, of a tile
  static constexpr int UNITS = GROUP ? STEPS / UNIT_STEPS : 0;         // a lane's row, of a tile
  static constexpr int SCALE_WORDS = UNITS * NUMBERS + ROW_SCALE;
  // Whole tiles are taken into registers before x arrives where they fit: their loads are then off the critical path.
  static constexpr int PAIRS = ceil_div(SPAN, 64);                               // of inputs a lane waits for
  static constexpr int FREE = CONSUMER_REGISTERS - SPARE_REGISTERS - 2 * STEPS;  // registers beside x's
  static constexpr bool WHOLE = WORDS + SCALE_WORDS <= FREE;
  static COMPILE_TIME int at_once() {
    int tiles = WHOLE ? FREE / (WORDS + SCALE_WORDS) : 1;
    tiles = min_of(min_of(tiles, 8), MOST_TILES);
    return PAIR && tiles > 1 ? tiles / 2 * 2 : tiles;
  }
  static constexpr int AT_ONCE = at_once();            // tiles held in registers together
  static constexpr int BATCH = 8 / AT_ONCE * AT_ONCE;  // tiles between two barriers
  static constexpr bool HALF = TYPE != BF16;           // operands are fp16, scaled to its range; else bf16
  static_assert(stage_bytes(STAGE_STEPS) <= SLOT_BYTES, "a stage must fit its slot");
  static_assert(!PAIR || BATCH % 2 == 0, "gate and up must share a batch");
};
using Qkv = Product<0, QKV_TYPE, QKV_GROUP, QKV_MINIMUM, (HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH, 0>;
using OutProduct = Product<1, O_TYPE, O_GROUP, O_MINIMUM, WIDTH, HEADS * HEAD_DIM, 0>;
using GateUp = Product<2, GATE_UP_TYPE, GATE_UP_GROUP, GATE_UP_MINIMUM, FEED, WIDTH, 1>;
using Down = Product<3, DOWN_TYPE, DOWN_GROUP, DOWN_MINIMUM, WIDTH, FEED, 0>;
using Head = Product<0, HEAD_TYPE, HEAD_GROUP, HEAD_MINIMUM, VOCAB, WIDTH, 0>;

constexpr int WINDOW_PAIRS = 64 / WARPS;  // of a warp's inputs that pass through shared memory at a time
constexpr int WIDTH_SPAN = Qkv::SPAN;
constexpr int RANK_WORDS = round_up(WIDTH + 2, 2);  // of what a rank publishes of the residual stream

// The shared memory of a block, after the ring.
struct Shared {
  u64 full[SLOTS], empty[SLOTS];
  float squares[WARPS], squares_after[WARPS];  // of the residual stream; of a layer's output before its norm
  float best[WARPS];
  int best_row[WARPS];
  alignas(16) float sums[2][8 * 8 * WARPS];          // [tile and row][warp], for two batches in turn
  alignas(16) u8 window[WARPS][WINDOW_PAIRS * 256];  // a warp's inputs on their way into operand order
  alignas(16) float residual[WARPS][round_up(WIDTH_SPAN, 64)];
};

struct Block {
  Shared& s;
  u32 ring;
  int warp, lane, thread;
  u32 slot, parity;  // of the ring, for the next stage
  int sums;          // which of the two buffers
  u32 zero;          // 0, unknown to the compiler
  int* trace;        // of this layer, with TRACE
};
#ifdef TRACE  // cycles of thread 0, to see where the time goes
DEVICE void mark(const Block& b, int at) {
  if (b.thread == 0) b.trace[at] = (int)clock64();
}
#else
DEVICE void mark(const Block&, int) {}
#endif

// ---- producer and consumers walk the same order: tiles (gate and up in turn), then stages of a tile
DEVICE void next_slot(Block& b) {
  if (++b.slot == SLOTS) {
    b.slot = 0;
    b.parity ^= 1;
  }
}
template <class P, class Visit>
DEVICE void walk(const u8* weights, Visit visit) {
#pragma unroll 1
  for (int tile = blockIdx.x; tile < P::TILES; tile += BLOCKS) {
    const u8* from = weights + ((size_t)tile << P::PAIR) * P::TILE_BYTES;
#pragma unroll 1
    for (int stage = 0; stage < P::STAGES << P::PAIR; stage++) {
      const u32 bytes = stage % P::STAGES == P::STAGES - 1 ? P::LAST_BYTES : P::stage_bytes(P::STAGE_STEPS);
      visit(from, bytes);
      from += bytes;
    }
  }
}

// ---- a lane's words of a stage, and the scales of its row, out of the ring
template <class P, int STEPS>
DEVICE void take_stage(Block& b, u32* words, u32* scales) {
  constexpr int N = STEPS * P::STEP_WORDS, NUMBERS = P::GROUP ? STEPS / P::UNIT_STEPS * P::NUMBERS : 0;
  wait_mbarrier(shared_address(&b.s.full[b.slot]), b.parity);
  const u32 stage = b.ring + b.slot * SLOT_BYTES, at = stage + b.warp * (N * 128);
#pragma unroll
  for (int j = 0; j < N / 4; j++)
    load_shared(at + j * 512 + b.lane * 16, words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3]);
  if (N & 2) load_shared(at + N / 4 * 512 + b.lane * 8, words[N / 4 * 4], words[N / 4 * 4 + 1]);
  if (N & 1) load_shared(at + N / 4 * 512 + (N & 2) * 128 + b.lane * 4, words[N - 1]);
  const u32 row = stage + WARPS * N * 128 + (b.warp * 8 + b.lane / 4) * NUMBERS * 2;
  if (NUMBERS % 4 == 0) {
#pragma unroll
    for (int j = 0; j < NUMBERS / 4; j++) {
      u32 x, y;
      load_shared(row + j * 8, x, y);
      scales[4 * j] = x, scales[4 * j + 1] = x >> 16, scales[4 * j + 2] = y, scales[4 * j + 3] = y >> 16;
    }
  } else if (NUMBERS % 2 == 0) {
#pragma unroll
    for (int j = 0; j < NUMBERS / 2; j++) {
      u32 x;
      load_shared(row + j * 4, x);
      scales[2 * j] = x, scales[2 * j + 1] = x >> 16;
    }
  } else {
#pragma unroll
    for (int j = 0; j < NUMBERS; j++) load_shared_half(row + j * 2, scales[j]);
  }
  if (P::ROW_SCALE) load_shared(stage + WARPS * N * 128 + b.lane / 4 * 4, scales[0]);
  u32 all = N % 4 ? words[N - 1] | words[N / 4 * 4] : 0;  // a word of every load
#pragma unroll
  for (int j = 0; j < N / 4; j++) all |= words[4 * j];
  if (P::ROW_SCALE) all |= scales[0];
#pragma unroll
  for (int j = 0; j < NUMBERS; j++) all |= scales[j];
  __syncwarp();
  if (b.lane == 0) arrive_after(shared_address(&b.s.empty[b.slot]), all, b.zero);
  next_slot(b);
}

// ---- 8 weights of a lane as A operand; integers become fp16 without a conversion instruction: OR-ing them into the
// mantissa of 1024 gives 1024 + q exactly, and a fused multiply-add takes the offset out again
template <class P>
DEVICE void operand(const u32* words, u32 (&a)[4]) {
  if (P::TYPE == BF16) {
    a[0] = words[0], a[2] = words[1], a[1] = words[2], a[3] = words[3];
  } else if (P::TYPE == FP8) {
    const int order[4] = {0, 2, 1, 3};
#pragma unroll
    for (int i = 0; i < 4; i++)
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(a[order[i]]) : "h"((u16)(words[i / 2] >> (i % 2 * 16))));
  } else if (P::TYPE == INT8) {  // stored + 128
#pragma unroll
    for (int i = 0; i < 2; i++) {
      a[i] = half2_add(__byte_perm(words[i], 0x64646464u, 0x4140), 0xe480e480u);      // columns 0, 1: - 1152
      a[i + 2] = half2_add(__byte_perm(words[i], 0x64646464u, 0x4342), 0xe480e480u);  // columns 2, 3
    }
  } else {  // stored + 8; nibbles 0 4 | 1 5 | 2 6 | 3 7 are neighbours: one shift instead of three
    const u32 w = words[0], v = w >> 8;
    a[0] = half2_add(and_or<0x000f000fu, 0x64006400u>(w), 0xe408e408u);               // 1024 + q - 1032
    a[2] = half2_fma(and_or<0x00f000f0u, 0x64006400u>(w), 0x2c002c00u, 0xd480d480u);  // (1024 + 16 q) / 16 - 72
    a[1] = half2_add(and_or<0x000f000fu, 0x64006400u>(v), 0xe408e408u);
    a[3] = half2_fma(and_or<0x00f000f0u, 0x64006400u>(v), 0x2c002c00u, 0xd480d480u);
  }
}
template <bool HALF>
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&x)[2]) {
  // not volatile: chained ones wait 33 cycles each, so the compiler must be free to interleave independent sums
  if (HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x[0]), "r"(x[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(x[0]), "r"(x[1]));
}
DEVICE float row_sum(const float (&d)[4], int lane) { return lane & 1 ? d[2] + d[3] : d[0] + d[1]; }

// A warp's slice of the input as B operands, and what its sums must be multiplied with.
template <class P>
struct Input {
  u32 x[P::STEPS][2];
  float unit_sum[P::MINIMUM ? P::UNITS : 1];  // of x over a unit, where a minimum is added to its weights
  float scale;
};
template <class P, int FIRST, int STEPS, int CHAINS>
DEVICE void multiply(const Input<P>& in, const u32* words, const u32* scales, float (&d)[CHAINS][4], float& sum,
                     int lane) {
  u32 a[4];
  if constexpr (!P::GROUP) {  // several sums: an mma waits 33 cycles for the one before it
#pragma unroll
    for (int t = 0; t < STEPS; t++) {
      operand<P>(words + t * P::STEP_WORDS, a);
      mma<P::HALF>(d[t % CHAINS], a, in.x[FIRST + t]);
    }
  } else {
#pragma unroll
    for (int u = 0; u < STEPS / P::UNIT_STEPS; u++) {  // a unit is summed alone, then scaled
      float e[4] = {0, 0, 0, 0};
#pragma unroll
      for (int t = 0; t < P::UNIT_STEPS; t++) {
        operand<P>(words + (u * P::UNIT_STEPS + t) * P::STEP_WORDS, a);
        mma<P::HALF>(e, a, in.x[FIRST + u * P::UNIT_STEPS + t]);
      }
      if constexpr (P::MINIMUM) {
        const float unit_sum = in.unit_sum[FIRST / P::UNIT_STEPS + u];
        sum += from_half(scales[2 * u]) * (row_sum(e, lane) + (P::TYPE == INT4 ? 8.f : 128.f) * unit_sum);
        sum += from_half(scales[2 * u + 1]) * unit_sum;
      } else {
        sum += from_half(scales[u]) * row_sum(e, lane);
      }
    }
  }
}

// ---- fp32 values of a warp's slice (as await_slice gives them) -> operands
template <class P>
DEVICE void make_input(Block& b, float (&v)[2 * P::PAIRS], Input<P>& in) {
  in.scale = 1.f;
  if (P::HALF) {  // fp16 has a small range: the largest value of the slice is brought to [2^14, 2^15)
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 2 * P::PAIRS; i++) largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
    asm volatile("redux.sync.max.u32 %0, %0, 0xffffffff;" : "+r"(largest));
    const u32 exponent = min(max(largest >> 23, 15u), 254u);
    const float up = __uint_as_float((268u - exponent) << 23);
    in.scale = __uint_as_float((exponent - 14u) << 23);
#pragma unroll
    for (int i = 0; i < 2 * P::PAIRS; i++) v[i] *= up;
  }
  // [step][high, low][32 columns], the halves swapped in odd steps so that writes meet no bank twice
  const u32 window = shared_address(b.s.window[b.warp]), n = (b.lane & 15) / 4;
  const u32 to = window + b.lane / 16 * 128 + b.lane % 16 * 4, part = (n & 1) * 64, odd = b.lane / 16 * 64;
  const u32 from = window + (b.lane & 3) * 16 + n / 2 * 8;
#pragma unroll
  for (int p0 = 0; p0 < P::PAIRS; p0 += WINDOW_PAIRS) {
#pragma unroll
    for (int i = 0; i < WINDOW_PAIRS; i++)
      if (p0 + i < P::PAIRS) {
        const float x = v[2 * (p0 + i)], y = v[2 * (p0 + i) + 1];
        u32 high, low;
        if (P::HALF) {
          high = to_half_pair(x, y);
          low = to_half_pair(x - from_half(high), y - from_half(high >> 16));
        } else {
          high = to_bf16_pair(x, y);
          low = to_bf16_pair(x - bf16_low(high), y - bf16_high(high));
        }
        store_shared(to + i * 256 + odd, high);
        store_shared(to + i * 256 + (odd ^ 64), low);
      }
    __syncwarp();
#pragma unroll
    for (int t = 0; t < 2 * WINDOW_PAIRS; t++) {
      const int step = 2 * p0 + t;
      if (step < P::STEPS) load_shared(from + t * 128 + (t & 1 ? part ^ 64 : part), in.x[step][0], in.x[step][1]);
    }
    __syncwarp();
  }
  if (P::MINIMUM) {  // a matrix of ones gives the sums of x, of exactly the parts that are multiplied
    const u32 ones[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
    for (int u = 0; u < P::UNITS; u++) {
      float e[4] = {0, 0, 0, 0};
#pragma unroll
      for (int t = 0; t < P::UNIT_STEPS; t++) mma<true>(e, ones, in.x[u * P::UNIT_STEPS + t]);
      in.unit_sum[u] = row_sum(e, b.lane);
    }
  }
}

// ---- the product. `input` is where its input arrives in the exchange, with which tag; `ask()` asks for what memory
// must bring by then, `change(v)` makes x of a warp's slice of the input, `out(row, sum, second)` is called by one
// thread a row, in whole groups of 8 threads, with the row's sum (and where PAIR the sum of the same row of `up`).
struct Awaited {
  const u64* words;
  u32 tag;
  bool is_there;  // else there is nothing to wait for
  int parts = 1;  // that are added up: the ranks', one behind another
};
template <class P>
DEVICE void await_input(const Block& b, const Awaited& input, float (&v)[2 * P::PAIRS]) {
  const u64* words = input.words + b.warp * P::SPAN;
  const int end = min(P::SPAN, P::COLS - b.warp * P::SPAN);
  await_slice<P::PAIRS>(words, end, input.tag, b.lane, v);
#pragma unroll
  for (int r = 1; r < RANKS; r++)
    if (r < input.parts) {
      float more[2 * P::PAIRS];
      await_slice<P::PAIRS>(words + r * RANK_WORDS, end, input.tag, b.lane, more);
#pragma unroll
      for (int i = 0; i < 2 * P::PAIRS; i++) v[i] += more[i];
    }
}
template <class P, int STAGE>
DEVICE void take_tile(Block& b, u32* words, u32* scales) {
  if constexpr (STAGE < P::STAGES) {
    constexpr int FIRST = STAGE * P::STAGE_STEPS;
    take_stage<P, P::steps_of(STAGE)>(b, words + FIRST * P::STEP_WORDS, scales + FIRST / P::UNIT_STEPS * P::NUMBERS);
    take_tile<P, STAGE + 1>(b, words, scales);
  }
}
template <class P>
DEVICE void take_tiles(Block& b, int left, u32 (&words)[P::AT_ONCE][P::WORDS],
                       u32 (&scales)[P::AT_ONCE][max_of(P::SCALE_WORDS, 1)]) {
#pragma unroll
  for (int i = 0; i < P::AT_ONCE; i++)
    if (i < left) take_tile<P, 0>(b, words[i], scales[i]);
}
template <class P, int STAGE, int CHAINS>
DEVICE void stream_stages(Block& b, const Input<P>& in, u32* words, u32* scales, float (&d)[CHAINS][4], float& sum) {
  if constexpr (STAGE < P::STAGES) {
    constexpr int STEPS = P::steps_of(STAGE);
    take_stage<P, STEPS>(b, words, scales);
    multiply<P, STAGE * P::STAGE_STEPS, STEPS>(in, words, scales, d, sum, b.lane);
    stream_stages<P, STAGE + 1>(b, in, words, scales, d, sum);
  }
}
template <class P, int CHAINS>
DEVICE void keep_sum(Block& b, const Input<P>& in, const u32* scales, const float (&d)[CHAINS][4], float sum,
                     int place) {
  if constexpr (!P::GROUP) {
    float e[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int chain = 0; chain < CHAINS; chain++) e[i] += d[chain][i];
    sum = row_sum(e, b.lane);
  }
  if (P::ROW_SCALE) sum *= __uint_as_float(scales[0]);
  sum += __shfl_xor_sync(~0u, sum, 1);
  if ((b.lane & 3) == 0) b.s.sums[b.sums][(place * 8 + b.lane / 4) * WARPS + b.warp] = sum * in.scale;
}
template <class P, class Out>
DEVICE void reduce(Block& b, int first, int tiles, Out out) {
  consumers_barrier();
  if (b.thread < (tiles * 8 >> P::PAIR)) {
    const int place = (b.thread >> 3) << P::PAIR, row = b.thread & 7;
    auto total = [&](int tile) {
      const float* p = b.s.sums[b.sums] + (tile * 8 + row) * WARPS;
      float r = 0;
#pragma unroll
      for (int i = 0; i < WARPS; i += 4) r += (p[i] + p[i + 1]) + (p[i + 2] + p[i + 3]);
      return r;
    };
    const float sum = total(place), second = P::PAIR ? total(place + 1) : 0.f;
    out((((first + place) >> P::PAIR) * BLOCKS + (int)blockIdx.x) * 8 + row, sum, second);
  }
  b.sums ^= 1;
}
template <class P, class Ask, class Change, class Out>
DEVICE void product(Block& b, Awaited input, Ask ask, Change change, Out out) {
  const int mine = ((int)blockIdx.x < P::TILES ? (P::TILES - 1 - (int)blockIdx.x) / BLOCKS + 1 : 0) << P::PAIR;
  Input<P> in;
  ask();
  if constexpr (P::WHOLE) {
    u32 words[P::AT_ONCE][P::WORDS] = {}, scales[P::AT_ONCE][max_of(P::SCALE_WORDS, 1)] = {};
    float v[2 * P::PAIRS];
    take_tiles<P>(b, mine, words, scales);
    mark(b, 3 * P::ID);
    if (input.is_there) await_input<P>(b, input, v);
    change(v);
    mark(b, 3 * P::ID + 1);
    make_input<P>(b, v, in);
#pragma unroll 1
    for (int i0 = 0; i0 < max(mine, 1); i0 += P::AT_ONCE) {
      if (i0) take_tiles<P>(b, mine - i0, words, scales);
      const int place = i0 % P::BATCH;
#pragma unroll
      for (int i = 0; i < P::AT_ONCE;
           i++) {  // tiles past the last give sums that nobody reads: no branch, more overlap
        constexpr int CHAINS = P::AT_ONCE >= 4 ? 1 : P::AT_ONCE >= 2 ? 2 : 4;
        float d[CHAINS][4] = {}, sum = 0;
        multiply<P, 0, P::STEPS>(in, words[i], scales[i], d, sum, b.lane);
        keep_sum<P>(b, in, scales[i], d, sum, place + i);
      }
      const int end = min(i0 + P::AT_ONCE, mine);
      if (end == mine || place + P::AT_ONCE == P::BATCH) reduce<P>(b, i0 - place, end - (i0 - place), out);
    }
  } else {
    u32 words[P::STAGE_STEPS * P::STEP_WORDS], scales[max_of(P::SCALE_WORDS, 1)];
    static_assert(P::STAGES > 1 || P::STAGE_STEPS == P::STEPS, "");
    if (mine) take_stage<P, P::steps_of(0)>(b, words, scales);
    mark(b, 3 * P::ID);
    float v[2 * P::PAIRS];
    if (input.is_there) await_input<P>(b, input, v);
    change(v);
    mark(b, 3 * P::ID + 1);
    make_input<P>(b, v, in);
#pragma unroll 1
    for (int i = 0; i < mine; i++) {
      float d[4][4] = {}, sum = 0;
      if (i) take_stage<P, P::steps_of(0)>(b, words, scales);
      multiply<P, 0, P::steps_of(0)>(in, words, scales, d, sum, b.lane);
      stream_stages<P, 1>(b, in, words, scales, d, sum);
      keep_sum<P>(b, in, scales, d, sum, i % P::BATCH);
      if (i + 1 == mine || i % P::BATCH == P::BATCH - 1) reduce<P>(b, i / P::BATCH * P::BATCH, i % P::BATCH + 1, out);
    }
    if (!mine) consumers_barrier();
  }
  mark(b, 3 * P::ID + 2);
}
