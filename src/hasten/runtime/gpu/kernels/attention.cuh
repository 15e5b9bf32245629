// Attention of one new token over paged keys and values: every KV head's context is split over SPLITS blocks, the
// warps of a block share its keys (and, where a group has many query heads, the heads), and partial results are merged
// twice: over the warps in shared memory, over the blocks through the exchange.
constexpr int RATIO = HEADS / KV_HEADS;                  // query heads of a KV head
constexpr int PADDED = round_up(HEAD_DIM, 64);           // head size in the cache and in shared memory
constexpr int CHUNKS = PADDED / 64;                      // 16-byte pieces of a key a lane holds
constexpr int MOST_HEADS = max_of(1, (WARPS > 8 ? 32 : 64) / (8 * CHUNKS));  // whose queries fit a warp's registers
COMPILE_TIME int head_sets() {
  int sets = 1;
  while (ceil_div(RATIO, sets) > MOST_HEADS) sets *= 2;
  return sets;
}
constexpr int SETS = head_sets(), SET_HEADS = ceil_div(RATIO, SETS), KEY_WARPS = WARPS / SETS;
constexpr int QKV_WORDS = (RATIO + 2) * HEAD_DIM;        // of the exchange that a block reads
constexpr int GAMMAS = QK_NORM == 0 ? 0 : QK_NORM == 1 ? 2 * HEAD_DIM : (RATIO + 1) * HEAD_DIM;
constexpr float LOG2_E = 1.4426950408889634f, NO_SCORE = -1e30f;
static_assert(WARPS % SETS == 0 && KV_HEADS * SPLITS <= BLOCKS && (SPLITS & (SPLITS - 1)) == 0 && SPLITS <= 32, "splits");
static_assert(HEAD_DIM % 8 == 0 && ROTARY % 2 == 0, "head size");

struct Attention {
  float raw[RATIO + 2][PADDED];     // q of the group's heads, k, v, as the product gave them; 0 past HEAD_DIM
  float gamma[RATIO + 1][PADDED];   // of the norms of q and k
  float cosine[2][PADDED], sine[2][PADDED];  // [global, sliding layers][element]; the sine has its sign, 1 and 0 past ROTARY
  float square[2][WARPS];           // sums of squares of all of q, of all of k
  float out[KEY_WARPS][RATIO][PADDED], most[KEY_WARPS][RATIO], weight[KEY_WARPS][RATIO];
};

struct Place {                      // of this block in the attention of one layer
  int head, split;                  // KV head
  int start, end, first, last;      // keys that count: [start, end); this block's: [first, last), first a multiple of 4
};
DEVICE Place place_of(int position, bool slides) {
  Place p;
  p.head = blockIdx.x / SPLITS, p.split = blockIdx.x % SPLITS;
  p.start = WINDOW && slides ? max(0, position + 1 - WINDOW) : 0, p.end = position;
  const int aligned = p.start & ~3, each = round_up(ceil_div(position - aligned, SPLITS), 4);  // 4 keys lie in one page
  p.first = aligned + p.split * each, p.last = min(position, p.first + each);
  return p;
}
DEVICE size_t cache_row(const Args& a, int layer, int page, int head, int token) {
  return (((size_t)layer * a.pages_held + page) * KV_HEADS + head) * PAGE * PADDED + (size_t)(token % PAGE) * PADDED;
}
DEVICE int page_of(const Args& a, int token, int position) { return __ldg(a.pages + min(token, position) / PAGE); }

struct Keys {                       // 4 keys and values of a warp, raw: a conversion would wait for the load
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
    if constexpr (PADDED == 64) load_global(at, r.v[j][0]);
    else if constexpr (PADDED == 128) load_global(at, r.v[j][0], r.v[j][1]);
    else if constexpr (PADDED == 256) {
      const uint4 x = load_global4(at);
      r.v[j][0] = x.x, r.v[j][1] = x.y, r.v[j][2] = x.z, r.v[j][3] = x.w;
    } else {
#pragma unroll
      for (int i = 0; i < PADDED / 64; i++) load_global(at + 2 * i, r.v[j][i]);
    }
  }
}

// Norm, rotation and scale of one head in shared memory -> this lane's elements 64 c + 8 (lane % 8) + i. Every warp does
// it for the heads it needs: cheaper than a second block barrier.
DEVICE void prepare_head(const Attention& s, int which, float norm, bool slides, bool rotates, float scale, int lane,
                         float (&out)[CHUNKS * 8]) {
  const float *raw = s.raw[which], *gamma = s.gamma[which];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < CHUNKS * 8; i++) {
    const int e = i / 8 * 64 + lane % 8 * 8 + i % 8;
    out[i] = raw[e];
    squares += out[i] * out[i];
  }
  if (QK_NORM == 1) {
#pragma unroll
    for (int m = 1; m < 8; m *= 2) squares += __shfl_xor_sync(~0u, squares, m);
    norm = rsqrtf(squares / HEAD_DIM + NORM_EPS);
  }
  if (QK_NORM) {
#pragma unroll
    for (int i = 0; i < CHUNKS * 8; i++) out[i] *= norm * gamma[i / 8 * 64 + lane % 8 * 8 + i % 8];
  }
  if (rotates) {
    float turned[CHUNKS * 8];
#pragma unroll
    for (int i = 0; i < CHUNKS * 8; i++) {
      const int e = i / 8 * 64 + lane % 8 * 8 + i % 8;
      float other;
      if constexpr (ROTARY == PADDED && ROTARY % 128 == 0) other = out[(i + CHUNKS * 4) % (CHUNKS * 8)];
      else {
        const int partner = e < ROTARY / 2 ? e + ROTARY / 2 : e < ROTARY ? e - ROTARY / 2 : e;
        other = raw[partner] * (QK_NORM ? norm * gamma[partner] : 1.f);
      }
      turned[i] = out[i] * s.cosine[slides][e] + other * s.sine[slides][e];
    }
#pragma unroll
    for (int i = 0; i < CHUNKS * 8; i++) out[i] = turned[i];
  }
#pragma unroll
  for (int i = 0; i < CHUNKS * 8; i++) out[i] *= scale;
}

struct Partial {                    // of a warp: running maximum, sum of weights, weighted sum of values, by head
  float most[SET_HEADS], weight[SET_HEADS], out[SET_HEADS][PADDED / 32];
};
// Adds 4 keys (of lanes 0-7, 8-15, ..) whose dot products are in `score`, summed over 8 lanes; -inf where there is none.
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

DEVICE void attend_old_keys(const Args& a, const Place& p, Keys next, Partial& r, const float (&q)[SET_HEADS][CHUNKS * 8],
                            int layer, int warp, int lane) {
  constexpr int STRIDE = KEY_WARPS * 4;
#pragma unroll 1
  for (int token = p.first + warp / SETS * 4; token < p.last; token += STRIDE) {
    const Keys now = next;
    if (token + STRIDE < p.last)
      load_keys(a, next, layer, page_of(a, token + STRIDE, p.end), p.head, token + STRIDE, lane);
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
}
// The token itself, from shared memory: rounded as the cache will hold it, and written there.
DEVICE void attend_new_key(const Args& a, const Attention& s, const Place& p, Partial& r,
                           const float (&q)[SET_HEADS][CHUNKS * 8], const float (&k)[CHUNKS * 8], int layer, int warp,
                           int lane) {
  float score[SET_HEADS], v[4][PADDED / 32] = {};
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++) {
    score[h] = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS * 8; i++) score[h] += q[h][i] * round_bf16(k[i]);
  }
#pragma unroll
  for (int m = 1; m < 8; m *= 2)
#pragma unroll
    for (int h = 0; h < SET_HEADS; h++) score[h] += __shfl_xor_sync(~0u, score[h], m);
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++) score[h] = lane < 8 ? shaped_score(score[h]) : __int_as_float(0xff800000);
#pragma unroll
  for (int i = 0; i < PADDED / 32; i++) v[0][i] = round_bf16(s.raw[RATIO + 1][lane * (PADDED / 32) + i]);
  add_keys(r, score, v);
  if (warp % SETS) return;
  const size_t row = cache_row(a, layer, page_of(a, p.end, p.end), p.head, p.end);
  if (lane < 8)
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
      uint4 w;
      w.x = to_bf16_pair(k[8 * c], k[8 * c + 1]), w.y = to_bf16_pair(k[8 * c + 2], k[8 * c + 3]);
      w.z = to_bf16_pair(k[8 * c + 4], k[8 * c + 5]), w.w = to_bf16_pair(k[8 * c + 6], k[8 * c + 7]);
      *(uint4*)(a.keys + row + c * 64 + lane * 8) = w;
    }
#pragma unroll
  for (int i = 0; i < PADDED / 64; i++)
    *(u32*)(a.values + row + lane * (PADDED / 32) + 2 * i) = to_bf16_pair(v[0][2 * i], v[0][2 * i + 1]);
}

// q, k, v of this block's heads out of the exchange into shared memory; weights of the norms with them.
DEVICE void await_heads(const Args& a, Attention& s, const Place& p, int layer, u32 tag, int thread, int warp, int lane) {
  constexpr int LOADS = ceil_div(max_of(GAMMAS, 1), THREADS);
  float gamma[LOADS];
#pragma unroll
  for (int i = 0; i < LOADS; i++) {  // before the wait: a miss to memory costs as much as the exchange
    const int e = i * THREADS + thread, which = e / HEAD_DIM, at = e % HEAD_DIM;
    if (e >= GAMMAS) continue;
    if (QK_NORM == 1) gamma[i] = __ldg((which ? a.k_norm : a.q_norm) + layer * HEAD_DIM + at);
    else if (which < RATIO) gamma[i] = __ldg(a.q_norm + layer * HEADS * HEAD_DIM + (p.head * RATIO + which) * HEAD_DIM + at);
    else gamma[i] = __ldg(a.k_norm + layer * KV_HEADS * HEAD_DIM + p.head * HEAD_DIM + at);
  }
  for (int e = 2 * thread; e < QKV_WORDS; e += 2 * THREADS) {
    const int which = e / HEAD_DIM, at = e % HEAD_DIM;
    const int head = which < RATIO ? p.head * RATIO + which : HEADS + (which - RATIO) * KV_HEADS + p.head;
    const ulonglong2 v = await(a.qkv_words + head * HEAD_DIM + at, tag);
    s.raw[which][at] = value_of(v.x), s.raw[which][at + 1] = value_of(v.y);
  }
  if (QK_NORM == 2) {
    float square[2] = {0, 0};
    for (int e = 2 * thread; e < (HEADS + KV_HEADS) * HEAD_DIM / 8; e += 2 * THREADS) {
      const ulonglong2 v = await(a.square_words + e, tag);
      const bool is_key = e >= HEADS * HEAD_DIM / 8, next_is_key = e + 1 >= HEADS * HEAD_DIM / 8;
      square[0] += (is_key ? 0.f : value_of(v.x)) + (next_is_key ? 0.f : value_of(v.y));
      square[1] += (is_key ? value_of(v.x) : 0.f) + (next_is_key ? value_of(v.y) : 0.f);
    }
    square[0] = warp_sum(square[0]), square[1] = warp_sum(square[1]);
    if (lane == 0) s.square[0][warp] = square[0], s.square[1][warp] = square[1];
  }
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const int e = i * THREADS + thread, which = e / HEAD_DIM, at = e % HEAD_DIM;
    if (e >= GAMMAS) continue;
    if (QK_NORM == 2) s.gamma[which][at] = gamma[i];
    else if (which) s.gamma[RATIO][at] = gamma[i];
    else
      for (int h = 0; h < RATIO; h++) s.gamma[h][at] = gamma[i];
  }
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
      publish(a.weight_words + ((p.head * SPLITS + p.split) * RATIO + h) * 2 + e % PADDED, e % PADDED ? weight : most, tag);
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
      count_try(tries);
    } while (!is_tagged(x, tag) || !is_tagged(w, tag));
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
    } else if (z < 2 && at < HEAD_DIM) publish(out + z, (z ? o1 : o0) / weight, tag);
  }
}

DEVICE void attend(const Args& a, Attention& s, int layer, int position, u32 tag, int flags, int first_page, const Block& b) {
  if (blockIdx.x >= KV_HEADS * SPLITS) return;
  const int thread = b.thread, warp = b.warp, lane = b.lane, set = warp % SETS;
  const bool slides = flags & 1, rotates = flags & 2;
  const Place p = place_of(position, slides);
  Keys next;  // old keys do not depend on this step: asked for before the wait
  load_keys(a, next, layer, first_page, p.head, min(p.first + warp / SETS * 4, p.end & ~3), lane);
  await_heads(a, s, p, layer, tag, thread, warp, lane);
  consumers_barrier();
  mark(b, 12);
  float q[SET_HEADS][CHUNKS * 8], q_norm = 1, k_norm = 1;
  if (QK_NORM == 2) q_norm = norm_of_all(s.square[0], HEADS * HEAD_DIM), k_norm = norm_of_all(s.square[1], KV_HEADS * HEAD_DIM);
  const float scale = ATTENTION_CAP > 0.f ? SCORE_SCALE : SCORE_SCALE * LOG2_E;
  Partial r;
#pragma unroll
  for (int h = 0; h < SET_HEADS; h++) {
    prepare_head(s, min(set * SET_HEADS + h, RATIO - 1), q_norm, slides, rotates, scale, lane, q[h]);
    r.most[h] = NO_SCORE, r.weight[h] = 0;
#pragma unroll
    for (int i = 0; i < PADDED / 32; i++) r.out[h][i] = 0;
  }
  attend_old_keys(a, p, next, r, q, layer, warp, lane);
  if (p.split == SPLITS - 1 && warp / SETS == KEY_WARPS - 1) {
    float k[CHUNKS * 8];
    prepare_head(s, RATIO, k_norm, slides, rotates, 1.f, lane, k);
    attend_new_key(a, s, p, r, q, k, layer, warp, lane);
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
