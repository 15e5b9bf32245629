// AVX2: the plain loops, compiled for 256-bit registers.
#include "isa/generic.inl"

namespace hasten {

const Kernels kAvx2Kernels = {
    .name = "avx2",
    .linear_int = generic::linear_int,
    .linear_bf16 = generic::linear_bf16,
    .quantize = generic::quantize,
    .to_bf16 = generic::to_bf16,
    .rms_norm = generic::rms_norm,
    .gated = generic::gated,
    .rope = generic::rope,
    .attend = generic::attend,
    .argmax = generic::argmax,
};

}  // namespace hasten
