// Attention of one new token over paged keys and values: every KV head's context is split over SPLITS blocks, the
// warps of a block share its keys (and, where a group has many query heads, the heads), and partial results are merged
// twice: over the warps in shared memory, over the blocks through the exchange.
constexpr int RATIO = HEADS / KV_HEADS;         // query heads of a KV head
constexpr int PADDED = round_up(HEAD_DIM, 64);  // head size in the cache and in shared memory
constexpr int CHUNKS = PADDED / 64;             // 16-byte pieces of a key a lane holds
constexpr int MOST_HEADS = max_of(1, (WARPS > 8 ? 32 : 64) / (8 * CHUNKS));  // whose queries fit a warp's registers
COMPILE_TIME int head_sets() {
  int sets = 1;
  while (ceil_div(RATIO, sets) > MOST_HEADS) sets *= 2;
  return sets;
}
constexpr int SETS = head_sets(), SET_HEADS = ceil_div(RATIO, SETS), KEY_WARPS = WARPS / SETS;
constexpr int DEPTH = WARPS > 8 || CHUNKS > 2 ? 1 : 2;  // rounds of keys in flight
constexpr float LOG2_E = 1.4426950408889634f, NO_SCORE = -1e30f;
static_assert(WARPS % SETS == 0 && KV_HEADS * SPLITS <= BLOCKS && (SPLITS & (SPLITS - 1)) == 0 && SPLITS <= 32,
              "splits");
static_assert(HEAD_DIM % 8 == 0 && ROTARY % 2 == 0, "head size");

struct Attention {
  alignas(16) float heads[RATIO][PADDED];        // queries of the group, ready for the scores
  alignas(16) u16 key[PADDED], value[PADDED];    // of the new token, bf16 as the cache holds them
  alignas(16) float turning[RATIO + 2][PADDED];  // of a warp, where a rotation's partner is in another lane
  alignas(16) float cosine[2][PADDED],
      sine[2][PADDED];  // [global, sliding layers][element]; the sine has its sign, 1 and 0 past ROTARY
  float out[KEY_WARPS][RATIO][PADDED], most[KEY_WARPS][RATIO], weight[KEY_WARPS][RATIO];
};

struct Place {             // of this block in the attention of one layer
  int head, split;         // KV head
  int start, first, last;  // keys count from `start`; this block's are [first, last), first a multiple of 4
  int position;            // of the new token, the last key
};
DEVICE Place place_of(int position, bool slides) {
  Place p;
  p.head = blockIdx.x / SPLITS, p.split = blockIdx.x % SPLITS;
  p.start = WINDOW && slides ? max(0, position + 1 - WINDOW) : 0, p.position = position;
  const int aligned = p.start & ~3,
            each = round_up(ceil_div(position + 1 - aligned, SPLITS), 4);  // 4 keys lie in one page
  p.first = aligned + p.split * each, p.last = min(position + 1, p.first + each);
  return p;
}
DEVICE size_t cache_row(const Args& a, int layer, int page, int head, int token) {
  return (((size_t)layer * a.pages_held + page) * KV_HEADS + head) * PAGE * PADDED + (size_t)(token % PAGE) * PADDED;
}
DEVICE int page_of(const Args& a, int token, int position) { return __ldg(a.pages + min(token, position) / PAGE); }

struct Keys {  // 4 keys and values of a warp, raw: a conversion would wait for the load
  uint4 k[CHUNKS];
  u32 v[4][PADDED / 64];
};
DEVICE void load_keys(const Args& a, Keys& r, int layer, int page, int head, int token, int lane) {
  const u16* k = a.keys + cache_row(a, layer, page, head, token + lane / 8) + lane % 8 * 8;
  const u16* v = a.values + cache_row(a, layer, page, head, token) + lane * (PADDED / 32);
#pragma unroll
  for (int i = 0; i < CHUNKS; i++) r.k[i] = load_global4(k + 64 * i);
#pragma unroll
  for (int j = 0; j < 4; j++) {
    const u16* at = v + j * PADDED;
    if constexpr (PADDED == 64)
      load_global(at, r.v[j][0]);
    else if constexpr (PADDED == 128)
      load_global(at, r.v[j][0], r.v[j][1]);
    else if constexpr (PADDED == 256) {
      const uint4 x = load_global4(at);
      r.v[j][0] = x.x, r.v[j][1] = x.y, r.v[j][2] = x.z, r.v[j][3] = x.w;
    } else {
#pragma unroll
      for (int i = 0; i < PADDED / 64; i++) load_global(at + 2 * i, r.v[j][i]);
    }
  }
}
// The new token is no exception: its key and value take the place of what the cache holds there so far.
DEVICE void take_new_key(const Attention& s, Keys& r, int at, int lane) {
#pragma unroll
  for (int i = 0; i < CHUNKS; i++)
    if (lane / 8 == at) r.k[i] = *(const uint4*)(s.key + 64 * i + lane % 8 * 8);
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < PADDED / 64; i++)
      if (j == at) r.v[j][i] = *(const u32*)(s.value + lane * (PADDED / 32) + 2 * i);
}

// 1 / rms of all of q or all of k, from the sums of squares that the product published by tiles.
DEVICE float norm_of_tiles(const u64* words, int tiles, u32 tag, int lane, int count) {
  float sum = 0;
  for (int e = lane; e < tiles; e += 32) {
    u64 v;
    u32 tries = 0;
    do {
      asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(words + e) : "memory");
    } while ((u32)(v >> 32) != tag && !is_over(tries));
    sum += value_of(v);
  }
  return rsqrtf(warp_sum(sum) / count + NORM_EPS);
}
// Elements 64 c + 2 lane and the next of a head in x -> turned by its position. Partners lie ROTARY / 2 apart: in the
// same lane where that is a multiple of 64, else they are found through shared memory.
DEVICE void rotate(Attention& s, int which, bool slides, int lane, float (&x)[2 * CHUNKS]) {
  float other[2 * CHUNKS];
  if constexpr (ROTARY % 128 == 0) {
    constexpr int APART = ROTARY / 128;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) other[2 * c + i] = x[2 * (c < APART ? c + APART : c < 2 * APART ? c - APART : c) + i];
  } else {
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      *(float2*)(s.turning[which] + 64 * c + 2 * lane) = make_float2(x[2 * c], x[2 * c + 1]);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2 * CHUNKS; i++) {
      const int e = i / 2 * 64 + 2 * lane + i % 2;
      other[i] = s.turning[which][e < ROTARY / 2 ? e + ROTARY / 2 : e < ROTARY ? e - ROTARY / 2 : e];
    }
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const float2 co = *(const float2*)(s.cosine[slides] + 64 * c + 2 * lane),
                 si = *(const float2*)(s.sine[slides] + 64 * c + 2 * lane);
    x[2 * c] = x[2 * c] * co.x + other[2 * c] * si.x;
    x[2 * c + 1] = x[2 * c + 1] * co.y + other[2 * c + 1] * si.y;
  }
}
// One warp a head: q, k or v out of the exchange, normed, turned, scaled; into shared memory, and k and v into the
// cache.
DEVICE void prepare_head(const Args& a, Attention& s, const Place& p, int which, int layer, u32 tag, bool slides,
                         bool rotates, int lane) {
  const bool is_query = which < RATIO, is_key = which == RATIO;
  const int head = is_query ? p.head * RATIO + which : HEADS + (which - RATIO) * KV_HEADS + p.head;
  float x[2 * CHUNKS];
  float2 gamma[CHUNKS], shift[CHUNKS];
  if (QK_NORM && which <= RATIO) {  // before the wait: a miss to memory costs as much as the exchange
    const float* from = QK_NORM == 1 ? (is_query ? a.q_norm : a.k_norm) + layer * HEAD_DIM
                        : is_query   ? a.q_norm + (layer * HEADS + head) * HEAD_DIM
                                     : a.k_norm + (layer * KV_HEADS + p.head) * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      gamma[c] =
          64 * c + 2 * lane < HEAD_DIM ? __ldg((const float2*)(from + 64 * c + 2 * lane)) : make_float2(0.f, 0.f);
  }
  if (KEY_SHIFT && is_key && a.key_shift) {
    const float* from = a.key_shift + (layer * KV_HEADS + p.head) * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      shift[c] =
          64 * c + 2 * lane < HEAD_DIM ? __ldg((const float2*)(from + 64 * c + 2 * lane)) : make_float2(0.f, 0.f);
  }
  await_slice<CHUNKS>(a.qkv_words + head * HEAD_DIM, HEAD_DIM, tag, lane, x);
  if (QK_NORM && which <= RATIO) {
    float norm;
    if (QK_NORM == 1) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < 2 * CHUNKS; i++) squares += x[i] * x[i];
      norm = rsqrtf(warp_sum(squares) / HEAD_DIM + NORM_EPS);
    } else {
      constexpr int QUERY_TILES = HEADS * HEAD_DIM / 8, KEY_TILES = KV_HEADS * HEAD_DIM / 8;
      norm = norm_of_tiles(a.square_words + (is_query ? 0 : QUERY_TILES), is_query ? QUERY_TILES : KEY_TILES, tag, lane,
                           8 * (is_query ? QUERY_TILES : KEY_TILES));
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) x[2 * c] *= norm * gamma[c].x, x[2 * c + 1] *= norm * gamma[c].y;
  }
  if (rotates && which <= RATIO) rotate(s, which, slides, lane, x);
  if (KEY_SHIFT && is_key && a.key_shift)
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) x[2 * c] -= shift[c].x, x[2 * c + 1] -= shift[c].y;
  if (is_query) {
    const float scale = ATTENTION_CAP > 0.f ? SCORE_SCALE : SCORE_SCALE * LOG2_E;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
      *(float2*)(s.heads[which] + 64 * c + 2 * lane) = make_float2(x[2 * c] * scale, x[2 * c + 1] * scale);
    return;
  }
  const bool is_mine = p.first <= p.position && p.position < p.last;
  u16* cache =
      (is_key ? a.keys : a.values) + cache_row(a, layer, page_of(a, p.position, p.position), p.head, p.position);
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const u32 pair = to_bf16_pair(x[2 * c], x[2 * c + 1]);
    *(u32*)((is_key ? s.key : s.value) + 64 * c + 2 * lane) = pair;
    if (is_mine) *(u32*)(cache + 64 * c + 2 * lane) = pair;
  }
}

struct Partial {  // of a warp: running maximum, sum of weights, weighted sum of values, by head
  float most[SET_HEADS], weight[SET_HEADS], out[SET_HEADS][PADDED / 32];
};
// Adds 4 keys (of lanes 0-7, 8-15, ..) whose dot products are in `score`, summed over 8 lanes; -inf where there is
// none.
DEVICE void add_keys(Partial& r, float (&score)[SET_HEADS], const float (&v)[4][PADDED / 32]) {
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++) {
    float most = fmaxf(score[h], __shfl_xor_sync(~0u, score[h], 8));
    most = fmaxf(fmaxf(most, __shfl_xor_sync(~0u, most, 16)), r.most[h]);
    const float shrink = exp2f(r.most[h] - most);
    r.most[h] = most;
    score[h] = exp2f(score[h] - most);
    r.weight[h] = r.weight[h] * shrink + score[h];
#pragma unroll
    for (int i = 0; i < PADDED / 32; i++) r.out[h][i] *= shrink;
  }
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int h = 0; h < SET_HEADS; h++) {
      const float w = __shfl_sync(~0u, score[h], j * 8);
#pragma unroll
      for (int i = 0; i < PADDED / 32; i++) r.out[h][i] += w * v[j][i];
    }
}
DEVICE float shaped_score(float dot) { return ATTENTION_CAP > 0.f ? LOG2_E * capped(dot, ATTENTION_CAP) : dot; }

DEVICE void attend_keys(const Attention& s, const Place& p, const Keys& now, Partial& r,
                        const float (&q)[SET_HEADS][CHUNKS * 8], int token, int lane) {
  float score[SET_HEADS], v[4][PADDED / 32];
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++) {
    float d[4] = {0, 0, 0, 0};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      const u32 k[4] = {now.k[c].x, now.k[c].y, now.k[c].z, now.k[c].w};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        d[i & 1] += q[h][c * 8 + 2 * i] * bf16_low(k[i]);
        d[2 + (i & 1)] += q[h][c * 8 + 2 * i + 1] * bf16_high(k[i]);
      }
    }
    score[h] = (d[0] + d[1]) + (d[2] + d[3]);
  }
#pragma unroll
  for (int m = 1; m < 8; m *= 2)
#pragma unroll
    for (int h = 0; h < SET_HEADS; h++) score[h] += __shfl_xor_sync(~0u, score[h], m);
  const int key = token + lane / 8;
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++)
    score[h] = key >= p.start && key < p.last ? shaped_score(score[h]) : __int_as_float(0xff800000);
#pragma unroll
  for (int j = 0; j < 4; j++)
#pragma unroll
    for (int i = 0; i < PADDED / 64; i++) v[j][2 * i] = bf16_low(now.v[j][i]), v[j][2 * i + 1] = bf16_high(now.v[j][i]);
  add_keys(r, score, v);
}

DEVICE float norm_of_all(const float (&square)[WARPS], int count) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < WARPS; i++) sum += square[i];
  return rsqrtf(sum / count + NORM_EPS);
}

DEVICE void merge_warps(const Args& a, const Attention& s, const Place& p, u32 tag, int thread) {
  for (int e = thread; e < RATIO * PADDED; e += THREADS) {
    const int h = e / PADDED;
    float most = NO_SCORE, out = 0, weight = 0;
#pragma unroll
    for (int i = 0; i < KEY_WARPS; i++) most = fmaxf(most, s.most[i][h]);
#pragma unroll
    for (int i = 0; i < KEY_WARPS; i++) {
      const float f = exp2f(s.most[i][h] - most);
      out += f * s.out[i][h][e % PADDED], weight += f * s.weight[i][h];
    }
    publish(a.part_words + (p.head * SPLITS + p.split) * RATIO * PADDED + e, out, tag);
    if (e % PADDED < 2)
      publish(a.weight_words + ((p.head * SPLITS + p.split) * RATIO + h) * 2 + e % PADDED, e % PADDED ? weight : most,
              tag);
  }
}
// A block merges its slice of the group's elements, SPLITS lanes a pair of them.
DEVICE void merge_splits(const Args& a, const Place& p, u32 tag, int thread) {
  for (int t = thread; t < RATIO * PADDED / 2; t += THREADS) {
    const int z = t % SPLITS, e = p.split * (RATIO * PADDED / SPLITS) + t / SPLITS * 2, h = e / PADDED, at = e % PADDED;
    const u64* part = a.part_words + (p.head * SPLITS + z) * RATIO * PADDED + e;
    const u64* weights = a.weight_words + ((p.head * SPLITS + z) * RATIO + h) * 2;
    ulonglong2 x, w;
    u32 tries = 0;
    do {
      x = peek(part), w = peek(weights);
    } while ((!is_tagged(x, tag) || !is_tagged(w, tag)) && !is_over(tries));
    float most = value_of(w.x);
#pragma unroll
    for (int m = SPLITS / 2; m; m >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, m));
    const float f = exp2f(value_of(w.x) - most);
    float o0 = f * value_of(x.x), o1 = f * value_of(x.y), weight = f * value_of(w.y);
#pragma unroll
    for (int m = SPLITS / 2; m; m >>= 1) {
      o0 += __shfl_xor_sync(~0u, o0, m), o1 += __shfl_xor_sync(~0u, o1, m);
      weight += __shfl_xor_sync(~0u, weight, m);
    }
    u64* out = a.attention_words + (p.head * RATIO + h) * HEAD_DIM + at;
    if (SPLITS == 1) {
      if (at < HEAD_DIM) publish(out, o0 / weight, tag), publish(out + 1, o1 / weight, tag);
    } else if (z < 2 && at < HEAD_DIM)
      publish(out + z, (z ? o1 : o0) / weight, tag);
  }
}

// The first keys of a warp do not depend on this step: asked for before the wait for q, and those of the next layer
// brought into L2.
struct FirstPages {
  int page[2][DEPTH];  // [global, sliding layers][round]: the same in every layer
};
DEVICE int first_token(const Place& p, int warp, int round) {
  return min(p.first + (round * KEY_WARPS + warp / SETS) * 4, p.position & ~3);
}
DEVICE FirstPages first_pages(const Args& a, int position, int warp) {
  FirstPages f;
#pragma unroll
  for (int slides = 0; slides < 2; slides++)
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
      f.page[slides][i] = page_of(a, first_token(place_of(position, slides), warp, i), position);
  return f;
}

DEVICE void attend(const Args& a, Attention& s, int layer, int position, u32 tag, int flags, const FirstPages& pages,
                   const Block& b) {
  if (blockIdx.x >= KV_HEADS * SPLITS) return;
  constexpr int STRIDE = KEY_WARPS * 4;
  const int thread = b.thread, warp = b.warp, lane = b.lane, set = warp % SETS;
  const bool slides = flags & 1, rotates = flags & 2;
  const Place p = place_of(position, slides);
  Keys held[DEPTH];
#pragma unroll
  for (int i = 0; i < DEPTH; i++)
    load_keys(a, held[i], layer, slides ? pages.page[1][i] : pages.page[0][i], p.head, first_token(p, warp, i), lane);
#pragma unroll 1
  for (int which = warp; which < RATIO + 2; which += WARPS)
    prepare_head(a, s, p, which, layer, tag, slides, rotates, lane);
  consumers_barrier();
  mark(b, 12);
  float q[SET_HEADS][CHUNKS * 8];
  Partial r;
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++) {
    const float* from = s.heads[min(set * SET_HEADS + h, RATIO - 1)] + lane % 8 * 8;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 8; i += 4) *(float4*)(q[h] + c * 8 + i) = *(const float4*)(from + 64 * c + i);
    r.most[h] = NO_SCORE, r.weight[h] = 0;
#pragma unroll
    for (int i = 0; i < PADDED / 32; i++) r.out[h][i] = 0;
  }
#pragma unroll 1
  for (int token0 = p.first + warp / SETS * 4; token0 < p.last; token0 += DEPTH * STRIDE)
#pragma unroll
    for (int i = 0; i < DEPTH; i++) {
      const int token = token0 + i * STRIDE, later = token + DEPTH * STRIDE;
      if (token >= p.last) break;
      Keys now = held[i];
      if (later < p.last) load_keys(a, held[i], layer, page_of(a, later, position), p.head, later, lane);
      if (position - token < 4) take_new_key(s, now, position - token, lane);
      attend_keys(s, p, now, r, q, token, lane);
    }
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++) {
    const int head = set * SET_HEADS + h;
    r.weight[h] += __shfl_xor_sync(~0u, r.weight[h], 8);
    r.weight[h] += __shfl_xor_sync(~0u, r.weight[h], 16);
    if (head >= RATIO) continue;
#pragma unroll
    for (int i = 0; i < PADDED / 32; i++) s.out[warp / SETS][head][lane * (PADDED / 32) + i] = r.out[h][i];
    if (lane == 0) s.most[warp / SETS][head] = r.most[h], s.weight[warp / SETS][head] = r.weight[h];
  }
  mark(b, 13);
  consumers_barrier();
  merge_warps(a, s, p, tag, thread);
  mark(b, 14);
  merge_splits(a, p, tag, thread);
  mark(b, 15);
}
