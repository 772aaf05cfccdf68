// The kernels of an instruction set, for every dtype: Vec as codec.h asks for it, Parts as transposed.h does.
#pragma once

#include "nf4/codec.h"
#include "nf4/nf4.h"
#include "nf4/transposed.h"

namespace lora_ops {
namespace {

template <class Vec, class Parts>
constexpr NF4Kernels nf4_kernels() {
    NF4Kernels kernels = {};
    kernels.quantize = [](const void* w, lora_ops_dtype dtype, int64_t n, int64_t block_size, uint8_t* packed,
                          float* absmax) {
        return with_dtype(dtype, [&](auto type) {
            return nf4_quantize<Vec>(static_cast<const decltype(type)*>(w), n, block_size, packed, absmax);
        });
    };
    kernels.dequantize = [](const lora_ops_nf4_weight& w, int64_t begin, int64_t end, void* out, lora_ops_dtype dtype) {
        with_dtype(dtype, [&](auto type) {
            nf4_dequantize<Vec>(w, begin / w.block_size, begin, end, static_cast<decltype(type)*>(out));
        });
    };
    kernels.dequantize_transposed = [](const lora_ops_nf4_weight& w, int64_t n, int64_t k, int64_t begin, int64_t end,
                                       void* out, lora_ops_dtype dtype) {
        with_dtype(dtype, [&](auto type) {
            nf4_dequantize_transposed<Vec, Parts>(w, n, k, begin, end, static_cast<decltype(type)*>(out));
        });
    };
    kernels.quantize_transposed = [](const void* w, lora_ops_dtype dtype, int64_t n, int64_t k, int64_t begin,
                                     int64_t end, int64_t block_size, uint8_t* packed, float* absmax, void* rows) {
        return with_dtype(dtype, [&](auto type) {
            using T = decltype(type);
            return nf4_quantize_transposed<Vec, Parts>(static_cast<const T*>(w), n, k, begin, end, block_size, packed,
                                                       absmax, static_cast<T*>(rows));
        });
    };
    return kernels;
}

}  // namespace
}  // namespace lora_ops
