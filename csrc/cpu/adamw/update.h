// AdamW on runs of elements, written once for every instruction set: the compiler vectorizes the arithmetic, Coded
// updates a block with 8-bit states. The order of operations is that of kernels/adamw/reference.py, and no operations
// are contracted, so results are bit-equal to it on every machine.
#pragma once

#include <stdint.h>
#include <string.h>

#include "adamw/adamw.h"
#include "blockwise8/codec.h"
#include "common/scalar.h"
#include "philox/philox.h"

namespace lora_ops {
namespace {

struct AdamwConstants {
    float decay, beta1c, beta2, beta2c, eps, step_size, bias2, sign;
};

// On whole tensors in memory this is bound by it: 28 bytes an element.
inline void adamw_update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v,
                         int64_t n, const AdamwConstants& constants) {
    const AdamwConstants c = constants;
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * c.sign;
        const float mi = m[i] + (grad - m[i]) * c.beta1c;
        const float vi = v[i] * c.beta2 + grad * c.beta2c * grad;
        m[i] = mi;
        v[i] = vi;
        p[i] = p[i] * c.decay - mi * c.step_size / (__builtin_sqrtf(vi) * c.bias2 + c.eps);
    }
}

// 16 random bits for each element of a block, as kernels/adamw/reference.py draws them: Philox 4x32-10 with key =
// seed and counter = (element / 8, stream, step, element / 8 >> 32); first is a multiple of 8.
inline void adamw_random(uint64_t seed, const lora_ops_adamw_slice& s, int64_t first, uint16_t* __restrict lanes) {
    constexpr int kCounters = kAdamwBlock / 8;
    uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
    for (int i = 0; i < kCounters; ++i) {
        const uint64_t counter = static_cast<uint64_t>(first / 8 + i);
        c0[i] = static_cast<uint32_t>(counter);
        c1[i] = static_cast<uint32_t>(s.stream);
        c2[i] = static_cast<uint32_t>(s.step);
        c3[i] = static_cast<uint32_t>(counter >> 32);
    }
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        for (int i = 0; i < kCounters; ++i) {
            const uint64_t p0 = uint64_t{kPhiloxM0} * c0[i], p1 = uint64_t{kPhiloxM1} * c2[i];
            c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ key0;
            c1[i] = static_cast<uint32_t>(p1);
            c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ key1;
            c3[i] = static_cast<uint32_t>(p0);
        }
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
    }
    for (int i = 0; i < kCounters; ++i) {
        const uint32_t words[] = {c0[i], c1[i], c2[i], c3[i]};
        for (int lane = 0; lane < 8; ++lane) lanes[8 * i + lane] = static_cast<uint16_t>(words[lane / 2] >> 16 * (lane % 2));
    }
}

inline void adamw_load(const void* from, int64_t dtype, int64_t first, int64_t n, float* __restrict to) {
    with_dtype(dtype, [&](auto type) {
        const auto* const x = static_cast<const decltype(type)*>(from) + first;
        for (int64_t i = 0; i < n; ++i) to[i] = to_float(x[i]);
    });
}

template <class T>
inline void adamw_store(const float* __restrict from, int64_t n, void* to, int64_t first) {
    T* x = static_cast<T*>(to) + first;
    for (int64_t i = 0; i < n; ++i) x[i] = round_to<T>(from[i]);
}

inline void adamw_store_stochastic(const float* __restrict from, const uint16_t* __restrict lanes, int64_t n, void* to,
                                   int64_t first) {
    BF16* x = static_cast<BF16*>(to) + first;
    for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = float_bits(from[i]);
        const bool finite = (bits & 0x7fffffffu) < 0x7f800000u;
        x[i].bits = finite ? static_cast<uint16_t>((bits + lanes[i]) >> 16) : round_to<BF16>(from[i]).bits;
    }
}

struct CodedBlock {
    uint8_t *m_codes, *v_codes;
    float *m_absmax, *v_absmax;
};

// The update of at most a block with 8-bit states, which Vec codes.
template <class Vec>
struct CodedUpdate {
    static void run(float* p, const float* g, int64_t n, const CodedBlock& block, const AdamwConstants& c,
                    const AdamwCodes& codes) {
        alignas(64) float m[kAdamwBlock], v[kAdamwBlock];
        blockwise8_dequantize<Vec>(block.m_codes, block.m_absmax, n, kAdamwBlock, *codes.exp_avg, m);
        blockwise8_dequantize<Vec>(block.v_codes, block.v_absmax, n, kAdamwBlock, *codes.exp_avg_sq, v);
        adamw_update(p, g, m, v, n, c);
        blockwise8_quantize<Vec>(m, n, kAdamwBlock, *codes.exp_avg, block.m_codes, block.m_absmax);
        blockwise8_quantize<Vec>(v, n, kAdamwBlock, *codes.exp_avg_sq, block.v_codes, block.v_absmax);
    }
};

// Elements [begin, end) of a slice; begin is a multiple of kAdamwBlock.
template <class Coded>
void adamw(const lora_ops_adamw_slice& s, int64_t begin, int64_t end, const float* row, const AdamwCodes& codes,
           const uint64_t* seed) {
    AdamwConstants c;
    memcpy(&c, row, sizeof c);
    const bool coded = s.exp_avg_absmax, plain = s.param_dtype == LORA_OPS_F32 && s.grad_dtype == LORA_OPS_F32;
    if (plain && !coded) {
        return adamw_update(static_cast<float*>(s.param) + begin, static_cast<const float*>(s.grad) + begin,
                            static_cast<float*>(s.exp_avg) + begin, static_cast<float*>(s.exp_avg_sq) + begin,
                            end - begin, c);
    }
    alignas(64) float p_block[kAdamwBlock], g_block[kAdamwBlock];
    for (int64_t i = begin; i < end; i += kAdamwBlock) {
        const int64_t n = end - i < kAdamwBlock ? end - i : kAdamwBlock, block = i / kAdamwBlock;
        float* p = p_block;
        const float* g = g_block;
        if (s.param_dtype == LORA_OPS_F32) {
            p = static_cast<float*>(s.param) + i;
        } else {
            adamw_load(s.param, s.param_dtype, i, n, p_block);
        }
        if (s.grad_dtype == LORA_OPS_F32) {
            g = static_cast<const float*>(s.grad) + i;
        } else {
            adamw_load(s.grad, s.grad_dtype, i, n, g_block);
        }
        if (coded) {
            const CodedBlock coded_block = {static_cast<uint8_t*>(s.exp_avg) + i, static_cast<uint8_t*>(s.exp_avg_sq) + i,
                                            s.exp_avg_absmax + block, s.exp_avg_sq_absmax + block};
            Coded::run(p, g, n, coded_block, c, codes);
        } else {
            adamw_update(p, g, static_cast<float*>(s.exp_avg) + i, static_cast<float*>(s.exp_avg_sq) + i, n, c);
        }
        if (s.param_dtype == LORA_OPS_F16) {
            adamw_store<F16>(p, n, s.param, i);
        } else if (s.param_dtype == LORA_OPS_BF16 && seed) {
            uint16_t lanes[kAdamwBlock];
            adamw_random(*seed, s, s.first + i, lanes);
            adamw_store_stochastic(p, lanes, n, s.param, i);
        } else if (s.param_dtype == LORA_OPS_BF16) {
            adamw_store<BF16>(p, n, s.param, i);
        }
    }
}

}  // namespace
}  // namespace lora_ops
