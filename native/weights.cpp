// The decoder's weights by their canonical names.
#include <stdexcept>

#include "decoder.h"

namespace hasten {
namespace {

struct Name {
  int layer = -1;    // -1: not of a layer
  std::string part;  // "q", "attn_norm", "embed" ...
  bool bias = false;
};

Name parse(const std::string& name, int layers) {
  Name parsed;
  std::string rest = name;
  if (rest.rfind("layers.", 0) == 0) {
    const size_t dot = rest.find('.', 7);
    parsed.layer = std::stoi(rest.substr(7, dot - 7));
    if (dot == std::string::npos || parsed.layer < 0 || parsed.layer >= layers)
      throw std::invalid_argument("no such weight: " + name);
    rest = rest.substr(dot + 1);
  }
  parsed.bias = rest.size() > 5 && rest.substr(rest.size() - 5) == ".bias";
  parsed.part = parsed.bias ? rest.substr(0, rest.size() - 5) : rest;
  return parsed;
}

Linear* linear_of(Layer& layer, const std::string& part) {
  if (part == "q") return &layer.q;
  if (part == "k") return &layer.k;
  if (part == "v") return &layer.v;
  if (part == "o") return &layer.o;
  if (part == "gate") return &layer.gate;
  if (part == "up") return &layer.up;
  if (part == "down") return &layer.down;
  return nullptr;
}

const float** norm_of(Layer& layer, const std::string& part) {
  if (part == "attn_norm") return &layer.attn_norm;
  if (part == "q_norm") return &layer.q_norm;
  if (part == "k_norm") return &layer.k_norm;
  if (part == "post_attn_norm") return &layer.post_attn_norm;
  if (part == "mlp_norm") return &layer.mlp_norm;
  if (part == "post_mlp_norm") return &layer.post_mlp_norm;
  return nullptr;
}

void expect(const std::string& name, const char* what, int got, int want) {
  if (got != want)
    throw std::invalid_argument(name + ": " + what + " is " + std::to_string(got) + ", must be " +
                                std::to_string(want));
}

// Rows of a linear layer: its outputs.
int rows_of(const DecoderConfig& c, const std::string& part) {
  if (part == "q") return c.heads * c.head_dim;
  if (part == "k" || part == "v") return c.kv_heads * c.head_dim;
  if (part == "gate" || part == "up") return c.intermediate_size;
  return part == "embed" || part == "head" ? c.vocab_size : c.hidden_size;
}

int columns_of(const DecoderConfig& c, const std::string& part) {
  return part == "o" ? c.heads * c.head_dim : part == "down" ? c.intermediate_size : c.hidden_size;
}

}  // namespace

void Decoder::set_linear(const std::string& name, const Packed& weight) {
  const Name parsed = parse(name, config_.layers);
  Linear* linear = parsed.layer >= 0        ? linear_of(layers_[parsed.layer], parsed.part)
                   : parsed.part == "embed" ? &embed_
                   : parsed.part == "head"  ? &head_
                                            : nullptr;
  if (linear == nullptr || parsed.bias) throw std::invalid_argument("no such linear layer: " + name);
  expect(name, "row count", weight.rows, rows_of(config_, parsed.part));
  expect(name, "column count", weight.cols, columns_of(config_, parsed.part));
  linear->weight = weight;
}

void Decoder::set_vector(const std::string& name, const float* values, int size) {
  const Name parsed = parse(name, config_.layers);
  if (parsed.layer < 0) {
    if (parsed.part != "final_norm") throw std::invalid_argument("no such vector: " + name);
    expect(name, "size", size, config_.hidden_size);
    final_norm_ = values;
    return;
  }
  Layer& layer = layers_[parsed.layer];
  if (parsed.bias) {
    Linear* linear = linear_of(layer, parsed.part);
    if (linear == nullptr) throw std::invalid_argument("no such bias: " + name);
    expect(name, "size", size, rows_of(config_, parsed.part));
    linear->bias = values;
    return;
  }
  if (parsed.part == "key_shift" || parsed.part == "key_scale") {
    expect(name, "size", size, config_.kv_heads * config_.head_dim);
    (parsed.part == "key_shift" ? layer.key_shift : layer.key_scale) = values;
    return;
  }
  const float** norm = norm_of(layer, parsed.part);
  if (norm == nullptr) throw std::invalid_argument("no such vector: " + name);
  const bool of_query = parsed.part == "q_norm", of_key = parsed.part == "k_norm";
  if (of_query || of_key) {
    const int heads = of_query ? config_.heads : config_.kv_heads;
    if (size != config_.head_dim) expect(name, "size", size, heads * config_.head_dim);
    (of_query ? layer.q_norm_size : layer.k_norm_size) = size;
  } else {
    expect(name, "size", size, config_.hidden_size);
  }
  *norm = values;
}

void Decoder::check() const {
  if (!embed_.present() || final_norm_ == nullptr) throw std::invalid_argument("embed or final_norm is missing");
  for (int i = 0; i < config_.layers; i++) {
    const Layer& layer = layers_[i];
    for (const Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down})
      if (!linear->present())
        throw std::invalid_argument("a linear layer of layer " + std::to_string(i) + " is missing");
    if ((layer.attn_norm == nullptr && layer.post_attn_norm == nullptr) ||
        (layer.mlp_norm == nullptr && layer.post_mlp_norm == nullptr))
      throw std::invalid_argument("a norm of layer " + std::to_string(i) + " is missing");
  }
}

}  // namespace hasten
