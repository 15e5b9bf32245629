// Doors to single kernels of the table in use, for the tests that hold them to their twins.
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <thread>
#include <vector>

#include "attention.h"
#include "bind.h"
#include "int_ways.h"
#include "linear.h"
#include "threads.h"

namespace hasten {
namespace {

using Floats = Array<const float, 1>;
using Rows = Array<const float, 2>;
using Heads = Array<const float, 3>;  // [tokens, heads, head_dim]
using Ids = Array<const int32_t, 1>;

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

template <typename T>
auto owned(std::vector<T>&& values, std::initializer_list<size_t> shape) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::ndarray<nb::numpy, T>(kept->data(), shape, owner);
}

auto quantize(Rows x) {
  const size_t m = x.shape(0), cols = x.shape(1), padded = round_up(static_cast<int>(cols), 128);
  std::vector<int8_t> q(m * padded);
  std::vector<float> scale(m * padded / 32);
  std::vector<int32_t> nsum(m * padded / 32), nsum16(m * padded / 16);
  for (size_t t = 0; t < m; t++)
    kernels().quantize(x.data() + t * cols, static_cast<int>(cols), static_cast<int>(padded), &q[t * padded],
                       &scale[t * padded / 32], &nsum[t * padded / 32], &nsum16[t * padded / 16]);
  return std::make_tuple(owned(std::move(q), {m, padded}), owned(std::move(scale), {m, padded / 32}),
                         owned(std::move(nsum), {m, padded / 32}), owned(std::move(nsum16), {m, padded / 16}));
}

auto to_bf16(Floats x, size_t padded) {
  require(padded >= x.size() && padded % 32 == 0, "padded must be a multiple of 32 that holds x");
  std::vector<bf16> out(padded);
  kernels().to_bf16(x.data(), static_cast<int>(x.size()), static_cast<int>(padded), out.data());
  return owned(std::move(out), {padded});
}

auto int8_to_bf16(Array<const int8_t, 1> x) {
  require(x.size() % 32 == 0, "x must be a multiple of 32 values");
  std::vector<bf16> out(x.size());
  kernels().int8_to_bf16(x.data(), static_cast<int>(x.size()), out.data());
  return owned(std::move(out), {x.size()});
}

void linear_panels(Rows x, Array<const uint8_t, 1> data, int rows, int bits, int group, bool symmetric, int first,
                   int last, Array<float, 2> out, bool add, bool prefill) {
  const int m = static_cast<int>(x.shape(0)), cols = static_cast<int>(x.shape(1));
  const Packed w{{bits, group, symmetric}, rows, cols, data.data()};
  require(m > 0 && cols > 0 && data.size() == w.format.bytes(rows, cols), "packed data has the wrong size");
  require(0 <= first && first <= last && last <= w.panels(), "no such panels");
  require(out.shape(0) == x.shape(0) && out.shape(1) >= static_cast<size_t>(w.panels() * kPanelRows),
          "out is too small");
  Activations acts;
  acts.reserve(m, cols);
  const Linear layer{w};
  acts.shape(cols, {&layer}, prefill);
  for (int t = 0; t < m; t++) acts.set(t, x.data() + static_cast<size_t>(t) * cols);
  if (bits == 16)
    kernels().linear_bf16(w, first, last, acts.floats(), acts.stride(), m, out.data(), out.shape(1), add);
  else if (acts.wide())
    kernels().linear_wide(w, first, last, acts.floats(), acts.stride(), m, out.data(), out.shape(1), add);
  else
    way_for(w.format, m).run(w, first, last, acts.integers(), m, out.data(), out.shape(1), add);
}

auto rms_norm(Floats x, Floats weight, float eps, bool in_place) {
  require(x.size() == weight.size(), "x and weight differ in size");
  std::vector<float> out(x.data(), x.data() + x.size());
  kernels().rms_norm(in_place ? out.data() : x.data(), weight.data(), static_cast<int>(x.size()), eps, out.data());
  return owned(std::move(out), {x.size()});
}

auto gated(const std::string& kind, Floats gate, Floats up) {
  require(gate.size() == up.size(), "gate and up differ in size");
  std::vector<float> out(gate.data(), gate.data() + gate.size());
  kernels().gated(kind == "silu" ? Gate::kSilu : Gate::kGeluTanh, out.data(), up.data(), static_cast<int>(out.size()));
  return owned(std::move(out), {gate.size()});
}

auto rope(Floats head, Floats cos, Floats sin) {
  require(cos.size() == sin.size() && 2 * cos.size() <= head.size(), "more angles than pairs");
  std::vector<float> out(head.data(), head.data() + head.size());
  kernels().rope(out.data(), cos.data(), sin.data(), static_cast<int>(cos.size()));
  return owned(std::move(out), {head.size()});
}

int argmax(Floats x) { return kernels().argmax(x.data(), static_cast<int>(x.size())); }

// How often each index was handed out, and to how many different threads. The piece that holds index `fails` throws.
auto split(int threads, int count, int grain, int fails) {
  std::vector<std::atomic<int>> seen(count), used(threads);
  pool().split(threads, count, grain, [&](int begin, int end, int thread) {
    if (begin <= fails && fails < end) throw std::invalid_argument("a piece failed");
    for (int i = begin; i < end; i++) seen[i]++;
    used[thread]++;
  });
  int busy = 0;
  for (const auto& one : used) busy += one > 0;
  return std::make_tuple(owned(std::vector<int32_t>(seen.begin(), seen.end()), {static_cast<size_t>(count)}), busy);
}

// Squares of 0 .. pieces-1 through retake(). Piece `fails` throws on every thread but the caller's, piece `slow` sleeps
// there, as if the worker had lost its core.
struct Squares {
  std::thread::id caller;
  int* out;
  int fails, slow;
  void compute(int piece, ThreadPool::Scratch& scratch) const {
    if (std::this_thread::get_id() != caller) {
      if (piece == fails) throw std::bad_alloc();
      if (piece >= slow) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    scratch.assign(1, static_cast<float>(piece) * static_cast<float>(piece));
  }
  void commit(int piece, const ThreadPool::Scratch& scratch) const { out[piece] += static_cast<int>(scratch[0]); }
};

auto squares(int threads, int pieces, int fails, int slow) {
  require(pieces >= 0 && pieces <= ThreadPool::kMostPieces, "too many pieces");
  std::vector<int> out(pieces, 0);
  pool().retake(threads, pieces, Squares{std::this_thread::get_id(), out.data(), fails, slow});
  pool().quiesce();
  return owned(std::vector<int32_t>(out.begin(), out.end()), {static_cast<size_t>(pieces)});
}

// One layer of KV cache with attention over it.
class KernelCache {
 public:
  KernelCache(int kv_heads, int head_dim, int pages, bool int8)
      : head_dim_(head_dim), cache_({1, kv_heads, round_up(head_dim, 32), int8}, pages) {}

  void write(Heads keys, Heads values, int past, Ids table) {
    const size_t kv_heads = cache_.shape().heads, padded = cache_.shape().head_dim, d = head_dim_;
    require(keys.shape(1) == kv_heads && keys.shape(2) == d, "keys have the wrong shape");
    require(values.shape(0) == keys.shape(0) && values.shape(1) == kv_heads && values.shape(2) == d,
            "values have the wrong shape");
    check_table(table.data(), table.size(), past + keys.shape(0));
    std::vector<float> key(padded), value(padded);
    for (size_t t = 0; t < keys.shape(0); t++)
      for (size_t h = 0; h < kv_heads; h++) {
        std::copy_n(keys.data() + (t * kv_heads + h) * d, d, key.data());
        std::copy_n(values.data() + (t * kv_heads + h) * d, d, value.data());
        const size_t position = past + t;
        cache_.write(0, table.data()[position / kPageTokens], static_cast<int>(h),
                     static_cast<int>(position % kPageTokens), key.data(), value.data());
      }
  }

  // q [tokens, heads, head_dim] of the sequences one after another, `counts` tokens each after `pasts`.
  auto attend(Heads q, Ids counts, Ids pasts, Array<const int32_t, 2> tables, float scale, int window, float softcap,
              int threads) {
    const size_t tokens = q.shape(0), heads = q.shape(1), width = heads * head_dim_;
    require(q.shape(2) == static_cast<size_t>(head_dim_) && heads % cache_.shape().heads == 0,
            "queries have the wrong shape");
    require(counts.size() == pasts.size() && counts.size() == tables.shape(0),
            "counts, pasts and tables differ in length");
    std::vector<Span> spans;
    size_t first = 0;
    for (size_t i = 0; i < counts.size(); i++) {
      const int32_t* table = tables.data() + i * tables.shape(1);
      check_table(table, tables.shape(1), pasts.data()[i] + counts.data()[i]);
      spans.push_back({static_cast<int>(first), counts.data()[i], pasts.data()[i], table});
      first += counts.data()[i];
    }
    require(first == tokens, "counts do not add up to the tokens");
    std::vector<float> out(tokens * width);
    const AttentionCall call{.cache = &cache_,
                             .layer = 0,
                             .q = q.data(),
                             .ldq = width,
                             .out = out.data(),
                             .ldo = width,
                             .heads = static_cast<int>(heads),
                             .head_dim = head_dim_,
                             .scale = scale,
                             .window = window,
                             .softcap = softcap};
    attention_.run(call, spans, threads);
    return owned(std::move(out), {tokens, heads, static_cast<size_t>(head_dim_)});
  }

 private:
  void check_table(const int32_t* table, size_t size, size_t tokens) const {
    const size_t used = (tokens + kPageTokens - 1) / kPageTokens;
    require(used <= size, "the page table is too short");
    for (size_t p = 0; p < used; p++) require(table[p] >= 0 && table[p] < cache_.pages(), "a page is not in the cache");
  }

  int head_dim_;
  KvCache cache_;
  Attention attention_;
};

}  // namespace

void bind_kernels(nb::module_& parent) {
  nb::module_ m = parent.def_submodule("kernels", "Single kernels of the instruction set in use, for tests.");
  m.def("quantize", &quantize, nb::arg("x").noconvert(),
        "float32 [M, K] -> int8 [M, P], scales [M, P / 32], minus the sums over 32 and over 16 inputs; P = K up to "
        "128s.");
  m.def("to_bf16", &to_bf16, nb::arg("x").noconvert(), nb::arg("padded"), "float32 [n] -> uint16 [padded].");
  m.def("int8_to_bf16", &int8_to_bf16, nb::arg("x").noconvert(), "int8 [n] -> uint16 [n]; n is a multiple of 32.");
  m.def("linear", &linear_panels, nb::arg("x").noconvert(), nb::arg("packed").noconvert(), nb::arg("rows"),
        nb::arg("bits"), nb::arg("group"), nb::arg("symmetric"), nb::arg("first"), nb::arg("last"),
        nb::arg("out").noconvert(), nb::arg("add") = false, nb::arg("prefill") = false,
        "Panels first to last - 1 of packed weights [rows, K] times float32 [M, K], into out [M, ld].");
  m.def("rms_norm", &rms_norm, nb::arg("x").noconvert(), nb::arg("weight").noconvert(), nb::arg("eps"),
        nb::arg("in_place") = false);
  m.def("gated", &gated, nb::arg("kind"), nb::arg("gate").noconvert(), nb::arg("up").noconvert());
  m.def("rope", &rope, nb::arg("head").noconvert(), nb::arg("cos").noconvert(), nb::arg("sin").noconvert());
  m.def("argmax", &argmax, nb::arg("x").noconvert());
  m.def("split", &split, nb::arg("threads"), nb::arg("count"), nb::arg("grain") = 1, nb::arg("fails") = -1,
        "How often each of `count` indices was handed out, and how many threads got any.");
  m.def("squares", &squares, nb::arg("threads"), nb::arg("pieces"), nb::arg("fails") = -1, nb::arg("slow") = 1 << 30,
        "The square of each piece's number, computed by work that may be taken over from late workers.");
  nb::class_<KernelCache>(m, "KernelCache")
      .def(nb::init<int, int, int, bool>(), nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("pages"), nb::arg("int8"))
      .def("write", &KernelCache::write, nb::arg("keys").noconvert(), nb::arg("values").noconvert(), nb::arg("past"),
           nb::arg("table").noconvert())
      .def("attend", &KernelCache::attend, nb::arg("q").noconvert(), nb::arg("counts").noconvert(),
           nb::arg("pasts").noconvert(), nb::arg("tables").noconvert(), nb::arg("scale"), nb::arg("window") = 0,
           nb::arg("softcap") = 0.0f, nb::arg("threads") = 1);
}

}  // namespace hasten
