// Which way computes integer layers: a choice for each format and each class of token numbers, made by measurement.
//
// The name of the instruction set chooses wrongly: on a Zen 4, one token of 4-bit weights takes 1.5 times as long with
// four panels side by side and prefetch as with one panel and none, and on a Xeon with AMX it is the other way round.
#pragma once

#include <string>
#include <vector>

#include "isa/kernels.h"

namespace hasten {

// The largest number of tokens of each class; the last class has no largest.
constexpr int kClassRows[kRowClasses] = {1, 2, 4, 8, 24, kAnyTokens};

// The class of `tokens` tokens.
int row_class(int tokens);

// The way in use for a format and a number of tokens.
const IntWay& way_for(const PackedFormat& format, int tokens);

// Takes the way of that name for a format and a class. Throws std::invalid_argument if the table in use has none of
// that name. May be called while steps run: their results do not change.
void choose_way(const PackedFormat& format, int row_class, const std::string& name);

// Goes back to what the table in use takes where nothing was measured.
void forget_choices();

// Seconds that each of int_ways() takes for one product of `tokens` tokens with a matrix [rows, cols]: the least of
// `rounds`, taken in turn. With few tokens the weights are put out of the caches before, so that they come from memory
// as a model's do. A way that takes over 1.3 times as long as the fastest drops out after two rounds.
// A way that does what another does for so many tokens is not timed: its time is infinite.
std::vector<double> time_ways(const PackedFormat& format, int rows, int cols, int tokens, int threads, int rounds);

}  // namespace hasten
