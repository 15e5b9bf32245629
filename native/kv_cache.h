// Paged keys and values of all layers. A page holds kPageTokens tokens of every layer and KV head; which pages a
// sequence owns is the caller's business.
//
// Within a page, keys of a head lie as [tokens / 16][dims / 2][16 tokens][2 dims] and values as
// [dims / 16][tokens / 2][16 dims][2 tokens]: the layout of packed bf16 weights, so that attention runs on the same
// tiles. int8 pages have the same order with one byte a value and one float scale a token and head, for keys and for
// values.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa/kernels.h"

namespace hasten {

struct KvShape {
  int layers = 0;
  int heads = 0;     // KV heads
  int head_dim = 0;  // padded to a multiple of 32
  bool int8 = false;

  size_t side_bytes() const {  // keys or values of one head in one page
    return static_cast<size_t>(kPageTokens) * (int8 ? head_dim + sizeof(float) : 2 * head_dim);
  }
  size_t layer_bytes() const { return 2 * side_bytes() * heads; }  // of one page
  size_t page_bytes() const { return layer_bytes() * layers; }
};

class KvCache {
 public:
  // Reserves address space for `pages`; memory is only used once a page is written.
  KvCache(KvShape shape, int pages);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  const KvShape& shape() const { return shape_; }
  int pages() const { return pages_; }

  // Writes one token's key and value of one head, head_dim floats each, into slot `token` of a page.
  void write(int layer, int page, int head, int token, const float* key, const float* value);

  const uint8_t* keys(int layer, int page, int head) const { return at(layer, page, head); }
  const uint8_t* values(int layer, int page, int head) const { return at(layer, page, head) + shape_.side_bytes(); }

  // Copies a page, all layers and heads.
  void copy(int from, int to);
  // The same out of and into memory of page_bytes(): all of layer 0, then layer 1, ... The bytes mean the same in any
  // page of any cache of this shape.
  void read(int page, uint8_t* out) const;
  void write(int page, const uint8_t* data);
  // Gives the memory of pages [first, first + count) back to the system. Their content is lost: each byte is zero, or
  // what it was where it shares a system page with a neighbour. They take memory again once they are written.
  void drop(int first, int count);

 private:
  uint8_t* at(int layer, int page, int head) const {
    return memory_ + ((static_cast<size_t>(layer) * pages_ + page) * shape_.heads + head) * 2 * shape_.side_bytes();
  }

  KvShape shape_;
  int pages_;
  size_t bytes_;
  uint8_t* memory_;
};

}  // namespace hasten
