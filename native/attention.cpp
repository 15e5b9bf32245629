#include "attention.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "lanes.h"
#include "threads.h"

namespace hasten {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

int padded(int head_dim) { return round_up(head_dim, 32); }

HASTEN_INLINE void add_scaled(const float* part, float take, float keep, int n, float* out) {
  for (int i = 0; i < n; i += kLanes) store8(out + i, load8(out + i) * keep + load8(part + i) * take);
}

// out, max, sum of the context so far take in one more part, row by row; rows are n floats, a multiple of 32. Parts are
// always taken in order, whoever computed them. A part that has no number to give but NaN is taken in too: its sum is
// NaN then, and all that follows.
HASTEN_CLONES void merge(const float* part, const float* part_max, const float* part_sum, int rows, int n, float* out,
                         float* max, float* sum) {
  for (int r = 0; r < rows; r++, part += n, out += n) {
    if (part_sum[r] == 0) continue;           // the row sees nothing of it
    const bool grows = part_max[r] > max[r];  // one of the two weighs 1
    const float keep = max[r] == kNone ? 0.0f : grows ? std::exp(max[r] - part_max[r]) : 1.0f;
    const float take = grows ? 1.0f : std::exp(part_max[r] - max[r]);
    add_scaled(part, take, keep, n, out);
    sum[r] = sum[r] * keep + part_sum[r] * take;
    if (grows) max[r] = part_max[r];
  }
}

constexpr uint32_t kExponent = 0x7f800000u;  // all of these bits: infinite or NaN

// n is a multiple of 32.
HASTEN_CLONES bool all_finite(const float* x, size_t n) {
  i32x8 broken = {};
  for (size_t i = 0; i < n; i += kLanes) broken |= (bits_of(load8(x + i)) & int{kExponent}) == int{kExponent};
  int any = 0;
  for (int lane = 0; lane < kLanes; lane++) any |= broken[lane];
  return any == 0;
}

// The token of its page that value i of a page belongs to. See kv_cache.h.
constexpr int token_of_value(int i) { return i % (16 * kPageTokens) / 32 * 2 + i % 2; }

bool sees(const AttendPart& a, int row, int token) {
  const int position = a.first + token;
  return position <= a.position[row] && (a.window == 0 || position > a.position[row] - a.window);
}

// Tokens of a block of queries: as many rows as the kernel takes best, but some pieces of work for each thread.
int tokens_of_block(const std::vector<Span>& spans, int heads, int group, int threads) {
  int tokens = 0;
  for (const Span& span : spans) tokens += span.count;
  const int64_t share = static_cast<int64_t>(tokens) * group * heads / (8 * threads);
  const auto rows = static_cast<int>(std::clamp<int64_t>(share, kFewestRows, kernels().attend_rows));
  return std::max(1, rows / group);
}

// The parts of the context that a block of queries can see.
struct PartRange {
  int first, last;
  PartRange(int position0, int position1, int window)
      : first(window > 0 ? std::max(0, position0 - window + 1) / kPartTokens : 0), last(position1 / kPartTokens + 1) {}
};

}  // namespace

void Attention::stage_queries(const AttentionCall& call, const Task& task, Scratch& scratch) {
  const int group = call.heads / call.cache->shape().heads, d = call.head_dim, dp = padded(d);
  scratch.q.resize(static_cast<size_t>(task.count) * group * dp);
  scratch.position.resize(task.count * group);
  float row[kMostHeadDim];
  for (int t = 0; t < task.count; t++) {
    const int token = task.span->first + task.first + t;
    for (int g = 0; g < group; g++) {
      const float* q = call.q + token * call.ldq + static_cast<size_t>(task.head * group + g) * d;
      for (int i = 0; i < d; i++) row[i] = q[i] * call.scale;
      kernels().to_bf16(row, d, dp, scratch.q.data() + static_cast<size_t>(t * group + g) * dp);
      scratch.position[t * group + g] = task.span->past + task.first + t;
    }
  }
}

void Attention::part(const AttentionCall& call, const Task& task, int part, Scratch& scratch, float* out, float* max,
                     float* sum) {
  const KvCache& cache = *call.cache;
  const KvShape& shape = cache.shape();
  const int group = call.heads / shape.heads, dp = padded(call.head_dim), rows = task.count * group;
  const int context = task.span->past + task.first + task.count;  // tokens the last query of the block sees
  const int first = part * kPartTokens, pages = std::min(kPartTokens, context - first + kPageTokens - 1) / kPageTokens;
  constexpr int kMost = kPartTokens / kPageTokens;
  const bf16 *k[kMost], *v[kMost];
  const float *k_scale[kMost], *v_scale[kMost];
  const size_t values = static_cast<size_t>(kPageTokens) * dp;
  if (shape.int8) scratch.unpacked.resize(2 * kMost * values);
  for (int p = 0; p < pages; p++) {
    const int page = task.span->pages[first / kPageTokens + p];
    const uint8_t* sides[2] = {cache.keys(call.layer, page, task.head), cache.values(call.layer, page, task.head)};
    if (!shape.int8) {
      k[p] = reinterpret_cast<const bf16*>(sides[0]);
      v[p] = reinterpret_cast<const bf16*>(sides[1]);
      continue;
    }
    if (p + 1 < pages && rows <= kFewestRows) {
      const int next = task.span->pages[first / kPageTokens + p + 1];
      fetch_page(cache.keys(call.layer, next, task.head), values);
      fetch_page(cache.values(call.layer, next, task.head), values);
    }
    for (int side = 0; side < 2; side++) {
      bf16* to = scratch.unpacked.data() + (2 * p + side) * values;
      kernels().int8_to_bf16(reinterpret_cast<const int8_t*>(sides[side]), static_cast<int>(values), to);
      (side ? v : k)[p] = to;
      (side ? v_scale : k_scale)[p] = reinterpret_cast<const float*>(sides[side] + values);
    }
  }
  scratch.scores.resize(static_cast<size_t>(rows) * kScoreRow);
  scratch.weights.resize(static_cast<size_t>(rows) * kWeightRow);
  const AttendPart whole_block{.q = scratch.q.data(),
                               .rows = rows,
                               .position = scratch.position.data(),
                               .head_dim = dp,
                               .k = k,
                               .v = v,
                               .k_scale = shape.int8 ? k_scale : nullptr,
                               .v_scale = shape.int8 ? v_scale : nullptr,
                               .pages = pages,
                               .first = first,
                               .window = call.window,
                               .softcap = call.softcap,
                               .scores = scratch.scores.data(),
                               .weights = scratch.weights.data(),
                               .out = out,
                               .max = max,
                               .sum = sum};
  kernels().attend(whole_block);
  if (!shape.int8) keep_unseen_out(whole_block, scratch);
}

void Attention::keep_unseen_out(const AttendPart& block, Scratch& scratch) {
  const int values = kPageTokens * block.head_dim;
  if (all_finite(block.out, static_cast<size_t>(block.rows) * block.head_dim)) return;
  bool looked = false;
  for (int row = 0; row < block.rows; row++) {
    float* out = block.out + static_cast<size_t>(row) * block.head_dim;
    if (block.sum[row] == 0 || all_finite(out, block.head_dim)) continue;
    if (!looked) find_broken(block, scratch.broken);
    looked = true;
    scratch.unseen.assign(scratch.broken.size(), 0);
    bool any = false;
    for (size_t t = 0; t < scratch.broken.size(); t++)
      any |= scratch.unseen[t] = scratch.broken[t] && !sees(block, row, static_cast<int>(t));
    if (!any) continue;
    scratch.unpacked.resize(static_cast<size_t>(block.pages) * values);
    const bf16* v[kPartTokens / kPageTokens];
    for (int p = 0; p < block.pages; p++) {
      bf16* to = scratch.unpacked.data() + static_cast<size_t>(p) * values;
      for (int i = 0; i < values; i++)
        to[i] = scratch.unseen[p * kPageTokens + token_of_value(i)] ? bf16{0} : block.v[p][i];
      v[p] = to;
    }
    AttendPart one = block;
    one.q += static_cast<size_t>(row) * block.head_dim;
    one.rows = 1;
    one.position += row;
    one.v = v;
    one.out = out;
    one.max += row;
    one.sum += row;
    kernels().attend(one);
  }
}

void Attention::find_broken(const AttendPart& block, std::vector<uint8_t>& broken) {
  broken.assign(static_cast<size_t>(block.pages) * kPageTokens, 0);
  for (int p = 0; p < block.pages; p++)
    for (int i = 0; i < kPageTokens * block.head_dim; i++)
      broken[p * kPageTokens + token_of_value(i)] |= (block.v[p][i] & (kExponent >> 16)) == kExponent >> 16;
}

namespace {

// Divides by the sum and puts the rows where their heads are. Every row sees itself: a sum of 0 means that all its
// scores were minus infinity, and its result is NaN.
struct RowSink {
  const AttentionCall& call;
  int group, token0, head;
  void put(int row, const float* values, float sum) const {
    float* out =
        call.out + (token0 + row / group) * call.ldo + static_cast<size_t>(head * group + row % group) * call.head_dim;
    const float by = 1.0f / sum;
    for (int i = 0; i < call.head_dim; i++) out[i] = values[i] * by;
  }
};

}  // namespace

void Attention::whole(const AttentionCall& call, const Task& task, Scratch& scratch) {
  const int group = call.heads / call.cache->shape().heads, dp = padded(call.head_dim), rows = task.count * group;
  stage_queries(call, task, scratch);
  scratch.part.resize(static_cast<size_t>(2 * rows) * dp);
  scratch.max.assign(2 * rows, kNone);
  scratch.sum.assign(2 * rows, 0.0f);
  float* total = scratch.part.data() + static_cast<size_t>(rows) * dp;
  std::fill(total, total + static_cast<size_t>(rows) * dp, 0.0f);
  const int position0 = task.span->past + task.first;
  const PartRange range(position0, position0 + task.count - 1, call.window);
  for (int p = range.first; p < range.last; p++) {
    part(call, task, p, scratch, scratch.part.data(), scratch.max.data(), scratch.sum.data());
    merge(scratch.part.data(), scratch.max.data(), scratch.sum.data(), rows, dp, total, scratch.max.data() + rows,
          scratch.sum.data() + rows);
  }
  const RowSink sink{call, group, task.span->first + task.first, task.head};
  for (int r = 0; r < rows; r++) sink.put(r, total + static_cast<size_t>(r) * dp, scratch.sum[rows + r]);
}

void Attention::run(const AttentionCall& call, const std::vector<Span>& spans, int threads) {
  const int kv_heads = call.cache->shape().heads, group = call.heads / kv_heads, dp = padded(call.head_dim);
  const int block = tokens_of_block(spans, kv_heads, group, threads);
  scratch_.resize(std::max<size_t>(scratch_.size(), threads));
  tasks_.clear();
  size_t parts = 0;
  int most = 0, least = std::numeric_limits<int>::max();  // parts of a task
  for (const Span& span : spans)
    for (int head = 0; head < kv_heads; head++)
      for (int t = 0; t < span.count; t += block) {
        const int count = std::min(block, span.count - t), position = span.past + t;
        const PartRange range(position, position + count - 1, call.window);
        tasks_.push_back({&span, head, t, count, parts});
        parts += range.last - range.first;
        most = std::max(most, range.last - range.first);
        least = std::min(least, range.last - range.first);
      }
  const int tasks = static_cast<int>(tasks_.size());
  // As many pieces of one size for each thread, or so many that their sizes do not matter.
  if (threads == 1 || tasks >= 4 * threads || (tasks % threads == 0 && most == least) || parts == tasks_.size()) {
    // Later blocks see more: start with them, so that the last piece of work is a small one.
    pool().split(threads, tasks, 1, [&](int begin, int end, int thread) {
      for (int i = begin; i < end; i++) whole(call, tasks_[tasks - 1 - i], scratch_[thread]);
    });
    return;
  }
  // Few queries, long context: one piece a part, put together in order afterwards.
  const size_t task_floats = round_up(block * group * (dp + 2), 16);  // pieces begin at cache lines
  partials_.resize(parts * task_floats);
  std::vector<std::pair<int, int>> pieces;
  for (int i = 0; i < tasks; i++) {
    const size_t end = i + 1 < tasks ? tasks_[i + 1].partial : parts;
    for (size_t p = tasks_[i].partial; p < end; p++) pieces.emplace_back(i, static_cast<int>(p - tasks_[i].partial));
  }
  pool().split(threads, static_cast<int>(pieces.size()), 1, [&](int begin, int end, int thread) {
    for (int i = begin; i < end; i++) {
      const Task& task = tasks_[pieces[i].first];
      const int position = task.span->past + task.first;
      const PartRange range(position, position + task.count - 1, call.window);
      stage_queries(call, task, scratch_[thread]);
      float* out = partials_.data() + (task.partial + pieces[i].second) * task_floats;
      const size_t rows = static_cast<size_t>(block) * group;
      part(call, task, range.first + pieces[i].second, scratch_[thread], out, out + rows * dp, out + rows * (dp + 1));
    }
  });
  pool().split(threads, tasks, 1, [&](int begin, int end, int thread) {
    for (int i = begin; i < end; i++) put_together(call, i, parts, task_floats, scratch_[thread]);
  });
}

void Attention::put_together(const AttentionCall& call, int index, size_t parts, size_t task_floats, Scratch& scratch) {
  const Task& task = tasks_[index];
  const int group = call.heads / call.cache->shape().heads, dp = padded(call.head_dim), rows = task.count * group;
  const size_t end = static_cast<size_t>(index) + 1 < tasks_.size() ? tasks_[index + 1].partial : parts;
  const size_t room = task_floats / (dp + 2);  // rows that a piece has room for
  scratch.part.assign(static_cast<size_t>(rows) * dp, 0.0f);
  scratch.max.assign(rows, kNone);
  scratch.sum.assign(rows, 0.0f);
  for (size_t p = task.partial; p < end; p++) {
    const float* from = partials_.data() + p * task_floats;
    merge(from, from + room * dp, from + room * (dp + 1), rows, dp, scratch.part.data(), scratch.max.data(),
          scratch.sum.data());
  }
  const RowSink sink{call, group, task.span->first + task.first, task.head};
  for (int r = 0; r < rows; r++) sink.put(r, scratch.part.data() + static_cast<size_t>(r) * dp, scratch.sum[r]);
}

}  // namespace hasten
