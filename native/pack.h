// Weights into the packed layout of layout.h, and back.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "ggml.h"
#include "layout.h"

namespace hasten {

// A value the layout cannot hold; the message says where it is.
struct PackError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A matrix as a file holds it.
struct WeightSource {
  Dtype dtype = Dtype::F32;
  const uint8_t* data = nullptr;  // rows in file order, nothing between them
  int rows = 0;
  int cols = 0;                        // a multiple of the dtype's block
  const int64_t* row_order = nullptr;  // row r of the matrix is row row_order[r] of data; nullptr: in order
  float offset = 0.0f;                 // added to every value

  const uint8_t* row(int r) const {
    const int64_t at = row_order ? row_order[r] : r;
    return data + at * static_cast<int64_t>(bytes_of(info_of(dtype), cols));
  }
};

// What rounding cost, over the whole matrix.
struct PackLoss {
  double squared_error = 0.0;
  double squares = 0.0;
  double max_error = 0.0;

  void add(const PackLoss& other) {
    squared_error += other.squared_error;
    squares += other.squares;
    if (other.max_error > max_error) max_error = other.max_error;
  }
};

// Rounds to nearest, with a search for the scale of each group that leaves the least squared error (symmetric, below 8
// bits), into out[format.bytes(rows, cols)]. The same bytes whatever the threads or the instruction set.
// Throws PackError on a value that is not finite or too large for an fp16 scale.
PackLoss pack(const WeightSource& source, const PackedFormat& format, int threads, uint8_t* out);

// The values of a quantised GGUF tensor into its own layout (info_of(dtype).format) as they are: only a scale of a
// k-quant, a product of two, is rounded to fp16. Throws PackError on scales that are not finite or overflow.
PackLoss pack_ggml(const WeightSource& source, int threads, uint8_t* out);

// One row of a packed matrix, [cols]. Reads cols * bits / 8 bytes spread over one panel.
void unpack_row(const Packed& packed, int row, float* out);

}  // namespace hasten
