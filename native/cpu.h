// Which instruction sets this process may use: the one place that asks the processor and the system.
#pragma once

namespace hasten {

// What CPUID reports and the operating system saves on a context switch, or what Linux says of an ARM processor; a flag
// is false where it is missing.
struct CpuFeatures {
  bool avx2 = false;  // with FMA and F16C
  bool avx_vnni = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512vl = false;
  bool avx512dq = false;
  bool avx512vnni = false;
  bool avx512bf16 = false;
  bool amx_tile = false;
  bool amx_int8 = false;
  bool amx_bf16 = false;
  bool arm_dotprod = false;
  bool arm_i8mm = false;
};

// Asked once, then remembered.
const CpuFeatures& cpu();

// Can code of native/isa/avx2.cpp, avx512_linear.cpp, avx512.cpp and amx.cpp run here? Each needs every flag its file
// is compiled with. has_amx() also asks Linux for the permission to use tile registers (once a process, inherited by
// its threads).
bool has_avx2();
bool has_avx512_vnni();
bool has_avx512();  // with bf16 products
bool has_amx();

// The same of native/isa/neon_dotprod.cpp and neon_i8mm.cpp. Every 64-bit ARM processor runs neon.cpp.
bool has_dotprod();
bool has_i8mm();

}  // namespace hasten
