// The table of kernels an instruction set offers. One is chosen at start-up; all give the same results: the integer
// kernels bit for bit as far as float rounding of one multiply-add a group goes, the bf16 kernels to rounding.
//
// Every output value is computed the same way whatever the number of tokens, threads or panels in the call, so results
// do not depend on what else is in a batch.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "layout.h"
#include "numeric.h"

namespace hasten {

// Activations of `m` tokens as int8 with one scale for 32 inputs. Rows are padded with zeros to `cols`, a multiple of
// 128. value = scale * q.  q in [-127, 127].
struct QuantRows {
  const int8_t* q;        // [m][cols]
  const float* scale;     // [m][cols / 32]
  const int32_t* nsum;    // [m][cols / 32], minus the sum of q over the 32 inputs
  const int32_t* nsum16;  // [m][cols / 16], the same over 16 inputs
  int cols;
};

// The same activations from token t on.
inline QuantRows from_token(const QuantRows& x, int t) {
  const size_t at = static_cast<size_t>(t) * x.cols;
  return {x.q + at, x.scale + at / 32, x.nsum + at / 32, x.nsum16 + at / 16, x.cols};
}

enum class Gate { kSilu, kGeluTanh };

// A query block against one part of the context, for one KV head. All rows share keys and values.
struct AttendPart {
  const bf16* q;                // [rows][head_dim], already multiplied by the score scale
  int rows;                     // query rows: tokens x query heads that share the KV head
  const int* position;          // [rows] absolute position of each row's token
  int head_dim;                 // multiple of 32
  const bf16* const* k;         // [pages] K pages: per 16 tokens, per 2 dims: [16][2]
  const bf16* const* v;         // [pages] V pages: per 16 dims, per 2 tokens: [16][2]
  const float* const* k_scale;  // [pages] one float a token (int8 pages), or null
  const float* const* v_scale;
  int pages;      // in this part; page p holds tokens first + p * kPageTokens ...
  int first;      // absolute position of the part's first token
  int window;     // tokens a row may look back on, itself included; 0 = all
  float softcap;  // 0 = none
  float* scores;  // scratch with room for [rows][kScoreRow]
  bf16* weights;  // scratch with room for [rows][kWeightRow]
  float* out;     // [rows][head_dim] sum of exp(score - max) * v
  float* max;     // [rows] largest score of the part; -inf if the row sees nothing of it
  float* sum;     // [rows] sum of exp(score - max)
};

constexpr int kPageTokens = 32;
constexpr int kPartTokens = 256;              // attention works through the context in parts of this many tokens
constexpr int kScoreRow = kPartTokens + 16;   // rows a whole KB apart meet in few places of the first
constexpr int kWeightRow = kPartTokens + 32;  // cache: AMX takes half as long again
constexpr int kFewestRows = 48;               // of a block of queries that need not be smaller

// Asks for a page's keys or values. A page lies anywhere in memory and is too short for the processor to notice that it
// is read from end to end: at a decode step, attention waited for memory half of its time.
inline void fetch_page(const void* page, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(page) + at);
}

// While the scores of page `page` are computed, its values and the next page's keys are on their way.
inline void fetch_beside(const AttendPart& a, int page) {
  if (a.rows > kFewestRows) return;  // a prompt: arithmetic takes longer than memory
  const size_t bytes = sizeof(bf16) * kPageTokens * a.head_dim;
  if (page + 1 < a.pages) fetch_page(a.k[page + 1], bytes);
  fetch_page(a.v[page], bytes);
}

constexpr int kAnyTokens = 1 << 30;

// One way to compute integer layers. All ways of all instruction sets give the same bits; which is the fastest depends
// on the processor, the format and the number of tokens, and is measured (int_ways.h).
struct IntWay {
  const char* name;
  int panels;       // read side by side
  int least, most;  // tokens for which it is a way of its own; for others it runs what another way runs
  // out[t][16*p + r] (+)= sum_k w[16*p + r][k] * x[t][k] for panels p0 <= p < p1, t < m. `out` has room for whole
  // panels. w.format.bits is 4, 5, 6 or 8.
  void (*run)(const Packed& w, int p0, int p1, const QuantRows& x, int m, float* out, size_t ldo, bool add);
};

// Numbers of tokens that one choice of way serves: up to 1, 2, 4, 8, 24, and more.
constexpr int kRowClasses = 6;

struct Kernels {
  const char* name;

  // This instruction set's own ways to compute integer layers, and the one of them that is taken for each class of
  // token numbers where nothing was measured.
  std::span<const IntWay> ways;
  int8_t usual_way[kRowClasses];
  // bf16 weights and activations: as IntWay::run; x rows are padded with zeros to a multiple of 32 columns.
  void (*linear_bf16)(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo,
                      bool add);

  // Integer weights against bf16 activations, for prefill where that is faster than integers; null where it is not.
  // Each weight is rounded to bf16; sums are float. Arguments as of linear_bf16.
  void (*linear_wide)(const Packed& w, int p0, int p1, const bf16* x, size_t ldx, int m, float* out, size_t ldo,
                      bool add);

  // n inputs -> q, scale, nsum, nsum16 of one row, padded with zeros to `padded` (a multiple of 32).
  void (*quantize)(const float* x, int n, int padded, int8_t* q, float* scale, int32_t* nsum, int32_t* nsum16);
  // n inputs -> bf16, padded with zeros to `padded`.
  void (*to_bf16)(const float* x, int n, int padded, bf16* out);
  // n values, a multiple of 32, without a rounding: every int8 is a bf16 too.
  void (*int8_to_bf16)(const int8_t* x, int n, bf16* out);

  // out = x / sqrt(mean(x^2) + eps) * weight. `out` may be `x`.
  void (*rms_norm)(const float* x, const float* weight, int n, float eps, float* out);
  // gate = act(gate) * up
  void (*gated)(Gate kind, float* gate, const float* up, int n);
  // Rotates the first 2 * half values of a head: (x[i], x[i + half]) by the angle whose cosine and sine are given.
  void (*rope)(float* head, const float* cos, const float* sin, int half);

  // `attend_rows`: query rows that one call takes best, at least kFewestRows; keys and values are read once a call.
  int attend_rows;
  void (*attend)(const AttendPart& part);
  // Index of the largest value, the lowest of equals; -1 if any value is NaN.
  int (*argmax)(const float* x, int n);
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAmxKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kDotprodKernels;
extern const Kernels kI8mmKernels;
#endif

// The table in use: the best this machine has, or what HASTEN_ISA names. Throws std::invalid_argument if that cannot
// run.
const Kernels& kernels();

// Names of the tables this machine can run, best last.
std::vector<std::string> available_isas();

// Makes another table the one in use, for tests that compare them. Forgets what was measured. Not while a step is
// running.
void use_isa(const std::string& name);

// The ways that the table in use may take: its own, and those of the instruction sets below it.
const std::vector<const IntWay*>& int_ways();

}  // namespace hasten
