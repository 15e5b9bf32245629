// A dense decoder: one call computes the packed tokens of many sequences through all layers.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "linear.h"

namespace hasten {

// Variation points; see ModelConfig in src/hasten/core.py for what each is.
struct DecoderConfig {
  int vocab_size = 0, hidden_size = 0, intermediate_size = 0, layers = 0, heads = 0, kv_heads = 0, head_dim = 0;
  float norm_eps = 1e-6f;
  Gate gate = Gate::kSilu;
  float score_scale = 1, attention_softcap = 0, logit_softcap = 0, embed_scale = 1;
  int window = 0;                      // of sliding layers
  std::vector<uint8_t> sliding, rope;  // one flag a layer
  // Rotary frequencies in radians a token, [rotary_dim / 2]; `local` for sliding layers, `long` for spans that say so.
  std::vector<double> rope_global, rope_local, rope_long;
  float rope_scale = 1, rope_long_scale = 1;
};

struct Layer {
  Linear q, k, v, o, gate, up, down;
  const float *attn_norm = nullptr, *q_norm = nullptr, *k_norm = nullptr, *post_attn_norm = nullptr;
  const float *mlp_norm = nullptr, *post_mlp_norm = nullptr;
  const float* key_shift = nullptr;      // [kv_heads * head_dim], taken off rotated keys: see runtime/key_shift.py
  const float* key_scale = nullptr;      // [kv_heads * head_dim], what keys are divided by: see runtime/key_scale.py
  int q_norm_size = 0, k_norm_size = 0;  // head_dim: each head by itself; more: the whole projection
};

// Where a step's time goes, in seconds since the last reset.
struct Profile {
  enum Op { kEmbed, kNorm, kQkv, kRope, kAttention, kOut, kGateUp, kGated, kDown, kHead, kOps };
  static const char* const kNames[kOps];
  double seconds[kOps] = {};
};

class Decoder {
 public:
  // Throws std::invalid_argument on a configuration whose parts do not fit each other.
  Decoder(DecoderConfig config, int threads, int kv_pages, bool kv_int8);

  // Weights by canonical name ("layers.3.q", "layers.3.q.bias", "embed", "final_norm" ...). The memory stays the
  // caller's and must outlive the decoder. Throws std::invalid_argument on a name or a shape that does not fit.
  void set_linear(const std::string& name, const Packed& weight);
  void set_vector(const std::string& name, const float* values, int size);
  // Throws unless every part that each model needs is there.
  void check() const;

  // Computes the packed tokens; keys and values go into the cache.
  //   tokens [sum of counts]; spans describe the sequences in order.
  //   rows: indices into the packed tokens whose final hidden state is wanted.
  //   hidden: [rows][hidden_size], after the final norm.
  //   prefill: the tokens may take the kernels that are fastest for many (Kernels::linear_wide). A token's result does
  //   not depend on how many others are in the call, only on this flag.
  void step(const int32_t* tokens, const std::vector<Span>& spans, const std::vector<int>& rows, bool prefill,
            float* hidden);
  // logits [rows][vocab_size] of hidden states [rows][hidden_size], soft-capped.
  void head(const float* hidden, int rows, float* logits);

  const DecoderConfig& config() const { return config_; }
  KvCache& cache() { return cache_; }
  Profile& profile() { return profile_; }

 private:
  // Where a packed token belongs.
  struct Place {
    int position, page;
    bool is_long;
  };
  struct Angles {
    std::vector<float> cos, sin;  // [tokens][half]
  };

  void reserve(int tokens);
  void embed(const int32_t* tokens, int n);
  void find_places(const std::vector<Span>& spans);
  void angles();
  void attention_block(int index, const std::vector<Span>& spans, int n);
  void rotate_and_store(int index);
  void mlp_block(int index, int n);
  void normed_activations(const float* norm, std::initializer_list<const Linear*> readers, int n);
  void gate_and_up(const Layer& layer, int n);
  void project_back(const Linear& layer, const Activations& x, const float* post_norm, int n,
                    std::initializer_list<const Linear*> next);
  const Linear& head_layer() const { return head_.present() ? head_ : embed_; }

  DecoderConfig config_;
  int threads_;
  KvCache cache_;
  Linear embed_, head_;
  const float* final_norm_ = nullptr;
  std::vector<Layer> layers_;

  bool prefill_ = false;
  int capacity_ = 0;
  size_t ld_hidden_, ld_q_, ld_kv_, ld_ffn_;  // row strides, whole panels
  HugeVector<float> residual_, out_, q_, k_, v_, gate_, up_;
  Activations acts_, gated_, head_acts_;
  std::vector<Place> places_;  // of the step's tokens
  Angles global_, local_;
  Attention attention_;
  Profile profile_;
};

}  // namespace hasten
