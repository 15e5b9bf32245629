#include "int_ways.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <limits>
#include <stdexcept>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "linear.h"
#include "memory.h"
#include "threads.h"

namespace hasten {
namespace {

constexpr int kFormats = 32;  // bits 4, 5, 6, 8; groups 16, 32, 64, 128; symmetric or not

int format_index(const PackedFormat& format) {
  const int bits = format.bits == 8 ? 3 : format.bits - 4;
  const int group = format.group == 16 ? 0 : format.group == 32 ? 1 : format.group == 64 ? 2 : 3;
  return 8 * bits + 2 * group + (format.symmetric ? 1 : 0);
}

// Null: what the table in use takes where nothing was measured.
std::array<std::array<std::atomic<const IntWay*>, kRowClasses>, kFormats> choices{};

constexpr int kWarmUps = 3;     // bring the clock and the pages to where they stay
constexpr int kFairRounds = 2;  // every way is timed so often, however slow it seems
constexpr int kFewTokens = 8;   // up to here a real model's weights come from memory

// Puts a buffer out of all caches, as a model's other layers would have done.
void forget_lines(const uint8_t* data, size_t bytes) {
#if defined(__x86_64__)
  for (size_t i = 0; i < bytes; i += 64) _mm_clflush(data + i);
  _mm_mfence();
#elif defined(__aarch64__)
  for (size_t i = 0; i < bytes; i += 64) asm volatile("dc civac, %0" : : "r"(data + i) : "memory");
  asm volatile("dsb ish" : : : "memory");
#else
  (void)data, (void)bytes;
#endif
}

const IntWay* named(const std::string& name) {
  for (const IntWay* way : int_ways())
    if (name == way->name) return way;
  throw std::invalid_argument("no way of computing integer layers is called " + name);
}

}  // namespace

int row_class(int tokens) {
  int i = 0;
  while (i < kRowClasses - 1 && tokens > kClassRows[i]) i++;
  return i;
}

const IntWay& way_for(const PackedFormat& format, int tokens) {
  const int rows = row_class(tokens);
  const IntWay* way = choices[format_index(format)][rows].load(std::memory_order_relaxed);
  if (way != nullptr) return *way;
  const Kernels& k = kernels();
  return k.ways[k.usual_way[rows]];
}

void choose_way(const PackedFormat& format, int row_class, const std::string& name) {
  if (row_class < 0 || row_class >= kRowClasses) throw std::invalid_argument("no such class of token numbers");
  choices[format_index(format)][row_class] = named(name);
}

void forget_choices() {
  for (auto& format : choices)
    for (auto& choice : format) choice = nullptr;
}

std::vector<double> time_ways(const PackedFormat& format, int rows, int cols, int tokens, int threads, int rounds) {
  using Clock = std::chrono::steady_clock;
  const std::vector<const IntWay*>& ways = int_ways();
  HugeVector<uint8_t> data;
  data.resize(format.bytes(rows, cols));
  std::memset(data.data(), 0x2c, data.size());  // as fp16, a scale of 0.07
  const Linear layer{{format, rows, cols, data.data()}};
  Activations x;
  x.reserve(tokens, cols);
  x.shape(cols, {&layer}, false);
  std::vector<float> row(cols);
  for (int i = 0; i < cols; i++) row[i] = static_cast<float>(i % 15 - 7);
  for (int t = 0; t < tokens; t++) x.set(t, row.data());
  const size_t ldo = round_up(rows, kPanelRows);
  HugeVector<float> out;
  out.resize(ldo * tokens);
  std::vector<double> best(ways.size(), std::numeric_limits<double>::infinity());
  for (int i = 0; i < kWarmUps; i++) linear_by(*ways[0], {{&layer, out.data(), ldo}}, x, tokens, threads);
  for (int round = 0; round < rounds; round++)
    for (size_t i = 0; i < ways.size(); i++) {
      if (tokens < ways[i]->least || tokens > ways[i]->most) continue;
      if (round >= kFairRounds && best[i] > 1.3 * std::ranges::min(best)) continue;
      if (tokens <= kFewTokens) forget_lines(data.data(), data.size());
      const auto start = Clock::now();
      linear_by(*ways[i], {{&layer, out.data(), ldo}}, x, tokens, threads);
      best[i] = std::min(best[i], std::chrono::duration<double>(Clock::now() - start).count());
    }
  pool().quiesce();  // late workers still read what is freed now
  return best;
}

}  // namespace hasten
