// The kernels of an instruction set: bfloat16 activations are multiplied by VBF16, others as floats by V32.
#pragma once

#include "lora/backward.h"
#include "lora/forward.h"
#include "lora/forward_few.h"

namespace lora_ops {
namespace {

template <class VBF16, class V32>
struct Entry {
    template <class T>
    using V = std::conditional_t<std::is_same_v<T, BF16>, VBF16, V32>;

    static int forward(const LoraForward& f) {
        if (f.scaled_s && f.m <= kFewRowsOfS) return FewRowsPass<VBF16, BF16>(f).run();
        return with_dtype(f.dtype, [&](auto type) {
            using T = decltype(type);
            if (!f.scaled_s && f.m <= kFewRows) return FewRowsPass<V32, T>(f).run();
            return ForwardPass<V<T>, T>(f).run();
        });
    }
    static int backward(const LoraBackward& g) {
        return with_dtype(g.dtype, [&](auto type) {
            using T = decltype(type);
            return BackwardPass<V<T>, T>(g).run();
        });
    }
    static constexpr LoraKernels kernels() { return {forward, backward}; }
};

}  // namespace
}  // namespace lora_ops
