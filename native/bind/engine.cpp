// The decoder, and what else of the engine Python sees.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "checksum.h"
#include "decoder.h"
#include "memory.h"
#include "threads.h"

namespace hasten {
namespace {

void require(bool good, const char* what) {
  if (!good) throw std::invalid_argument(what);
}

DecoderConfig read_config(const nb::dict& d) {
  DecoderConfig c;
  auto number = [&](const char* key) { return nb::cast<double>(d[key]); };
  auto integer = [&](const char* key) { return nb::cast<int>(d[key]); };
  c.vocab_size = integer("vocab_size");
  c.hidden_size = integer("hidden_size");
  c.intermediate_size = integer("intermediate_size");
  c.layers = integer("layers");
  c.heads = integer("heads");
  c.kv_heads = integer("kv_heads");
  c.head_dim = integer("head_dim");
  c.norm_eps = static_cast<float>(number("norm_eps"));
  c.gate = nb::cast<std::string>(d["activation"]) == "silu" ? Gate::kSilu : Gate::kGeluTanh;
  c.score_scale = static_cast<float>(number("score_scale"));
  c.attention_softcap = static_cast<float>(number("attention_softcap"));
  c.logit_softcap = static_cast<float>(number("logit_softcap"));
  c.embed_scale = static_cast<float>(number("embed_scale"));
  c.window = integer("window");
  c.sliding = nb::cast<std::vector<uint8_t>>(d["sliding"]);
  c.rope = nb::cast<std::vector<uint8_t>>(d["rope"]);
  c.rope_global = nb::cast<std::vector<double>>(d["rope_global"]);
  c.rope_local = nb::cast<std::vector<double>>(d["rope_local"]);
  c.rope_long = nb::cast<std::vector<double>>(d["rope_long"]);
  c.rope_scale = static_cast<float>(number("rope_scale"));
  c.rope_long_scale = static_cast<float>(number("rope_long_scale"));
  require(c.heads % c.kv_heads == 0, "heads must be a multiple of kv_heads");
  require(c.head_dim <= 1024, "head_dim must be at most 1024");
  require(static_cast<int>(c.sliding.size()) == c.layers && static_cast<int>(c.rope.size()) == c.layers,
          "one flag a layer");
  require(2 * c.rope_global.size() <= static_cast<size_t>(c.head_dim), "more rotary dimensions than head_dim");
  return c;
}

// Keeps the arrays the decoder points into.
class PyDecoder {
 public:
  PyDecoder(const nb::dict& config, int threads, int pages, bool kv_int8)
      : decoder_(read_config(config), threads, pages, kv_int8) {}

  void set_linear(const std::string& name, Array<const uint8_t, 1> data, int rows, int cols, int bits, int group,
                  bool symmetric) {
    const PackedFormat format{bits, group, symmetric};
    require(data.size() == format.bytes(rows, cols), "packed data has the wrong size");
    decoder_.set_linear(name, {format, rows, cols, data.data()});
    kept_[name] = nb::cast(data);
  }
  void set_vector(const std::string& name, Array<const float, 1> values) {
    decoder_.set_vector(name, values.data(), static_cast<int>(values.size()));
    kept_[name] = nb::cast(values);
  }
  void check() const { decoder_.check(); }

  nb::ndarray<nb::numpy, float, nb::ndim<2>> step(Array<const int32_t, 1> tokens, Array<const int32_t, 1> counts,
                                                  Array<const int32_t, 1> pasts, Array<const int32_t, 2> tables,
                                                  Array<const uint8_t, 1> longs, Array<const int32_t, 1> rows,
                                                  bool prefill) {
    const int n = static_cast<int>(tokens.size()), hidden = decoder_.config().hidden_size;
    require(counts.size() == pasts.size() && counts.size() == tables.shape(0) && counts.size() == longs.size(),
            "counts, pasts, page tables and flags differ in length");
    for (int i = 0; i < n; i++)
      require(tokens.data()[i] >= 0 && tokens.data()[i] < decoder_.config().vocab_size,
              "a token id is not in the vocabulary");
    std::vector<Span> spans;
    int first = 0;
    for (size_t i = 0; i < counts.size(); i++) {
      const int count = counts.data()[i], past = pasts.data()[i];
      const int32_t* pages = tables.data() + i * tables.shape(1);
      require(count > 0 && past >= 0, "a sequence has no new tokens");
      const size_t used = (past + count + kPageTokens - 1) / kPageTokens;
      require(used <= tables.shape(1), "a page table is too short");
      for (size_t p = 0; p < used; p++)
        require(pages[p] >= 0 && pages[p] < decoder_.cache().pages(), "a page is not in the cache");
      const bool is_long = longs.data()[i] != 0;
      require(!is_long || decoder_.config().rope_long.size() == decoder_.config().rope_global.size(),
              "no long rotary frequencies");
      spans.push_back({first, count, past, pages, is_long});
      first += count;
    }
    require(first == n, "counts do not add up to the tokens");
    std::vector<int> wanted(rows.data(), rows.data() + rows.size());
    for (int row : wanted) require(row >= 0 && row < n, "a wanted row is not in the batch");
    float* out = new float[std::max<size_t>(wanted.size() * hidden, 1)];
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    {
      nb::gil_scoped_release release;
      decoder_.step(tokens.data(), spans, wanted, prefill, out);
    }
    return {out, {wanted.size(), static_cast<size_t>(hidden)}, owner};
  }

  nb::ndarray<nb::numpy, float, nb::ndim<2>> head(Array<const float, 2> hidden) {
    const size_t rows = hidden.shape(0), vocab = decoder_.config().vocab_size;
    require(hidden.shape(1) == static_cast<size_t>(decoder_.config().hidden_size),
            "hidden states have the wrong width");
    float* out = new float[std::max<size_t>(rows * vocab, 1)];
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
    if (rows > 0) {
      nb::gil_scoped_release release;
      decoder_.head(hidden.data(), static_cast<int>(rows), out);
    }
    return {out, {rows, vocab}, owner};
  }

  void copy_page(int from, int to) {
    const int pages = decoder_.cache().pages();
    require(from >= 0 && from < pages && to >= 0 && to < pages, "a page is not in the cache");
    decoder_.cache().copy(from, to);
  }
  size_t page_bytes() { return decoder_.cache().shape().page_bytes(); }
  nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> read_page(int page) {
    require(page >= 0 && page < decoder_.cache().pages(), "a page is not in the cache");
    auto* out = new uint8_t[page_bytes()];
    nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
    {
      nb::gil_scoped_release release;
      decoder_.cache().read(page, out);
    }
    return {out, {page_bytes()}, owner};
  }
  void write_page(int page, Array<const uint8_t, 1> data) {
    require(page >= 0 && page < decoder_.cache().pages(), "a page is not in the cache");
    require(data.size() == page_bytes(), "a page's data has the wrong size");
    nb::gil_scoped_release release;
    decoder_.cache().write(page, data.data());
  }

  void drop_pages(int first, int count) {
    const int pages = decoder_.cache().pages();
    require(first >= 0 && count >= 0 && count <= pages - first, "a page is not in the cache");
    nb::gil_scoped_release release;
    decoder_.cache().drop(first, count);
  }

  nb::dict profile(bool reset) {
    nb::dict out;
    for (int op = 0; op < Profile::kOps; op++) out[Profile::kNames[op]] = decoder_.profile().seconds[op];
    if (reset) decoder_.profile() = {};
    return out;
  }

 private:
  Decoder decoder_;
  std::map<std::string, nb::object> kept_;
};

nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> allocate(size_t bytes) {
  struct Block {
    uint8_t* memory;
    size_t bytes;
  };
  auto* block = new Block{allocate_huge(bytes), bytes};
  nb::capsule owner(block, [](void* p) noexcept {
    auto* mine = static_cast<Block*>(p);
    free_huge(mine->memory, mine->bytes);
    delete mine;
  });
  return {block->memory, {bytes}, owner};
}

// Checksums of consecutive pieces, computed side by side.
std::vector<uint64_t> checksums(Array<const uint8_t, 1> data, size_t piece, int threads) {
  require(piece > 0, "a piece must have bytes");
  const size_t bytes = data.size();
  const uint8_t* from = data.data();
  std::vector<uint64_t> out((bytes + piece - 1) / piece);
  nb::gil_scoped_release release;
  pool().split(threads, static_cast<int>(out.size()), 1, [&](int begin, int end, int) {
    for (size_t i = begin; i < static_cast<size_t>(end); i++)
      out[i] = xxh64(from + i * piece, std::min(piece, bytes - i * piece), 0);
  });
  return out;
}

}  // namespace

void bind_engine(nb::module_& m) {
  m.attr("PAGE_TOKENS") = kPageTokens;
  m.def("isas", &available_isas, "Instruction sets the engine can run here, best last.");
  m.def("isa", [] { return std::string(kernels().name); }, "The instruction set in use.");
  m.def("use_isa", &use_isa, nb::arg("name"), "Switch the instruction set; for tests that compare them.");
  m.def("allocate", &allocate, nb::arg("bytes"),
        "uint8 [bytes], zero-filled, on huge pages where the system gives them.");
  m.def("checksums", &checksums, nb::arg("data"), nb::arg("piece"), nb::arg("threads") = 1,
        "XXH64 with seed 0 of every `piece` bytes.");
  nb::class_<PyDecoder>(m, "Decoder")
      .def(nb::init<const nb::dict&, int, int, bool>(), nb::arg("config"), nb::arg("threads"), nb::arg("kv_pages"),
           nb::arg("kv_int8"))
      .def("set_linear", &PyDecoder::set_linear, nb::arg("name"), nb::arg("data").noconvert(), nb::arg("rows"),
           nb::arg("cols"), nb::arg("bits"), nb::arg("group"), nb::arg("symmetric"))
      .def("set_vector", &PyDecoder::set_vector, nb::arg("name"), nb::arg("values").noconvert())
      .def("check", &PyDecoder::check)
      .def("step", &PyDecoder::step, nb::arg("tokens"), nb::arg("counts"), nb::arg("pasts"), nb::arg("tables"),
           nb::arg("longs"), nb::arg("rows"), nb::arg("prefill"),
           "Packed tokens of many sequences through all layers -> hidden states [rows, E] after the final norm.")
      .def("head", &PyDecoder::head, nb::arg("hidden").noconvert(), "Hidden states [R, E] -> logits [R, V].")
      .def("copy_page", &PyDecoder::copy_page, nb::arg("source"), nb::arg("target"))
      .def_prop_ro("page_bytes", &PyDecoder::page_bytes)
      .def("read_page", &PyDecoder::read_page, nb::arg("page"), "A page's keys and values as uint8 [page_bytes].")
      .def("write_page", &PyDecoder::write_page, nb::arg("page"), nb::arg("data").noconvert(),
           "Put what read_page gave into a page.")
      .def("drop_pages", &PyDecoder::drop_pages, nb::arg("first"), nb::arg("count"),
           "Give the memory of consecutive pages back to the system; what they held is lost.")
      .def("profile", &PyDecoder::profile, nb::arg("reset") = true, "Seconds by operation since the last reset.");
}

}  // namespace hasten
