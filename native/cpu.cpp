#include "cpu.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace hasten {
namespace {

#if defined(__x86_64__)

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part) {
  Registers r;
  if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, part, r.a, r.b, r.c, r.d);
  return r;
}

bool bit(uint32_t value, int n) { return (value >> n & 1) != 0; }

// Which register states the system saves: XCR0. By its opcode, so that this file needs no -mxsave.
uint64_t saved_states() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

CpuFeatures detect() {
  CpuFeatures f;
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
  if (!bit(one.c, 27)) return f;  // OSXSAVE: no xgetbv, no wide registers
  const uint64_t states = saved_states();
  if ((states & 0x6) != 0x6) return f;
  f.avx2 = bit(one.c, 28) && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);
  f.avx_vnni = f.avx2 && bit(more.a, 4);
  if ((states & 0xe6) == 0xe6) {
    f.avx512f = bit(seven.b, 16);
    f.avx512dq = bit(seven.b, 17);
    f.avx512bw = bit(seven.b, 30);
    f.avx512vl = bit(seven.b, 31);
    f.avx512vnni = bit(seven.c, 11);
    f.avx512bf16 = bit(more.a, 5);
  }
  if ((states & 0x60000) == 0x60000) {
    f.amx_bf16 = bit(seven.d, 22);
    f.amx_tile = bit(seven.d, 24);
    f.amx_int8 = bit(seven.d, 25);
  }
  return f;
}

// Linux hands out the 8 KB of tile state a thread only to processes that ask. Source: Linux
// Documentation/arch/x86/xstate.rst.
bool request_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#else

// Source: Linux Documentation/arch/arm64/elf_hwcaps.rst.
CpuFeatures detect() {
  CpuFeatures f;
#if defined(__aarch64__) && defined(__linux__)
  f.arm_dotprod = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  f.arm_i8mm = (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
#endif
  return f;
}
bool request_tiles() { return false; }

#endif

}  // namespace

const CpuFeatures& cpu() {
  static const CpuFeatures features = detect();
  return features;
}

bool has_avx2() { return cpu().avx2; }

bool has_avx512_vnni() {
  const CpuFeatures& f = cpu();
  return has_avx2() && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq && f.avx512vnni;
}

bool has_avx512() { return has_avx512_vnni() && cpu().avx512bf16; }

bool has_amx() {
  static const bool usable = has_avx512() && cpu().amx_tile && cpu().amx_int8 && cpu().amx_bf16 && request_tiles();
  return usable;
}

bool has_dotprod() { return cpu().arm_dotprod; }

bool has_i8mm() { return has_dotprod() && cpu().arm_i8mm; }

}  // namespace hasten
