#include "kv_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

namespace hasten {
namespace {

// Where a value of token t, dim d lies. See kv_cache.h.
inline int key_index(int t, int d, int head_dim) { return t / 16 * 16 * head_dim + d / 2 * 32 + t % 16 * 2 + d % 2; }
inline int value_index(int t, int d) { return d / 16 * 16 * kPageTokens + t / 2 * 32 + d % 16 * 2 + t % 2; }

// The nearest int8 of value * factor; 0 where the factor is.
inline uint8_t to_int8(float value, float factor) {
  return factor > 0 ? static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(value * factor))) : 0;
}

}  // namespace

KvCache::KvCache(KvShape shape, int pages) : shape_(shape), pages_(pages), bytes_(shape.page_bytes() * pages) {
  void* memory = mmap(nullptr, std::max<size_t>(bytes_, 1), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  memory_ = static_cast<uint8_t*>(memory);
}

KvCache::~KvCache() { munmap(memory_, std::max<size_t>(bytes_, 1)); }

void KvCache::write(int layer, int page, int head, int token, const float* key, const float* value) {
  const int n = shape_.head_dim;
  uint8_t* k = at(layer, page, head);
  uint8_t* v = k + shape_.side_bytes();
  if (!shape_.int8) {
    auto* keys = reinterpret_cast<bf16*>(k);
    auto* values = reinterpret_cast<bf16*>(v);
    for (int d = 0; d < n; d++) keys[key_index(token, d, n)] = float_to_bf16(key[d]);
    for (int d = 0; d < n; d++) values[value_index(token, d)] = float_to_bf16(value[d]);
    return;
  }
  // One scale for a token's row: the largest magnitude becomes 127.
  const float most_key = largest_magnitude(key, n), most_value = largest_magnitude(value, n);
  const float by_key = to_int8_factor(most_key), by_value = to_int8_factor(most_value);
  const float key_scale = most_key / 127.0f, value_scale = most_value / 127.0f;
  for (int d = 0; d < n; d++) {
    k[key_index(token, d, n)] = to_int8(key[d], by_key);
    v[value_index(token, d)] = to_int8(value[d], by_value);
  }
  std::memcpy(k + static_cast<size_t>(kPageTokens) * n + token * sizeof(float), &key_scale, sizeof(float));
  std::memcpy(v + static_cast<size_t>(kPageTokens) * n + token * sizeof(float), &value_scale, sizeof(float));
}

void KvCache::copy(int from, int to) {
  for (int layer = 0; layer < shape_.layers; layer++)
    std::memcpy(at(layer, to, 0), at(layer, from, 0), shape_.layer_bytes());
}

void KvCache::read(int page, uint8_t* out) const {
  for (int layer = 0; layer < shape_.layers; layer++, out += shape_.layer_bytes())
    std::memcpy(out, at(layer, page, 0), shape_.layer_bytes());
}

void KvCache::write(int page, const uint8_t* data) {
  for (int layer = 0; layer < shape_.layers; layer++, data += shape_.layer_bytes())
    std::memcpy(at(layer, page, 0), data, shape_.layer_bytes());
}

void KvCache::drop(int first, int count) {
  // madvise() takes whole system pages; what they share with pages that stay is kept.
  static const auto system_page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  for (int layer = 0; layer < shape_.layers; layer++) {
    const auto begin = reinterpret_cast<uintptr_t>(at(layer, first, 0));
    const uintptr_t end = begin + shape_.layer_bytes() * count;
    const uintptr_t from = (begin + system_page - 1) / system_page * system_page, to = end / system_page * system_page;
    if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_DONTNEED);  // a refusal only costs memory
  }
}

}  // namespace hasten
