// The plain path: runs anywhere, and is what the others are compared with.
#include "isa/generic.inl"

namespace hasten {

namespace {
constexpr IntWay kWays[] = {{"scalar", 1, 1, kAnyTokens, generic::linear_int}};
}

const Kernels kScalarKernels = {
    .name = "scalar",
    .ways = kWays,
    .usual_way = {},
    .linear_bf16 = generic::linear_bf16,
    .linear_wide = nullptr,
    .quantize = generic::quantize,
    .to_bf16 = generic::to_bf16,
    .int8_to_bf16 = generic::int8_to_bf16,
    .rms_norm = generic::rms_norm,
    .gated = generic::gated,
    .rope = generic::rope,
    .attend_rows = kFewestRows,
    .attend = generic::attend,
    .argmax = generic::argmax,
};

}  // namespace hasten
