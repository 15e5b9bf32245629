#include "isa/kernels.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#include "int_ways.h"

namespace hasten {
namespace {

#if defined(__x86_64__)
// Ice, Cascade, Tiger and Rocket Lake: integer products of AVX512-VNNI, but no bf16 instructions. All else as on AVX2.
const Kernels* avx512_vnni() {
  static const Kernels table = [] {
    Kernels mixed = kAvx2Kernels;
    mixed.name = "avx512vnni";
    mixed.ways = kAvx512Kernels.ways;
    std::ranges::copy(kAvx512Kernels.usual_way, mixed.usual_way);
    return mixed;
  }();
  return &table;
}
#endif

// Names of all tables, best last.
constexpr const char* kNames[] = {"scalar", "neon", "dotprod", "i8mm", "avx2", "avx512vnni", "avx512", "amx"};

// The table of that name, or null if this machine cannot run it.
const Kernels* find(const std::string& name) {
#if defined(__x86_64__)
  if (name == "amx") return has_amx() ? &kAmxKernels : nullptr;
  if (name == "avx512") return has_avx512() ? &kAvx512Kernels : nullptr;
  if (name == "avx512vnni") return has_avx512_vnni() ? avx512_vnni() : nullptr;
  if (name == "avx2") return has_avx2() ? &kAvx2Kernels : nullptr;
#elif defined(__aarch64__)
  if (name == "i8mm") return has_i8mm() ? &kI8mmKernels : nullptr;
  if (name == "dotprod") return has_dotprod() ? &kDotprodKernels : nullptr;
  if (name == "neon") return &kNeonKernels;
#endif
  return name == "scalar" ? &kScalarKernels : nullptr;
}

const Kernels* from_environment() {
  if (const char* forced = std::getenv("HASTEN_ISA"); forced && *forced) {
    if (const Kernels* found = find(forced)) return found;
    throw std::invalid_argument("HASTEN_ISA=" + std::string(forced) + " cannot run on this machine");
  }
  return find(available_isas().back());
}

std::atomic<const Kernels*> chosen{nullptr};

// The table's own ways, then those of the tables below it that it does not share with them. The plain one is for
// machines that have nothing else.
std::vector<const IntWay*> ways_of(const Kernels& table) {
  std::vector<const IntWay*> found;
  const auto take = [&](const Kernels& from) {
    if (!found.empty() && std::ranges::find(found, from.ways.data()) != found.end()) return;
    for (const IntWay& way : from.ways) found.push_back(&way);
  };
  take(table);
#if defined(__x86_64__)
  if (&table != &kScalarKernels) take(kAvx2Kernels);
#elif defined(__aarch64__)
  if (&table == &kI8mmKernels) take(kDotprodKernels);  // SMMLA is not twice as fast as SDOT everywhere
#endif
  return found;
}

std::vector<const IntWay*>& ways() {
  static std::vector<const IntWay*> found;
  return found;
}

const Kernels* put_in_use(const Kernels* table) {
  ways() = ways_of(*table);
  forget_choices();
  chosen = table;
  return table;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* name : kNames)
    if (find(name)) names.emplace_back(name);
  return names;
}

void use_isa(const std::string& name) {
  const Kernels* found = find(name);
  if (found == nullptr) throw std::invalid_argument("instruction set " + name + " cannot run on this machine");
  put_in_use(found);
}

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  return table != nullptr ? *table : *put_in_use(from_environment());
}

const std::vector<const IntWay*>& int_ways() {
  kernels();
  return ways();
}

}  // namespace hasten
