// 8-bit blockwise codes and AdamW on AVX-512, 64 values at a time, without gathers: they bound the search (2.7 times the
// whole step's time on Zen 5). LookUp reads a table of 256 entries:
//   void look_up64(const float* table, const uint8_t (*table_bytes)[256], __m512i lanes, __m512 out[4])
//
// "Lanes" are 64 bytes in the order in which 4 vectors of 16 pack: each 128-bit lane holds 4 bytes of each vector.
#pragma once

#include "blockwise8.inl"

#include "adamw.inl"

namespace lora_ops {
namespace {

inline uint32_t max_abs_bits_f32(const float* x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    }
    return _mm512_reduce_max_epu32(largest);
}

// Bytes in order <-> lanes: the transpose is its own inverse.
inline __m512i transpose_lanes(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

struct Blockwise8Lines {
    __m512 slope[Blockwise8Code::kLines], offset[Blockwise8Code::kLines];
    explicit Blockwise8Lines(const Blockwise8Code& code) {
#pragma GCC unroll 7
        for (int i = 0; i < code.kLines; ++i) {
            slope[i] = _mm512_set1_ps(code.slope[i]);
            offset[i] = _mm512_set1_ps(code.offset[i]);
        }
    }
    // Integer part of the least line at a >= 0.
    __m512i operator()(__m512 a) const {
        __m512 least = _mm512_fmadd_ps(a, slope[0], offset[0]);
#pragma GCC unroll 7
        for (int i = 1; i < Blockwise8Code::kLines; ++i) {
            least = _mm512_min_ps(least, _mm512_fmadd_ps(a, slope[i], offset[i]));
        }
        return _mm512_cvttps_epi32(least);
    }
};

template <class LookUp>
struct Avx512Blockwise8 {
    template <class T>
    static uint32_t max_abs_bits(const T* x, int64_t n) {
        return max_abs_bits_f32(x, n);
    }

    // A code is the lines' guess, or one more.
    template <bool kSigned>
    static void encode64(const float* x, __m512 scale, const Blockwise8Code& code, const Blockwise8Lines& lines,
                         uint8_t* codes) {
        const __m512i sign = _mm512_set1_epi32(INT32_MIN), one = _mm512_set1_epi32(kOneBits);
        const __m512i zero = _mm512_setzero_si512();
        __m512 v[4], threshold[4];
        __m512i guess[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            // Clamped as bits, which keeps even a NaN inside the table.
            const __m512i bits = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), scale));
            if (kSigned) {
                const __m512i magnitude = _mm512_min_epu32(_mm512_andnot_si512(sign, bits), one);
                v[i] = _mm512_castsi512_ps(_mm512_or_si512(_mm512_and_si512(sign, bits), magnitude));
                // 127 + guess for positive v, 126 - guess for negative ones
                const __m512i mirrored = _mm512_xor_si512(lines(_mm512_castsi512_ps(magnitude)), _mm512_srai_epi32(bits, 31));
                guess[i] = _mm512_max_epi32(_mm512_add_epi32(mirrored, _mm512_set1_epi32(127)), zero);
            } else {
                v[i] = _mm512_castsi512_ps(_mm512_min_epi32(_mm512_max_epi32(bits, zero), one));
                guess[i] = lines(v[i]);
            }
        }
        const __m512i lanes = _mm512_packus_epi16(_mm512_packus_epi32(guess[0], guess[1]),
                                                  _mm512_packus_epi32(guess[2], guess[3]));
        LookUp::look_up64(code.threshold, code.threshold_bytes, lanes, threshold);
        __mmask64 above = 0;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            above |= __mmask64{_mm512_cmp_ps_mask(v[i], threshold[i], _CMP_GT_OQ)} << 16 * i;
        }
        const __m512i found = transpose_lanes(lanes);
        _mm512_storeu_si512(codes, _mm512_mask_add_epi8(found, above, found, _mm512_set1_epi8(1)));
    }

    template <bool kSigned>
    static void encode(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        const Blockwise8Lines lines(code);
        const __m512 scales = _mm512_set1_ps(scale);
        int64_t i = 0;
        for (; i + 64 <= n; i += 64) encode64<kSigned>(x + i, scales, code, lines, codes + i);
        if (i == n) return;
        float last[64] = {};
        uint8_t last_codes[64];
        memcpy(last, x + i, 32 * sizeof *x);
        encode64<kSigned>(last, scales, code, lines, last_codes);
        memcpy(codes + i, last_codes, 32);
    }

    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        if (!code.linear) {
            for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] * scale, code);
        } else if (code.is_signed) {
            encode<true>(x, n, scale, code, codes);
        } else {
            encode<false>(x, n, scale, code, codes);
        }
    }

    static void decode8(const uint8_t* codes, int64_t n, float scale, const Blockwise8Code& code, float* out) {
        const __m512 scales = _mm512_set1_ps(scale);
        int64_t i = 0;
        for (; i + 64 <= n; i += 64) {
            __m512 value[4];
            LookUp::look_up64(code.map, code.map_bytes, transpose_lanes(_mm512_loadu_si512(codes + i)), value);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) _mm512_storeu_ps(out + i + 16 * j, _mm512_mul_ps(value[j], scales));
        }
        blockwise8_decode(codes + i, n - i, scale, code, out + i);
    }
};

template <class LookUp>
constexpr Blockwise8Kernels blockwise8_kernels() {
    using Vec = Avx512Blockwise8<LookUp>;
    return {blockwise8_quantize<Vec>, blockwise8_dequantize<Vec>, adamw<Vec>};
}

}  // namespace
}  // namespace lora_ops
