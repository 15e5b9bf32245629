// Causal attention of a ragged batch over the paged cache.
#pragma once

#include <vector>

#include "kv_cache.h"
#include "memory.h"

namespace hasten {

// One sequence of the batch: `count` new tokens after `past` cached ones. Their keys and values are in the cache
// already.
struct Span {
  int first;  // index of its first token in the packed batch
  int count;
  int past;
  const int32_t* pages;  // page table; covers past + count tokens
  bool is_long = false;  // LongRoPE: the sequence is rotated by the long factors, its cached keys too
};

struct AttentionCall {
  const KvCache* cache;
  int layer;
  const float* q;  // [tokens][heads * head_dim], rotated
  size_t ldq;
  float* out;  // the same shape
  size_t ldo;
  int heads;      // query heads
  int head_dim;   // unpadded
  float scale;    // scores are q.k * scale
  int window;     // tokens; 0 = all
  float softcap;  // 0 = none
};

constexpr int kMostHeadDim = 1024;

class Attention {
 public:
  // Splits the work by (sequence, KV head, block of queries), and by part of the context where that gives too few
  // pieces for the threads. The result is the same bit for bit either way.
  void run(const AttentionCall& call, const std::vector<Span>& spans, int threads);

 private:
  struct Task {
    const Span* span;
    int head;   // KV head
    int first;  // first token of the block, within the span
    int count;
    size_t partial;  // where its partial results start, in parts
  };
  struct Scratch {
    LineVector<bf16> q, weights, unpacked;
    LineVector<float> scores, part;
    std::vector<float> max, sum;
    std::vector<int> position;
    std::vector<uint8_t> broken, unseen;
  };

  void part(const AttentionCall& call, const Task& task, int part, Scratch& scratch, float* out, float* max,
            float* sum);
  // A value that a row does not see weighs 0, and 0 times infinity or NaN is NaN: what another text left behind in a
  // page, or what comes later in this one, would reach the row. Such values are there only where a model overflows, so
  // they are looked for only where a row's result is not finite; that row is then computed again with zeros in their
  // place. int8 pages hold no such values, and masked scores need no such care: they are replaced.
  static void keep_unseen_out(const AttendPart& block, Scratch& scratch);
  // Which tokens of the part have a value that is infinite or NaN.
  static void find_broken(const AttendPart& block, std::vector<uint8_t>& broken);
  void stage_queries(const AttentionCall& call, const Task& task, Scratch& scratch);
  void whole(const AttentionCall& call, const Task& task, Scratch& scratch);
  // Merges what the pieces of task `index` found. `parts` is the number of pieces of all tasks, each of `task_floats`.
  void put_together(const AttentionCall& call, int index, size_t parts, size_t task_floats, Scratch& scratch);

  std::vector<Task> tasks_;
  std::vector<Scratch> scratch_;
  std::vector<float> partials_;
};

}  // namespace hasten
