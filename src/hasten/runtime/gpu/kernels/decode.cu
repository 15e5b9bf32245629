// One decode step of one sequence as one persistent kernel: BLOCKS blocks, each of WARPS consumer warps and one warp
// that streams this block's weights of the whole step through a ring in shared memory and never waits for an
// activation. So memory works through every exchange between the blocks, as long as the ring is longer than the
// exchange.
//
// The residual stream lives in every block, a slice a warp: layers publish their outputs, and every warp adds its slice
// of them to its slice of the stream. Norms are applied to the sums (the norm's scale) and to the slice (its weights).
struct Residual {
  const float* before;  // weights of the norm in front of the product, or null
  const float* after;   // weights of the norm behind the layer whose output is added, or null
};

template <class P>
struct NormWeights {  // of a warp's slice
  float2 before[P::PAIRS], after[P::PAIRS];
};
template <class P>
DEVICE bool is_mine(const Block& b, int p) {
  if (P::SPAN * WARPS == P::COLS && P::SPAN % 64 == 0) return true;
  return p * 64 + 2 * b.lane < min(P::SPAN, P::COLS - b.warp * P::SPAN);
}
template <class P>
DEVICE void ask_norms(const Block& b, const Residual& norms, NormWeights<P>& w) {
#pragma unroll
  for (int p = 0; p < P::PAIRS; p++) {  // a miss to memory costs more than the exchange: asked for a phase ahead
    const int at = b.warp * P::SPAN + p * 64 + 2 * b.lane;
    w.before[p] = norms.before && is_mine<P>(b, p) ? __ldg((const float2*)(norms.before + at)) : make_float2(1.f, 1.f);
    if (NORM_AFTER)
      w.after[p] = norms.after && is_mine<P>(b, p) ? __ldg((const float2*)(norms.after + at)) : make_float2(1.f, 1.f);
  }
}
template <class P>
DEVICE void add_and_norm(Block& b, const u16* embedding, const NormWeights<P>& w, float (&v)[2 * P::PAIRS]) {
  float2 h[P::PAIRS];
#pragma unroll
  for (int p = 0; p < P::PAIRS; p++) h[p] = *(float2*)(b.s.residual[b.warp] + p * 64 + 2 * b.lane);
  if (embedding) {
#pragma unroll
    for (int p = 0; p < P::PAIRS; p++) {
      const u32 pair = is_mine<P>(b, p) ? __ldg((const u32*)(embedding + b.warp * P::SPAN + p * 64 + 2 * b.lane)) : 0;
      h[p] = make_float2(bf16_low(pair) * EMBED_SCALE, bf16_high(pair) * EMBED_SCALE);
    }
  } else {
    float scale = 1.f;
    if (NORM_AFTER) {
      float squares = 0;
#pragma unroll
      for (int i = 0; i < 2 * P::PAIRS; i++) squares += v[i] * v[i];
      squares = warp_sum(squares);
      if (b.lane == 0) b.s.squares_after[b.warp] = squares;
      consumers_barrier();
      scale = norm_of_all(b.s.squares_after, WIDTH);
    }
#pragma unroll
    for (int p = 0; p < P::PAIRS; p++) {
      h[p].x += NORM_AFTER ? v[2 * p] * scale * w.after[p].x : v[2 * p];
      h[p].y += NORM_AFTER ? v[2 * p + 1] * scale * w.after[p].y : v[2 * p + 1];
    }
  }
  float squares = 0;
#pragma unroll
  for (int p = 0; p < P::PAIRS; p++) {
    squares += h[p].x * h[p].x + h[p].y * h[p].y;
    *(float2*)(b.s.residual[b.warp] + p * 64 + 2 * b.lane) = h[p];
    v[2 * p] = h[p].x * w.before[p].x, v[2 * p + 1] = h[p].y * w.before[p].y;
  }
  squares = warp_sum(squares);
  if (b.lane == 0) b.s.squares[b.warp] = squares;
}
DEVICE float bias_of(const float* bias, int row) { return bias ? __ldg(bias + row) : 0.f; }

DEVICE void qkv_product(Block& b, const Args& a, int layer, u32 tag, const u16* embedding) {
  const Residual norms = {NORM_BEFORE ? a.attn_norm + layer * WIDTH : nullptr,
                          NORM_AFTER && layer ? a.post_mlp_norm + (layer - 1) * WIDTH : nullptr};
  NormWeights<Qkv> weights;
  product<Qkv>(
      b, {a.down_words, tag - 1, layer > 0, RANKS}, [&] { ask_norms<Qkv>(b, norms, weights); },
      [&](float (&v)[2 * Qkv::PAIRS]) { add_and_norm<Qkv>(b, layer ? nullptr : embedding, weights, v); },
      [&](int row, float sum, float) {
        const float norm = NORM_BEFORE ? norm_of_all(b.s.squares, WIDTH) : 1.f;
        sum *= norm;
        if (BIAS_QKV) sum += bias_of(a.qkv_bias + layer * Qkv::ROWS, row);
        publish(a.qkv_words + row, sum, tag);  // rows are a multiple of 8
        if (QK_NORM == 2) {
          float square = sum * sum;
#pragma unroll
          for (int m = 1; m < 8; m *= 2) square += __shfl_xor_sync(0xffu << (b.lane & 24), square, m);
          if (b.thread % 8 == 0 && row < (HEADS + KV_HEADS) * HEAD_DIM) publish(a.square_words + row / 8, square, tag);
        }
      });
}
DEVICE void out_product(Block& b, const Args& a, int layer, u32 tag) {
  product<OutProduct>(
      b, {a.attention_words, tag, true}, [] {}, [](float (&)[2 * OutProduct::PAIRS]) {},
      [&](int row, float sum, float) {
        if (row >= WIDTH) return;
        if (BIAS_O) sum += bias_of(a.o_bias + layer * WIDTH, row);
        publish_to_all(a.out_peers, row, sum, tag);
      });
}
DEVICE void gate_up_product(Block& b, const Args& a, int layer, u32 tag) {
  const Residual norms = {NORM_BEFORE ? a.mlp_norm + layer * WIDTH : nullptr,
                          NORM_AFTER ? a.post_attn_norm + layer * WIDTH : nullptr};
  NormWeights<GateUp> weights;
  product<GateUp>(
      b, {a.out_words, tag, true, RANKS}, [&] { ask_norms<GateUp>(b, norms, weights); },
      [&](float (&v)[2 * GateUp::PAIRS]) { add_and_norm<GateUp>(b, nullptr, weights, v); },
      [&](int row, float gate, float up) {
        if (row >= FEED) return;
        const float norm = NORM_BEFORE ? norm_of_all(b.s.squares, WIDTH) : 1.f;
        gate *= norm, up *= norm;
        if (BIAS_GATE_UP) {
          gate += bias_of(a.gate_up_bias + layer * 2 * FEED, row);
          up += bias_of(a.gate_up_bias + layer * 2 * FEED + FEED, row);
        }
        publish(a.feed_words + row, activated(gate) * up, tag);
      });
}
DEVICE void down_product(Block& b, const Args& a, int layer, u32 tag) {
  product<Down>(
      b, {a.feed_words, tag, true}, [] {}, [](float (&)[2 * Down::PAIRS]) {},
      [&](int row, float sum, float) {
        if (row >= WIDTH) return;
        if (BIAS_DOWN) sum += bias_of(a.down_bias + layer * WIDTH, row);
        publish_to_all(a.down_peers, row, sum, tag);
      });
}
DEVICE bool is_better(float v, int row, float than, int than_row) { return v > than || (v == than && row < than_row); }
DEVICE void keep_best(float& best, int& best_row) {  // of a warp; the lowest row among equals
#pragma unroll
  for (int m = 16; m; m >>= 1) {
    const float v = __shfl_xor_sync(~0u, best, m);
    const int row = __shfl_xor_sync(~0u, best_row, m);
    if (is_better(v, row, best, best_row)) best = v, best_row = row;
  }
}
DEVICE void keep_block_best(Block& b, float& best, int& best_row) {
  keep_best(best, best_row);
  if (b.lane == 0) b.s.best[b.warp] = best, b.s.best_row[b.warp] = best_row;
  consumers_barrier();
#pragma unroll
  for (int i = 0; i < WARPS; i++)
    if (is_better(b.s.best[i], b.s.best_row[i], best, best_row)) best = b.s.best[i], best_row = b.s.best_row[i];
}
DEVICE void head_product(Block& b, const Args& a, u32 tag) {
  float best = -3e38f;
  int best_row = 0x7fffffff;
  const Residual norms = {a.final_norm, NORM_AFTER ? a.post_mlp_norm + (LAYERS - 1) * WIDTH : nullptr};
  NormWeights<Head> weights;
  product<Head>(
      b, {a.down_words, tag - 1, true, RANKS}, [&] { ask_norms<Head>(b, norms, weights); },
      [&](float (&v)[2 * Head::PAIRS]) { add_and_norm<Head>(b, nullptr, weights, v); },
      [&](int row, float sum, float) {
        if (row >= VOCAB) return;
        sum *= norm_of_all(b.s.squares, WIDTH);
        if (LOGIT_CAP > 0.f) sum = capped(sum, LOGIT_CAP);
        if (a.logits) a.logits[row] = sum;
        const bool is_number = sum == sum;  // one that is none is better than all, and stands in no row
        const float value = is_number ? sum : __int_as_float(0x7f800000);
        const int place = is_number ? row : -1;
        if (is_better(value, place, best, best_row)) best = value, best_row = place;
      });
  keep_block_best(b, best, best_row);
  if (b.thread == 0) {
    publish_to_all(a.best_peers, 2 * blockIdx.x, best, tag);
    const int token = best_row >= 0 && best_row < VOCAB ? FIRST_TOKEN + best_row : best_row;
    publish_to_all(a.best_peers, 2 * blockIdx.x + 1, __int_as_float(token), tag);
  }
}
DEVICE int greedy_token(Block& b, const Args& a, u32 tag) {
  float best = -3e38f;
  int best_row = 0x7fffffff;
  for (int i = b.thread; i < RANKS * BLOCKS; i += THREADS) {
    const ulonglong2 v = await(a.best_words + 2 * i, tag);
    if (is_better(value_of(v.x), (int)(u32)v.y, best, best_row)) best = value_of(v.x), best_row = (int)(u32)v.y;
  }
  consumers_barrier();  // the block's own best has been read by all
  keep_block_best(b, best, best_row);
  return best_row < TOKENS ? best_row : 0;  // -1: a logit is no number; 0: all are minus infinity
}

constexpr int RING_BYTES = SLOTS * SLOT_BYTES, SHARED_AT = RING_BYTES,
              ATTENTION_AT = round_up(SHARED_AT + sizeof(Shared), 128);
extern __shared__ __align__(128) u8 shared_memory[];
__constant__ unsigned char layer_kinds[LAYERS] = {LAYER_FLAGS};  // 1: slides, 2: rotates

// What the host must agree with: shared memory, threads, then bytes of a tile of qkv, o, gate/up, down, head.
extern "C" __constant__ int layout[8] = {ATTENTION_AT + (int)sizeof(Attention),
                                         ALL_THREADS,
                                         Qkv::TILE_BYTES,
                                         OutProduct::TILE_BYTES,
                                         GateUp::TILE_BYTES,
                                         Down::TILE_BYTES,
                                         Head::TILE_BYTES,
                                         PADDED};

DEVICE void set_up(Block& b, Attention& s) {
  if (threadIdx.x == 0)
    for (int i = 0; i < SLOTS; i++) {
      init_mbarrier(shared_address(&b.s.full[i]), 1);
      init_mbarrier(shared_address(&b.s.empty[i]), WARPS);
    }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  for (int i = threadIdx.x; i < WARPS * round_up(WIDTH_SPAN, 64); i += ALL_THREADS) ((float*)b.s.residual)[i] = 0;
}
DEVICE void load_rotation(const Args& a, Attention& s, int position) {
  for (int i = threadIdx.x; i < 2 * PADDED; i += ALL_THREADS) {
    const int kind = i / PADDED, e = i % PADDED, at = (kind * a.positions + position) * (ROTARY / 2) + e % (ROTARY / 2);
    s.cosine[kind][e] = e < ROTARY ? __ldg(a.cosines + at) : 1.f;
    s.sine[kind][e] = e < ROTARY ? (e < ROTARY / 2 ? -1.f : 1.f) * __ldg(a.sines + at) : 0.f;
  }
}

template <class Visit>
DEVICE void walk_step(const Args& a, Visit visit) {  // everything this block streams, in order
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    walk<Qkv>(a.qkv + (size_t)layer * Qkv::TILES * Qkv::TILE_BYTES, visit);
    walk<OutProduct>(a.o + (size_t)layer * OutProduct::TILES * OutProduct::TILE_BYTES, visit);
    walk<GateUp>(a.gate_up + (size_t)layer * GateUp::TILES * 2 * GateUp::TILE_BYTES, visit);
    walk<Down>(a.down + (size_t)layer * Down::TILES * Down::TILE_BYTES, visit);
  }
  walk<Head>(a.head, visit);
}
DEVICE void stream_weights(Block& b, const Args& a) {
  const u64 policy = read_once_policy();
  u32 asked = 0;
  walk_step(a, [&](const u8* from, u32 bytes) {
    const u32 full = shared_address(&b.s.full[b.slot]);
    wait_mbarrier(shared_address(&b.s.empty[b.slot]), b.parity ^ 1);
    if (IN_FLIGHT && asked >= IN_FLIGHT)  // fewer copies in flight: the exchange is faster, memory slower
      wait_mbarrier(shared_address(&b.s.full[(asked - IN_FLIGHT) % SLOTS]), (asked - IN_FLIGHT) / SLOTS & 1);
    expect_bytes(full, bytes);
    bulk_copy(b.ring + b.slot * SLOT_BYTES, from, bytes, full, policy);
    asked++;
    next_slot(b);
  });
}
// Norm weights are small and read by all blocks: into L2 before the first of them is asked for.
DEVICE void bring_norms(const Args& a, int lane) {
  auto bring = [&](const float* from, int count) {
    if (!from) return;
    for (int at = (blockIdx.x * 32 + lane) * 32; at < count; at += BLOCKS * 32 * 32)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
  };
  bring(a.attn_norm, LAYERS * WIDTH), bring(a.mlp_norm, LAYERS * WIDTH);
  bring(a.post_attn_norm, LAYERS * WIDTH), bring(a.post_mlp_norm, LAYERS * WIDTH), bring(a.final_norm, WIDTH);
  bring(a.q_norm, LAYERS * HEAD_DIM * (QK_NORM == 2 ? HEADS : 1));
  bring(a.k_norm, LAYERS * HEAD_DIM * (QK_NORM == 2 ? KV_HEADS : 1));
  if (KEY_SHIFT) bring(a.key_shift, LAYERS * KV_HEADS * HEAD_DIM);
}

DEVICE void consume(Block& b, Attention& attention, const Args& a, int token, int position, u32 epoch) {
  const u16* embedding = a.embedding + (size_t)token * WIDTH;
  FirstPages pages = {};
  if (blockIdx.x < KV_HEADS * SPLITS) pages = first_pages(a, position, b.warp);
#pragma unroll 1
  for (int layer = 0; layer < LAYERS; layer++) {
    const u32 tag = epoch * (LAYERS + 1) + layer + 1;
    const int kind = layer_kinds[layer];
    b.trace = a.trace + (blockIdx.x * (LAYERS + 1) + layer) * 16;
    qkv_product(b, a, layer, tag, embedding);
    attend(a, attention, layer, position, tag, kind, pages, b);
    out_product(b, a, layer, tag);
    gate_up_product(b, a, layer, tag);
    down_product(b, a, layer, tag);
  }
  const u32 tag = (epoch + 1) * (LAYERS + 1);
  b.trace += 16;
  head_product(b, a, tag);
  if (blockIdx.x) return;
  const int next = greedy_token(b, a, tag);
  if (b.thread == 0) {
    a.tokens[position + 1] = next;
    a.state[0] = max_of(next, 0), a.state[1] = position + 1, a.state[2] = (int)(epoch + 1);
  }
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1) decode_step(const __grid_constant__ Args a) {
  Shared& s = *(Shared*)(shared_memory + SHARED_AT);
  Attention& attention = *(Attention*)(shared_memory + ATTENTION_AT);
  Block b{s,
          shared_address(shared_memory),
          (int)threadIdx.x / 32,
          (int)threadIdx.x % 32,
          (int)threadIdx.x,
          0,
          0,
          0,
          (u32)a.state[3],
          nullptr};
  const int token = a.state[0], position = a.state[1];
  const u32 epoch = (u32)a.state[2];
  set_up(b, attention);
  load_rotation(a, attention, position);
  __syncthreads();
  // Registers are handed out by quarters of a multiprocessor: a whole group of 4 warps streams, though one lane of it
  // works, so that it can give its registers to the consumers (needs sm_90a).
  if (__shfl_sync(~0u, b.warp, 0) >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (b.thread == THREADS)
      stream_weights(b, a);
    else if (b.warp == WARPS + 1)
      bring_norms(a, b.lane);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
    consume(b, attention, a, token, position, epoch);
  }
}
