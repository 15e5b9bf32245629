#include "decoder.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "pack.h"
#include "threads.h"

namespace hasten {
namespace {

// Adds the time between its making and its end to one line of the profile.
class Timer {
 public:
  Timer(Profile& profile, Profile::Op op) : into_(profile.seconds[op]), start_(Clock::now()) {}
  ~Timer() { into_ += std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  using Clock = std::chrono::steady_clock;
  double& into_;
  Clock::time_point start_;
};

void add_bias(const Linear& layer, float* row) {
  if (layer.bias == nullptr) return;
  for (int i = 0; i < layer.weight.rows; i++) row[i] += layer.bias[i];
}

// Rows of a few hundred floats: below this many a thread, waking another costs more than it saves.
constexpr int kTokenGrain = 2;

// From here on an MLP's two wide products no longer fit the caches whole.
constexpr int kManyTokens = 16;

void expect(bool good, const std::string& what) {
  if (!good) throw std::invalid_argument(what);
}

}  // namespace

const char* const Profile::kNames[kOps] = {"embed", "norm",    "qkv",   "rope+kv", "attention",
                                           "out",   "gate+up", "gated", "down",    "head"};

namespace {

// Whatever a configuration says, a step stays inside its buffers.
DecoderConfig checked(DecoderConfig c) {
  struct Range {
    const char* name;
    int value, low, high;
  };
  for (const Range& r :
       {Range{"vocab_size", c.vocab_size, 1, 1 << 24}, Range{"hidden_size", c.hidden_size, 1, 1 << 20},
        Range{"intermediate_size", c.intermediate_size, 1, 1 << 20}, Range{"layers", c.layers, 1, 1 << 14},
        Range{"heads", c.heads, 1, 1 << 14}, Range{"kv_heads", c.kv_heads, 1, 1 << 14},
        Range{"head_dim", c.head_dim, 1, kMostHeadDim}, Range{"window", c.window, 0, std::numeric_limits<int>::max()}})
    expect(r.low <= r.value && r.value <= r.high, r.name + (" must be from " + std::to_string(r.low)) + " to " +
                                                      std::to_string(r.high) + ", got " + std::to_string(r.value));
  expect(c.heads % c.kv_heads == 0, "heads must be a multiple of kv_heads");
  const size_t layers = c.layers, half = c.rope_global.size();
  expect(c.sliding.size() == layers && c.rope.size() == layers, "sliding and rope must have one flag a layer");
  expect(2 * half <= static_cast<size_t>(c.head_dim), "more rotary dimensions than head_dim");
  expect(c.rope_local.empty() || c.rope_local.size() == half, "rope_local must be as long as rope_global");
  expect(c.rope_long.empty() || c.rope_long.size() == half, "rope_long must be as long as rope_global");
  return c;
}

KvShape shape_of(const DecoderConfig& c, bool int8) { return {c.layers, c.kv_heads, round_up(c.head_dim, 32), int8}; }

int checked_pages(const KvShape& shape, int pages) {
  constexpr size_t kMost = size_t{1} << 47;  // bytes: what a process can address
  expect(pages > 0 && shape.page_bytes() <= kMost / static_cast<size_t>(pages),
         std::to_string(pages) + " pages of " + std::to_string(shape.page_bytes()) + " bytes");
  return pages;
}

}  // namespace

Decoder::Decoder(DecoderConfig config, int threads, int kv_pages, bool kv_int8)
    : config_(checked(std::move(config))),
      threads_(threads),
      cache_(shape_of(config_, kv_int8), checked_pages(shape_of(config_, kv_int8), kv_pages)),
      layers_(config_.layers) {
  ld_hidden_ = row_stride(config_.hidden_size, 4);
  ld_q_ = row_stride(config_.heads * config_.head_dim, 4);
  ld_kv_ = row_stride(config_.kv_heads * config_.head_dim, 4);
  ld_ffn_ = row_stride(config_.intermediate_size, 4);
}

void Decoder::reserve(int tokens) {
  if (tokens <= capacity_) return;
  pool().quiesce();  // late workers still read the buffers that move now
  const size_t n = tokens;
  residual_.resize(n * ld_hidden_);
  out_.resize(n * std::max(ld_hidden_, ld_q_));
  q_.resize(n * ld_q_);
  k_.resize(n * ld_kv_);
  v_.resize(n * ld_kv_);
  gate_.resize(std::min(tokens, kManyTokens) * ld_ffn_);
  up_.resize(std::min(tokens, kManyTokens) * ld_ffn_);
  acts_.reserve(tokens, std::max(config_.hidden_size, config_.heads * config_.head_dim));
  gated_.reserve(tokens, config_.intermediate_size);
  capacity_ = tokens;  // last: what is out of memory before it must not be taken for done
}

void Decoder::embed(const int32_t* tokens, int n) {
  const Timer timer(profile_, Profile::kEmbed);
  pool().split(threads_, n, 8, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) {
      float* row = &residual_[t * ld_hidden_];
      unpack_row(embed_.weight, tokens[t], row);
      if (config_.embed_scale != 1.0f)
        for (int i = 0; i < config_.hidden_size; i++) row[i] *= config_.embed_scale;
    }
  });
}

void Decoder::find_places(const std::vector<Span>& spans) {
  places_.clear();
  for (const Span& span : spans)
    for (int position = span.past; position < span.past + span.count; position++)
      places_.push_back({position, span.pages[position / kPageTokens], span.is_long});
}

// Cosines and sines of every packed token; once a step, all layers share them.
void Decoder::angles() {
  const size_t half = config_.rope_global.size(), n = places_.size();
  auto fill = [&](Angles& into, const std::vector<double>& normal, bool scaled) {
    into.cos.resize(n * half);
    into.sin.resize(n * half);
    pool().split(threads_, static_cast<int>(n), 16, [&](int begin, int end, int) {
      for (int t = begin; t < end; t++) {
        const bool is_long = scaled && places_[t].is_long;
        const std::vector<double>& frequency = is_long ? config_.rope_long : normal;
        const float scale = !scaled ? 1.0f : is_long ? config_.rope_long_scale : config_.rope_scale;
        for (size_t i = 0; i < half; i++) {
          const double angle = places_[t].position * frequency[i];
          into.cos[t * half + i] = static_cast<float>(std::cos(angle)) * scale;
          into.sin[t * half + i] = static_cast<float>(std::sin(angle)) * scale;
        }
      }
    });
  };
  const Timer timer(profile_, Profile::kRope);
  fill(global_, config_.rope_global, true);
  if (!config_.rope_local.empty()) fill(local_, config_.rope_local, false);
}

// Norms each residual row (where there is a norm) and puts it into the forms the readers need.
void Decoder::normed_activations(const float* norm, std::initializer_list<const Linear*> readers, int n) {
  const Timer timer(profile_, Profile::kNorm);
  acts_.shape(config_.hidden_size, readers, prefill_);
  pool().split(threads_, n, kTokenGrain, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) {
      const float* row = &residual_[t * ld_hidden_];
      if (norm != nullptr) {
        kernels().rms_norm(row, norm, config_.hidden_size, config_.norm_eps, &out_[t * ld_hidden_]);
        row = &out_[t * ld_hidden_];
      }
      acts_.set(t, row);
    }
  });
}

// Biases, norms of queries and keys, rotation, and the new keys and values into the cache.
void Decoder::rotate_and_store(int index) {
  const Timer timer(profile_, Profile::kRope);
  const Layer& layer = layers_[index];
  const int d = config_.head_dim, padded = cache_.shape().head_dim, half = static_cast<int>(config_.rope_global.size());
  const Angles& angles = config_.sliding[index] && !config_.rope_local.empty() ? local_ : global_;
  const Kernels& kernel = kernels();
  auto norm = [&](float* row, const float* weight, int size, int heads) {
    if (weight == nullptr) return;
    if (size != d) return kernel.rms_norm(row, weight, size, config_.norm_eps, row);
    for (int h = 0; h < heads; h++) kernel.rms_norm(row + h * d, weight, d, config_.norm_eps, row + h * d);
  };
  pool().split(threads_, static_cast<int>(places_.size()), kTokenGrain, [&](int begin, int end, int) {
    std::vector<float> head(2 * padded, 0.0f);  // key and value, padded with zeros
    for (int t = begin; t < end; t++) {
      const size_t token = t;
      const int page = places_[t].page, slot = places_[t].position % kPageTokens;
      float *q = &q_[token * ld_q_], *k = &k_[token * ld_kv_], *v = &v_[token * ld_kv_];
      add_bias(layer.q, q);
      add_bias(layer.k, k);
      add_bias(layer.v, v);
      norm(q, layer.q_norm, layer.q_norm_size, config_.heads);
      norm(k, layer.k_norm, layer.k_norm_size, config_.kv_heads);
      if (config_.rope[index]) {
        const float *cos = &angles.cos[token * half], *sin = &angles.sin[token * half];
        for (int h = 0; h < config_.heads; h++) kernel.rope(q + h * d, cos, sin, half);
        for (int h = 0; h < config_.kv_heads; h++) kernel.rope(k + h * d, cos, sin, half);
      }
      if (layer.key_scale != nullptr)  // what keys are divided by, queries are multiplied with
        for (int h = 0; h < config_.heads; h++) {
          const float* scale = &layer.key_scale[h / (config_.heads / config_.kv_heads) * d];
          for (int i = 0; i < d; i++) q[h * d + i] *= scale[i];
        }
      for (int h = 0; h < config_.kv_heads; h++) {
        std::copy_n(k + h * d, d, head.data());
        if (layer.key_shift != nullptr)
          for (int i = 0; i < d; i++) head[i] -= layer.key_shift[h * d + i];
        if (layer.key_scale != nullptr)
          for (int i = 0; i < d; i++) head[i] /= layer.key_scale[h * d + i];
        std::copy_n(v + h * d, d, head.data() + padded);
        cache_.write(index, page, h, slot, head.data(), head.data() + padded);
      }
    }
  });
}

// residual += layer(activations), through a norm of the result where the model has one.
void Decoder::project_back(const Linear& layer, const Activations& x, const float* post_norm, int n,
                           std::initializer_list<const Linear*> next) {
  if (post_norm == nullptr && layer.bias == nullptr) {
    linear({{&layer, residual_.data(), ld_hidden_, true}}, x, n, threads_, next);
    return;
  }
  linear({{&layer, out_.data(), ld_hidden_}}, x, n, threads_, next);
  pool().split(threads_, n, kTokenGrain, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) {
      float *row = &out_[t * ld_hidden_], *residual = &residual_[t * ld_hidden_];
      add_bias(layer, row);
      if (post_norm != nullptr) kernels().rms_norm(row, post_norm, config_.hidden_size, config_.norm_eps, row);
      for (int i = 0; i < config_.hidden_size; i++) residual[i] += row[i];
    }
  });
}

void Decoder::attention_block(int index, const std::vector<Span>& spans, int n) {
  const Layer& layer = layers_[index];
  normed_activations(layer.attn_norm, {&layer.q, &layer.k, &layer.v}, n);
  {
    const Timer timer(profile_, Profile::kQkv);
    linear({{&layer.q, q_.data(), ld_q_}, {&layer.k, k_.data(), ld_kv_}, {&layer.v, v_.data(), ld_kv_}}, acts_, n,
           threads_, {&layer.o});
  }
  rotate_and_store(index);
  {
    const Timer timer(profile_, Profile::kAttention);
    attention_.run({.cache = &cache_,
                    .layer = index,
                    .q = q_.data(),
                    .ldq = ld_q_,
                    .out = out_.data(),
                    .ldo = ld_q_,
                    .heads = config_.heads,
                    .head_dim = config_.head_dim,
                    .scale = config_.score_scale,
                    .window = config_.sliding[index] ? config_.window : 0,
                    .softcap = config_.attention_softcap},
                   spans, threads_);
  }
  const Timer timer(profile_, Profile::kOut);
  acts_.shape(config_.heads * config_.head_dim, {&layer.o}, prefill_);
  pool().split(threads_, n, kTokenGrain, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) acts_.set(t, &out_[t * ld_q_]);
  });
  project_back(layer.o, acts_, layer.post_attn_norm, n, {&layer.gate, &layer.up});
}

void Decoder::mlp_block(int index, int n) {
  const Layer& layer = layers_[index];
  normed_activations(layer.mlp_norm, {&layer.gate, &layer.up}, n);
  if (n > kManyTokens) {
    const Timer timer(profile_, Profile::kGateUp);
    gated_.shape(config_.intermediate_size, {&layer.down}, prefill_);
    linear_gated(layer.gate, layer.up, config_.gate, acts_, n, threads_, gated_);
  } else {
    gate_and_up(layer, n);
  }
  const Timer timer(profile_, Profile::kDown);
  if (index + 1 < config_.layers) {
    const Layer& after = layers_[index + 1];
    project_back(layer.down, gated_, layer.post_mlp_norm, n, {&after.q, &after.k, &after.v});
  } else {
    project_back(layer.down, gated_, layer.post_mlp_norm, n, {&head_layer()});
  }
}

void Decoder::gate_and_up(const Layer& layer, int n) {
  {
    const Timer timer(profile_, Profile::kGateUp);
    linear({{&layer.gate, gate_.data(), ld_ffn_}, {&layer.up, up_.data(), ld_ffn_}}, acts_, n, threads_, {&layer.down});
  }
  const Timer timer(profile_, Profile::kGated);
  gated_.shape(config_.intermediate_size, {&layer.down}, prefill_);
  pool().split(threads_, n, kTokenGrain, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) {
      float *gate = &gate_[t * ld_ffn_], *up = &up_[t * ld_ffn_];
      add_bias(layer.gate, gate);
      add_bias(layer.up, up);
      kernels().gated(config_.gate, gate, up, config_.intermediate_size);
      gated_.set(t, gate);
    }
  });
}

void Decoder::step(const int32_t* tokens, const std::vector<Span>& spans, const std::vector<int>& rows, bool prefill,
                   float* hidden) {
  prefill_ = prefill;
  int n = 0;
  for (const Span& span : spans) n += span.count;
  reserve(n);
  embed(tokens, n);
  find_places(spans);
  angles();
  for (int index = 0; index < config_.layers; index++) {
    attention_block(index, spans, n);
    mlp_block(index, n);
  }
  const Timer timer(profile_, Profile::kHead);
  pool().split(threads_, static_cast<int>(rows.size()), kTokenGrain, [&](int begin, int end, int) {
    for (int i = begin; i < end; i++)
      kernels().rms_norm(&residual_[rows[i] * ld_hidden_], final_norm_, config_.hidden_size, config_.norm_eps,
                         hidden + static_cast<size_t>(i) * config_.hidden_size);
  });
}

void Decoder::head(const float* hidden, int rows, float* logits) {
  const Timer timer(profile_, Profile::kHead);
  const Linear& layer = head_layer();
  const int vocab = config_.vocab_size, padded = round_up(vocab, kPanelRows);
  head_acts_.reserve(rows, config_.hidden_size);
  head_acts_.shape(config_.hidden_size, {&layer}, false);
  pool().split(threads_, rows, kTokenGrain, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) head_acts_.set(t, hidden + static_cast<size_t>(t) * config_.hidden_size);
  });
  // Whole panels are written: a vocabulary that is no multiple of 16 goes through a wider buffer.
  std::vector<float> wide(padded == vocab ? 0 : static_cast<size_t>(rows) * padded);
  linear({{&layer, wide.empty() ? logits : wide.data(), static_cast<size_t>(padded)}}, head_acts_, rows, threads_);
  if (wide.empty() && layer.bias == nullptr && config_.logit_softcap == 0) return;
  pool().split(threads_, rows, 1, [&](int begin, int end, int) {
    for (int t = begin; t < end; t++) {
      float* row = logits + static_cast<size_t>(t) * vocab;
      if (!wide.empty()) std::copy_n(&wide[static_cast<size_t>(t) * padded], vocab, row);
      add_bias(layer, row);
      if (config_.logit_softcap == 0) continue;
      for (int i = 0; i < vocab; i++) row[i] = config_.logit_softcap * std::tanh(row[i] / config_.logit_softcap);
    }
  });
}

}  // namespace hasten
