// Which instruction sets this process may use: the one place that asks the processor and the system.
#pragma once

namespace hasten {

// What CPUID reports and the operating system saves on a context switch; a flag is false where either is missing.
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
};

// Asked once, then remembered. All false on a processor that is no x86-64.
const CpuFeatures& cpu();

// Can code of native/isa/avx2.cpp, avx512_linear.cpp, avx512.cpp and amx.cpp run here? Each needs every flag its file
// is compiled with. has_amx() also asks Linux for the permission to use tile registers (once a process, inherited by
// its threads).
bool has_avx2();
bool has_avx512_vnni();
bool has_avx512();  // with bf16 products
bool has_amx();

}  // namespace hasten
