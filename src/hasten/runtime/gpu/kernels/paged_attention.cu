// Attention of a batched decode step over int8 pages: one query token a row, up to 8 query heads a KV head.
//
// A block takes one row, TOGETHER KV heads and one split of the row's tokens; the warps of a head take the split's
// pages in turn. Warps of different heads read what lies side by side. A warp puts pages into its own places in shared
// memory, so that a page costs no block barrier. There are two ways to bring them:
// - STAGES > 1, for few rows: into a ring of so many places by cp.async, the next one while this one is computed.
// - STAGES = 1, for many: through registers into the only place; other warps compute meanwhile, and there is room for
//   more of them. Loads can also say that a line is read once (ld.cs), which cp.async past the L1 cannot. 512 rows of
//   1,500 tokens with 8 KV heads of 128 on an H200: 380 us, 4.3 TB/s; a ring of 2 to 4 pages takes 422 to 437 us, and
//   loads that compute nothing 366.
//
// The tensor cores compute scores and outputs transposed, with the query heads on the side of 8 columns: with heads on
// the side of 16 rows half the work and half the registers would be padding.
//
// All products are of int8: keys and values are taken as they are stored. A query is 128 * high + low, 15 bits with a
// scale a head, and so is a weight, 14 bits: nothing is lost that bf16 would keep. Up to 4 heads share a KV head in
// most models; then high parts are columns 0 to 3 of one product and low parts columns 4 to 7, else there are two
// products. (Turned into bf16 first, as many bytes took as long: the arithmetic is not what bounds it.)
//
// Which value sits where in an operand is free as long as both operands agree, so lanes take 16 neighbouring bytes at
// once and no value moves between lanes but the weights (movmatrix).
//
// Names in capitals that are not defined here are -D options: KV_HEADS, SHARE (query heads of a KV head), HEAD_DIM (64,
// 128 or 256), WARPS, TOGETHER (KV heads of a block), STAGES (places of a warp), TABLE (pages a row may have), SLAB
// (bytes from a page and head to the next), SOFTCAP (0 or 1).
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
#define DEVICE __device__ __forceinline__

constexpr int PAGE = 32, D = HEAD_DIM, HEADS = 8, HEAD_COUNT = KV_HEADS * SHARE;
constexpr int UNITS = D / 16;                         // of 16 bytes in a key or value
constexpr int KEY_CHUNKS = D / 64;                    // 16 bytes of a key that a lane takes: 4 lanes a key
constexpr int VALUE_BYTES = D / 8 < 16 ? D / 8 : 16;  // of a value that a lane takes at once: 8 lanes a value
constexpr int VALUE_CHUNKS = D / 8 / VALUE_BYTES;
constexpr int VALUE_WORDS = VALUE_BYTES / 4;
constexpr int TILES = D / 16;                                               // of 16 dimensions
constexpr int GROUPS = KV_HEADS / TOGETHER, PAGE_WARPS = WARPS / TOGETHER;  // blocks of a row; warps of a KV head
constexpr bool WIDE = SHARE > 4;  // high and low parts are products of their own
constexpr int QUERY_WORDS = D / 16, PARTS = WIDE ? 2 : 1;
constexpr int REGISTERS_OF = D <= 128 ? 16 : 8;  // warps of a multiprocessor, if STAGES is 1; more would spill
constexpr float QUERY_STEPS = 127 * 128, WEIGHT_STEPS = 128 * 128 - 1;  // of the largest
constexpr int STAGE_BYTES = 2 * PAGE * D + 2 * PAGE * 4;                // keys, values, their scales
constexpr int MERGE_BYTES = HEADS * (D + 3) * 4;                        // of a warp
constexpr float LOG2_E = 1.4426950408889634f, NO_SCORE = -1e30f;
static_assert(KV_HEADS % TOGETHER == 0 && WARPS % TOGETHER == 0, "whole KV heads");
static_assert(SHARE <= HEADS && (D == 64 || D == 128 || D == 256), "heads");
static_assert(MERGE_BYTES <= STAGES * STAGE_BYTES, "the ring holds what warps exchange at the end");

struct Args {
  const u16* queries;                      // bf16 [rows][heads][D]
  const u8 *keys, *values;                 // int8 [page][KV head], SLAB bytes apart: [PAGE][D]
  const float *key_scales, *value_scales;  // the same: [PAGE]
  const int *table, *positions;            // [rows][TABLE]; of the newest token, -1: no sequence
  u16* out;                                // bf16 [rows][heads][D]
  int* peaks;                              // bits of float [rows], largest magnitudes; or null
  float *parts, *tops, *totals;            // [rows][KV head][splits][SHARE] x D, 1, 1
  int* arrivals;                           // [rows][KV head], a block's first; zero between kernels
  float scale, softcap;
  int rows, split, splits, window;  // tokens of a split, splits of the grid, tokens seen or 0
};
extern "C" __constant__ int layout[2] = {WARPS * STAGES * STAGE_BYTES, WARPS * 32};

DEVICE void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}
DEVICE void copy4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}
DEVICE u32 permuted(u32 a, u32 b, u32 selector) {
  u32 r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
}
DEVICE u32 packed(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE u32 transposed(u32 x) {
  u32 r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}
DEVICE void multiply_add(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE float over_tokens(float x, bool is_sum) {  // over the 8 lanes that hold a head's tokens
#pragma unroll
  for (int m = 4; m < 32; m *= 2) {
    const float other = __shfl_xor_sync(~0u, x, m);
    x = is_sum ? x + other : fmaxf(x, other);
  }
  return x;
}

struct Place {
  int row, group, head, slot;  // of the block; KV head of the warp; split
  int begin, end;              // tokens of this block
  int first, stride, count;    // pages of this warp: first, first + stride, ..
};

// Where 16 bytes of a token's key or value stand in a stage, in units of 16 bytes: turned about within the token so
// that neither the 8 lanes that copy a token nor the 8 that read together meet in a bank.
DEVICE int key_place(int token, int unit) { return token * UNITS + (unit ^ (UNITS < 8 ? 0 : token % 2 * 4)); }
DEVICE int value_place(int token, int unit) { return token * UNITS + (unit ^ (token / 2 % 4 * (UNITS < 8 ? 1 : 2))); }
// A page of keys, values and scales on its way into a stage. Neighbouring lanes copy neighbouring bytes: memory answers
// whole lines, asked for by 8 lanes at a time.
DEVICE void begin_copy(const Args& a, const Place& p, u8* stage, int page, int lane) {
  const size_t at = (size_t)page * KV_HEADS + p.head;
  const u8 *keys = a.keys + at * SLAB, *values = a.values + at * SLAB;
#pragma unroll
  for (int i = 0; i < UNITS; i++) {
    const int from = 32 * i + lane, token = from / UNITS, unit = from % UNITS;
    copy16(stage + key_place(token, unit) * 16, keys + from * 16);
    copy16(stage + PAGE * D + value_place(token, unit) * 16, values + from * 16);
  }
  float* scales = (float*)(stage + 2 * PAGE * D);
  copy4(scales + lane, a.key_scales + at * (SLAB / 4) + lane);
  copy4(scales + PAGE + lane, a.value_scales + at * (SLAB / 4) + lane);
}

DEVICE void load_units(const u8* from, int lane, uint4 (&units)[UNITS]) {
#pragma unroll
  for (int i = 0; i < UNITS; i++) units[i] = __ldcs((const uint4*)from + 32 * i + lane);
}
// The same through registers: all of it is asked for before the first line is there. Pages of large heads come in two
// parts.
DEVICE void copy_page(const Args& a, const Place& p, u8* stage, int page, int lane) {
  constexpr bool AT_ONCE = D <= 128;
  const size_t at = (size_t)page * KV_HEADS + p.head;
  uint4 keys[UNITS], values[UNITS];
  load_units(a.keys + at * SLAB, lane, keys);
  const float key_scale = __ldcs(a.key_scales + at * (SLAB / 4) + lane),
              value_scale = __ldcs(a.value_scales + at * (SLAB / 4) + lane);
  if (AT_ONCE) load_units(a.values + at * SLAB, lane, values);
#pragma unroll
  for (int i = 0; i < UNITS; i++)
    *(uint4*)(stage + key_place((32 * i + lane) / UNITS, (32 * i + lane) % UNITS) * 16) = keys[i];
  if (!AT_ONCE) load_units(a.values + at * SLAB, lane, values);
#pragma unroll
  for (int i = 0; i < UNITS; i++)
    *(uint4*)(stage + PAGE * D + value_place((32 * i + lane) / UNITS, (32 * i + lane) % UNITS) * 16) = values[i];
  float* scales = (float*)(stage + 2 * PAGE * D);
  scales[lane] = key_scale, scales[PAGE + lane] = value_scale;
}

struct Queries {
  u32 words[PARTS][QUERY_WORDS];  // column g, in the order of the keys' bytes that this lane takes
  float scale[2];                 // of the two heads whose scores this lane has
};
struct Running {           // of a lane: columns 2 t and 2 t + 1; if not WIDE, those of low parts repeat the heads
  float top[2], total[2];  // maximum (in log2) over all lanes, sum over this lane's tokens
  float out[TILES][4];     // dimensions of rows g and g + 8 of a tile, both columns
};
// The head of this lane's first score.
DEVICE int first_head(int lane) { return 2 * (WIDE ? lane % 4 : lane % 2); }
DEVICE float largest_of(const uint4& x) {  // of 8 bf16
  const u32 words[4] = {x.x, x.y, x.z, x.w};
  float most = 0;
#pragma unroll
  for (int i = 0; i < 4; i++)
    most = fmaxf(most, fmaxf(fabsf(__int_as_float(words[i] << 16)), fabsf(__int_as_float(words[i] & 0xffff0000))));
  return most;
}
DEVICE int part_of(u32 word, int half, float factor, bool is_high) {  // one byte of a query
  const int x = __float2int_rn(__int_as_float(half ? word & 0xffff0000 : word << 16) * factor), high = (x + 64) >> 7;
  return (is_high ? high : x - high * 128) & 0xff;
}
// Queries of a KV head as int8. Bytes 4 i to 4 i + 3 of a word are neighbouring dimensions, as in keys.
DEVICE void load_queries(const Args& a, const Place& p, int lane, Queries& q) {
  const int g = lane / 4, t = lane % 4, head = WIDE ? g : g % 4;
  const bool is_there = head < SHARE;
  const u16* from = a.queries + ((size_t)p.row * HEAD_COUNT + p.head * SHARE + head) * D + t * 16;
  uint4 raw[2 * KEY_CHUNKS];
  float most = 0;
#pragma unroll
  for (int i = 0; i < 2 * KEY_CHUNKS; i++) {
    raw[i] = is_there ? *(const uint4*)(from + i / 2 * 64 + i % 2 * 8) : make_uint4(0, 0, 0, 0);
    most = fmaxf(most, largest_of(raw[i]));
  }
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
  most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
  const float factor = most > 0 ? QUERY_STEPS / most : 0;
#pragma unroll
  for (int part = 0; part < PARTS; part++)
#pragma unroll
    for (int i = 0; i < 2 * KEY_CHUNKS; i++) {
      const u32 words[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
      const bool is_high = WIDE ? part == 0 : g < 4;
#pragma unroll
      for (int w = 0; w < 2; w++) {
        u32 bytes = 0;
#pragma unroll
        for (int b = 0; b < 4; b++) bytes |= part_of(words[2 * w + b / 2], b % 2, factor, is_high) << 8 * b;
        q.words[part][2 * i + w] = bytes;
      }
    }
#pragma unroll
  for (int h = 0; h < 2; h++) q.scale[h] = __shfl_sync(~0u, most, (first_head(lane) + h) * 4) / QUERY_STEPS * a.scale;
}

// Scores of 32 tokens, [half][token g or g + 8 of it, by head], in log2.
DEVICE void scores_of(const Args& a, const Place& p, const u8* stage, const Queries& q, int token0, int lane,
                      float (&s)[2][4]) {
  const int g = lane / 4, t = lane % 4;
  const float* scales = (const float*)(stage + 2 * PAGE * D);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int sums[PARTS][4] = {};
#pragma unroll
    for (int c = 0; c < KEY_CHUNKS; c++) {
      const uint4 x = *(const uint4*)(stage + key_place(16 * half + g, 4 * c + t) * 16),
                  y = *(const uint4*)(stage + key_place(16 * half + 8 + g, 4 * c + t) * 16);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        multiply_add(sums[part], x.x, y.x, x.y, y.y, q.words[part][4 * c], q.words[part][4 * c + 1]);
        multiply_add(sums[part], x.z, y.z, x.w, y.w, q.words[part][4 * c + 2], q.words[part][4 * c + 3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int other = WIDE ? sums[PARTS - 1][i] : __shfl_xor_sync(~0u, sums[0][i], 2);
      const bool is_high = WIDE || lane % 4 < 2;
      const int whole = (is_high ? sums[0][i] : other) * 128 + (is_high ? other : sums[0][i]);
      const int at = 16 * half + i / 2 * 8 + g, token = token0 + at;
      float x = (float)whole * (q.scale[i % 2] * scales[at]);
      if (SOFTCAP) x = a.softcap * (1.f - 2.f / (__expf(2.f * x / a.softcap) + 1.f));
      s[half][i] = token >= p.begin && token < p.end ? x * LOG2_E : __int_as_float(0xff800000);
    }
  }
}

// Weights of 32 tokens times their values' scales, which are taken relative to the largest of them (returned): bytes
// [part][half] as the second operand of the product with values. `s` becomes the weights.
DEVICE float weights_of(const Place& p, const float* scales, int token0, int lane, const float (&s)[2][4], Running& r,
                        u32 (&weights)[PARTS][2]) {
  const int g = lane / 4;
  float by[4], most = 1e-30f;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    // what is behind the sequence's end belongs to another one and may be anything
    const int token = token0 + 8 * i + g;
    by[i] = token >= p.begin && token < p.end ? scales[8 * i + g] : 0.f;
    most = fmaxf(most, by[i]);
  }
  most = over_tokens(most, false);
  const float steps = WEIGHT_STEPS / most;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    u32 bytes[PARTS] = {};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = exp2f(s[half][i] - r.top[i % 2]);
      r.total[i % 2] += x;
      const u32 w = __float2uint_rn(x * by[2 * half + i / 2] * steps), shift = i % 2 * 16 + i / 2 * 8;
      if (WIDE)
        bytes[0] |= (w >> 7) << shift, bytes[PARTS - 1] |= (w & 127) << shift;
      else
        bytes[0] |= (lane % 4 < 2 ? w >> 7 : w & 127) << shift;
    }
#pragma unroll
    for (int part = 0; part < PARTS; part++) weights[part][half] = transposed(bytes[part]);
  }
  return most / WEIGHT_STEPS;
}

// Four words of bytes as the rows of a 4 x 4 matrix -> its columns.
DEVICE void turn(const u32 (&x)[4], u32 (&y)[4]) {
  const u32 a = permuted(x[0], x[1], 0x5140), b = permuted(x[2], x[3], 0x5140), c = permuted(x[0], x[1], 0x7362),
            d = permuted(x[2], x[3], 0x7362);
  y[0] = permuted(a, b, 0x5410), y[1] = permuted(a, b, 0x7632), y[2] = permuted(c, d, 0x5410),
  y[3] = permuted(c, d, 0x7632);
}

DEVICE void add_values(const u8* values, const u32 (&weights)[PARTS][2], float scale, int lane, Running& r) {
#pragma unroll
  for (int c = 0; c < VALUE_CHUNKS; c++) {
    u32 v[8][VALUE_WORDS];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int byte = c * 128 + lane / 4 * VALUE_BYTES, token = lane % 4 * 2 + i % 2 * 8 + i % 4 / 2 + i / 4 * 16;
      const u8* from = values + value_place(token, byte / 16) * 16 + byte % 16;
      if constexpr (VALUE_WORDS == 4) {
        const uint4 x = *(const uint4*)from;
        v[i][0] = x.x, v[i][1] = x.y, v[i][2] = x.z, v[i][3] = x.w;
      } else {
        const uint2 x = *(const uint2*)from;
        v[i][0] = x.x, v[i][1] = x.y;
      }
    }
#pragma unroll
    for (int w = 0; w < VALUE_WORDS; w++) {
      const u32 first[4] = {v[0][w], v[1][w], v[2][w], v[3][w]}, second[4] = {v[4][w], v[5][w], v[6][w], v[7][w]};
      u32 x[4], y[4];
      turn(first, x), turn(second, y);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        int sums[PARTS][4] = {};
#pragma unroll
        for (int part = 0; part < PARTS; part++)
          multiply_add(sums[part], x[2 * i], x[2 * i + 1], y[2 * i], y[2 * i + 1], weights[part][0], weights[part][1]);
        float (&out)[4] = r.out[(c * VALUE_WORDS + w) * 2 + i];
#pragma unroll
        for (int k = 0; k < 4; k++)
          out[k] += scale * (float)(WIDE ? sums[0][k] * 128 + sums[PARTS - 1][k] : sums[0][k]);
      }
    }
  }
}

DEVICE void add_page(const Args& a, const Place& p, const u8* stage, const Queries& q, int token0, int lane,
                     Running& r) {
  float s[2][4], shrink[2];
  scores_of(a, p, stage, q, token0, lane, s);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float most = over_tokens(fmaxf(fmaxf(s[0][h], s[0][2 + h]), fmaxf(s[1][h], s[1][2 + h])), false);
    const float top = fmaxf(r.top[h], most);
    shrink[h] = exp2f(r.top[h] - top);
    r.top[h] = top, r.total[h] *= shrink[h];
  }
  u32 weights[PARTS][2];
  const float scale = weights_of(p, (const float*)(stage + 2 * PAGE * D) + PAGE, token0, lane, s, r, weights);
  if (__any_sync(~0u, shrink[0] != 1.f || shrink[1] != 1.f))
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) r.out[j][i] *= shrink[i % 2];
  add_values(stage + PAGE * D, weights, scale, lane, r);
}

// The dimension of row g (or g + 8) of a tile.
DEVICE int dimension(int tile, int row, int lane) {
  const int word = tile / 2, chunk = word / VALUE_WORDS;
  return chunk * 128 + lane / 4 * VALUE_BYTES + word % VALUE_WORDS * 4 + tile % 2 * 2 + row;
}

DEVICE void put(const Args& a, const Place& p, int e, float value, float& largest) {
  const u32 bits = packed(value, 0.f) & 0xffff;
  a.out[((size_t)p.row * HEAD_COUNT + p.group * TOGETHER * SHARE) * D + e] = (u16)bits;
  largest = fmaxf(largest, fabsf(__int_as_float(bits << 16)));
}
DEVICE void raise_peak(const Args& a, const Place& p, float largest) {
  if (a.peaks == nullptr) return;
#pragma unroll
  for (int m = 1; m < 32; m *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, m));
  if (threadIdx.x % 32 == 0) atomicMax(a.peaks + p.row, __float_as_int(largest));
}

// All warps' sums; they are the row's if it has one split, else the last block of the row adds the splits in order.
DEVICE void merge(const Args& a, const Place& p, const float* shared, int splits) {
  __shared__ bool is_last;
  float largest = 0;
  const size_t base = ((size_t)p.row * GROUPS + p.group) * a.splits;
  constexpr int QUERY_HEADS = TOGETHER * SHARE;
  for (int e = threadIdx.x; e < QUERY_HEADS * D; e += WARPS * 32) {
    const int h = e / D % SHARE;
    const float* first = shared + e / (SHARE * D) * MERGE_BYTES / 4;
    constexpr int NEXT = TOGETHER * MERGE_BYTES / 4;
    float most = NO_SCORE, out = 0, total = 0;
#pragma unroll
    for (int w = 0; w < PAGE_WARPS; w++) most = fmaxf(most, first[w * NEXT + HEADS * (D + 1) + h]);
#pragma unroll
    for (int w = 0; w < PAGE_WARPS; w++) {
      const float* its = first + w * NEXT;
      const float f = exp2f(its[HEADS * (D + 1) + h] - most);
      out += f * its[h * (D + 1) + e % D], total += f * its[HEADS * (D + 2) + h];
    }
    if (splits == 1) {
      put(a, p, e, out / total, largest);
      continue;
    }
    const size_t at = (base + p.slot) * QUERY_HEADS + e / D;
    a.parts[at * D + e % D] = out;
    if (e % D == 0) a.tops[at] = most, a.totals[at] = total;
  }
  if (splits > 1) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      int* arrived = a.arrivals + p.row * KV_HEADS + p.group;
      is_last = atomicAdd(arrived, 1) == splits - 1;
      if (is_last) *arrived = 0;
      __threadfence();
    }
    __syncthreads();
    if (!is_last) return;
    for (int e = threadIdx.x; e < QUERY_HEADS * D; e += WARPS * 32) {
      float top = NO_SCORE, out = 0, total = 0;
      for (int s = 0; s < splits; s++) {
        const size_t at = (base + s) * QUERY_HEADS + e / D;
        const float its = __ldcg(a.tops + at), now = fmaxf(top, its), old = exp2f(top - now), f = exp2f(its - now);
        out = out * old + f * __ldcg(a.parts + at * D + e % D);
        total = total * old + f * __ldcg(a.totals + at);
        top = now;
      }
      put(a, p, e, out / total, largest);
    }
  }
  raise_peak(a, p, largest);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, STAGES > 1 ? 1 : REGISTERS_OF / WARPS)
    attend(const __grid_constant__ Args a) {
  extern __shared__ __align__(16) u8 ring[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  Place p;
  p.group = blockIdx.x % GROUPS, p.row = blockIdx.x / GROUPS % a.rows, p.slot = blockIdx.x / GROUPS / a.rows;
  p.head = p.group * TOGETHER + warp % TOGETHER;
  const int length = a.positions[p.row] + 1, low = a.window > 0 ? max(length - a.window, 0) : 0;
  const int before = low / a.split, splits = (length + a.split - 1) / a.split - before;
  if (p.slot >= splits) return;
  const int start = (before + p.slot) * a.split;
  p.begin = max(start, low), p.end = min(length, start + a.split);
  p.first = p.begin / PAGE + warp / TOGETHER, p.stride = PAGE_WARPS;
  p.count = ((p.end - 1) / PAGE - p.first) / PAGE_WARPS + 1;
  if (p.first > (p.end - 1) / PAGE) p.count = 0;
  Queries q;
  load_queries(a, p, lane, q);
  Running r;
  r.top[0] = r.top[1] = NO_SCORE, r.total[0] = r.total[1] = 0;
#pragma unroll
  for (int j = 0; j < TILES; j++) r.out[j][0] = r.out[j][1] = r.out[j][2] = r.out[j][3] = 0;
  u8* mine = ring + warp * STAGES * STAGE_BYTES;
  int pages = 0;  // the numbers of 32 of the warp's pages, one a lane
  auto page_of = [&](int n) {
    if (n % 32 == 0) pages = a.table[(size_t)p.row * TABLE + min(p.first + (n + lane) * p.stride, (p.end - 1) / PAGE)];
    return __shfl_sync(~0u, pages, n % 32);
  };
  auto ask = [&](int n) {
    if (n < p.count) begin_copy(a, p, mine + n % STAGES * STAGE_BYTES, page_of(n), lane);
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  if (STAGES > 1)
#pragma unroll
    for (int n = 0; n < STAGES - 1; n++) ask(n);
#pragma unroll 1
  for (int n = 0; n < p.count; n++) {
    if (STAGES > 1) {
      asm volatile("cp.async.wait_group %0;" ::"n"(STAGES > 1 ? STAGES - 2 : 0) : "memory");
      __syncwarp();  // the scales are other lanes' copies; and all have read the stage that is asked for next
      ask(n + STAGES - 1);
    } else {
      __syncwarp();  // all have read the page that stands there
      copy_page(a, p, mine, page_of(n), lane);
      __syncwarp();
    }
    add_page(a, p, mine + n % STAGES * STAGE_BYTES, q, (p.first + n * p.stride) * PAGE, lane, r);
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  r.total[0] = over_tokens(r.total[0], true), r.total[1] = over_tokens(r.total[1], true);
  __syncthreads();
  float* merged = (float*)ring;
  float* own = merged + warp * MERGE_BYTES / 4;
  const int head = first_head(lane);
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float low = WIDE ? 0.f : __shfl_xor_sync(~0u, r.out[j][i], 2);
      if (WIDE || t < 2)
        own[(head + i % 2) * (D + 1) + dimension(j, i / 2, lane)] = WIDE ? r.out[j][i] : 128.f * r.out[j][i] + low;
    }
  if (g == 0) {  // lanes that repeat a head write what is there
    own[HEADS * (D + 1) + head] = r.top[0], own[HEADS * (D + 1) + head + 1] = r.top[1];
    own[HEADS * (D + 2) + head] = r.total[0], own[HEADS * (D + 2) + head + 1] = r.total[1];
  }
  __syncthreads();
  merge(a, p, merged, splits);
}
