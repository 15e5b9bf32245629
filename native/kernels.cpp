#include "isa/kernels.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"

namespace hasten {
namespace {

// The table of that name, or null if this machine cannot run it.
const Kernels* find(const std::string& name) {
#if defined(__x86_64__)
  if (name == "amx") return has_amx() ? &kAmxKernels : nullptr;
  if (name == "avx512") return has_avx512() ? &kAvx512Kernels : nullptr;
  if (name == "avx2") return has_avx2() ? &kAvx2Kernels : nullptr;
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

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const char* name : {"scalar", "avx2", "avx512", "amx"})
    if (find(name)) names.emplace_back(name);
  return names;
}

void use_isa(const std::string& name) {
  const Kernels* found = find(name);
  if (found == nullptr) throw std::invalid_argument("instruction set " + name + " cannot run on this machine");
  chosen = found;
}

const Kernels& kernels() {
  const Kernels* table = chosen.load(std::memory_order_relaxed);
  if (table == nullptr) chosen = table = from_environment();
  return *table;
}

}  // namespace hasten
