// AMX tiles for many tokens; everything else as on AVX512.
#include "isa/avx512.h"

namespace hasten {

const Kernels kAmxKernels = {
    .name = "amx",
    .linear_int = avx512::linear_int,
    .linear_bf16 = avx512::linear_bf16,
    .quantize = avx512::quantize,
    .to_bf16 = avx512::to_bf16,
    .rms_norm = avx512::rms_norm,
    .gated = avx512::gated,
    .rope = avx512::rope,
    .attend = avx512::attend,
    .argmax = avx512::argmax,
};

}  // namespace hasten
