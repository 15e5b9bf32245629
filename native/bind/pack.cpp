#include "pack.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cmath>
#include <memory>
#include <optional>

#include "arrays.h"
#include "calls.h"
#include "threads.h"

namespace hasten {

namespace {

using Bytes = Input<uint8_t, 1>;
using Order = Input<int64_t, 1>;
using Ids = Input<int32_t, 1>;
using Floats = Owned<float>;

const DtypeInfo& dtype_named(const std::string& name) {
  const DtypeInfo* info = find_dtype(name);
  require(info != nullptr, "unknown dtype " + name);
  return *info;
}

PackedFormat checked_format(int bits, int group, bool symmetric) {
  require(bits == 16 || bits == 8 || (bits >= 4 && bits <= 6), "bits must be 16, 8, 6, 5 or 4");
  require(bits == 16 || group == 16 || group == 32 || group == 64 || group == 128, "group must be 16, 32, 64 or 128");
  return {bits, group, symmetric};
}

WeightSource checked_source(const Bytes& data, const std::string& dtype, int rows, int cols,
                            const std::optional<Order>& row_order, float offset) {
  const DtypeInfo& info = dtype_named(dtype);
  require(rows > 0 && cols > 0, "rows and cols must be positive");
  require(cols % info.block == 0, "cols must be a multiple of " + std::to_string(info.block) + " for " + dtype);
  const size_t wanted = bytes_of(info, static_cast<size_t>(rows) * cols);
  require(data.size() == wanted,
          "data has " + std::to_string(data.size()) + " bytes, must have " + std::to_string(wanted));
  if (row_order) {
    require(row_order->size() == static_cast<size_t>(rows), "row_order must have one entry a row");
    for (int r = 0; r < rows; ++r)
      require(row_order->data()[r] >= 0 && row_order->data()[r] < rows, "row_order is out of range");
  }
  return {info.dtype, data.data(), rows, cols, row_order ? row_order->data() : nullptr, offset};
}

void check_out(const Array<uint8_t, 1>& out, size_t wanted) {
  require(out.size() == wanted,
          "out has " + std::to_string(out.size()) + " bytes, must have " + std::to_string(wanted));
}

Packed checked_packed(const Bytes& data, int rows, int cols, const PackedFormat& format) {
  require(rows > 0 && cols > 0, "rows and cols must be positive");
  require(data.size() == format.bytes(rows, cols),
          "data has " + std::to_string(data.size()) + " bytes, must have " + std::to_string(format.bytes(rows, cols)));
  return {format, rows, cols, data.data()};
}

std::tuple<double, double> py_pack(const Bytes& data, const std::string& dtype, int rows, int cols, int bits, int group,
                                   bool symmetric, const Array<uint8_t, 1>& out, const std::optional<Order>& row_order,
                                   float offset, int threads) {
  const PackedFormat format = checked_format(bits, group, symmetric);
  const WeightSource source = checked_source(data, dtype, rows, cols, row_order, offset);
  check_out(out, format.bytes(rows, cols));
  const WithoutGil others_run;
  const PackLoss loss = pack(source, format, threads, out.data());
  return {loss.squared_error, loss.squares};
}

std::tuple<double, double> py_pack_ggml(const Bytes& data, const std::string& dtype, int rows, int cols,
                                        const Array<uint8_t, 1>& out, const std::optional<Order>& row_order,
                                        int threads) {
  const WeightSource source = checked_source(data, dtype, rows, cols, row_order, 0.0f);
  check_out(out, info_of(source.dtype).format.bytes(rows, cols));
  const WithoutGil others_run;
  const PackLoss loss = pack_ggml(source, threads, out.data());
  return {loss.max_error, loss.squares > 0.0 ? std::sqrt(loss.squared_error / loss.squares) : 0.0};
}

Floats py_unpack(const Bytes& data, int rows, int cols, int bits, int group, bool symmetric, int threads) {
  const Packed packed = checked_packed(data, rows, cols, checked_format(bits, group, symmetric));
  std::unique_ptr<float[]> out(new float[static_cast<size_t>(rows) * cols]);
  {
    const WithoutGil others_run;
    pool().split(threads, rows, kPanelRows, [&](int begin, int end, int) {
      for (int row = begin; row < end; ++row) unpack_row(packed, row, out.get() + static_cast<size_t>(row) * cols);
    });
  }
  return owned(std::move(out), {static_cast<size_t>(rows), static_cast<size_t>(cols)});
}

Floats py_unpack_rows(const Bytes& data, int rows, int cols, int bits, int group, bool symmetric, const Ids& ids) {
  const Packed packed = checked_packed(data, rows, cols, checked_format(bits, group, symmetric));
  for (size_t i = 0; i < ids.size(); ++i)
    require(ids.data()[i] >= 0 && ids.data()[i] < rows, "row " + std::to_string(ids.data()[i]) + " is out of range");
  std::unique_ptr<float[]> out(new float[ids.size() * cols]);
  for (size_t i = 0; i < ids.size(); ++i) unpack_row(packed, ids.data()[i], out.get() + i * cols);
  return owned(std::move(out), {ids.size(), static_cast<size_t>(cols)});
}

Floats py_dequantize(const Bytes& data, const std::string& dtype, size_t n, int threads) {
  const DtypeInfo& info = dtype_named(dtype);
  require(n % info.block == 0, "n must be a multiple of " + std::to_string(info.block) + " for " + dtype);
  require(data.size() == bytes_of(info, n),
          "data has " + std::to_string(data.size()) + " bytes, must have " + std::to_string(bytes_of(info, n)));
  constexpr size_t kPiece = 1 << 16;  // values, a multiple of every block
  std::unique_ptr<float[]> out(new float[n]);
  {
    const WithoutGil others_run;
    const int pieces = static_cast<int>((n + kPiece - 1) / kPiece);
    pool().split(threads, pieces, 1, [&](int begin, int end, int) {
      const size_t first = begin * kPiece, last = std::min(end * kPiece, n);
      dequantize(info.dtype, data.data() + bytes_of(info, first), last - first, out.get() + first);
    });
  }
  return owned(std::move(out), {n});
}

Owned<uint8_t> py_quantize(const Input<float, 2>& values, const std::string& dtype, int threads) {
  const DtypeInfo& info = dtype_named(dtype);
  require(is_written(info.dtype), "dtype " + dtype + " is not written");
  const size_t rows = values.shape(0), cols = values.shape(1), row_bytes = bytes_of(info, cols);
  require(cols % info.block == 0, "cols must be a multiple of " + std::to_string(info.block) + " for " + dtype);
  std::unique_ptr<uint8_t[]> out(new uint8_t[rows * row_bytes]);
  {
    const WithoutGil others_run;
    pool().split(threads, static_cast<int>(rows), 1, [&](int begin, int end, int) {
      quantize(info.dtype, values.data() + begin * cols, (end - begin) * cols, out.get() + begin * row_bytes);
    });
  }
  return owned(std::move(out), {rows, row_bytes});
}

}  // namespace

void bind_pack(nb::module_& m) {
  nb::exception<PackError>(m, "PackError", PyExc_ValueError);
  m.def(
      "packed_bytes",
      [](int rows, int cols, int bits, int group, bool symmetric) {
        require(rows > 0 && cols > 0, "rows and cols must be positive");
        return checked_format(bits, group, symmetric).bytes(rows, cols);
      },
      nb::arg("rows"), nb::arg("cols"), nb::arg("bits"), nb::arg("group") = 32, nb::arg("symmetric") = true,
      "Bytes of a packed matrix [rows, cols].");
  m.def("pack", &py_pack, nb::arg("weights"), nb::arg("dtype"), nb::arg("rows"), nb::arg("cols"), nb::arg("bits"),
        nb::arg("group"), nb::arg("symmetric"), nb::arg("out"), nb::arg("row_order") = nb::none(),
        nb::arg("offset") = 0.0f, nb::arg("threads") = 1,
        "Quantise weights (raw uint8 of any dtype, [rows, cols]) into out (uint8 [packed_bytes]). Row r comes from row "
        "row_order[r] of the data; offset is added to every value. Returns (sum of squared errors, sum of squares). "
        "Raises PackError on a value that is not finite or too large.");
  m.def("pack_ggml", &py_pack_ggml, nb::arg("weights"), nb::arg("dtype"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("out"), nb::arg("row_order") = nb::none(), nb::arg("threads") = 1,
        "Bring a GGUF tensor into the layout of ggml_layout(dtype), values kept. Returns (largest absolute error, "
        "relative rms error), both 0 where the layout is exact. Raises PackError on a scale that is not finite.");
  m.def(
      "ggml_layout",
      [](const std::string& dtype) {
        const DtypeInfo& info = dtype_named(dtype);
        return std::make_tuple(info.format.bits, info.format.group, info.format.symmetric, info.exact);
      },
      nb::arg("dtype"), "The cheapest layout that holds a dtype's values: (bits, group, symmetric, exact).");
  m.def("unpack", &py_unpack, nb::arg("data"), nb::arg("rows"), nb::arg("cols"), nb::arg("bits"), nb::arg("group"),
        nb::arg("symmetric"), nb::arg("threads") = 1, "A packed matrix as float32 [rows, cols].");
  m.def("unpack_rows", &py_unpack_rows, nb::arg("data"), nb::arg("rows"), nb::arg("cols"), nb::arg("bits"),
        nb::arg("group"), nb::arg("symmetric"), nb::arg("row_ids"),
        "Some rows of a packed matrix as float32 [R, cols]; row_ids int32 [R].");
  m.def("dequantize_ggml", &py_dequantize, nb::arg("data"), nb::arg("dtype"), nb::arg("n"), nb::arg("threads") = 1,
        "n values of raw data of any dtype as float32 [n].");
  m.def("quantize_ggml", &py_quantize, nb::arg("values"), nb::arg("dtype"), nb::arg("threads") = 1,
        "Finite values, float32 [rows, cols], in the blocks of Q4_K, Q5_K or Q6_K: uint8 [rows, bytes of a row].");
}

}  // namespace hasten
