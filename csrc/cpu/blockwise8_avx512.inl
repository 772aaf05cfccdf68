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
    __m512i rise[2], base[2];
    explicit Blockwise8Lines(const Blockwise8Code& code)
        : rise{_mm512_load_si512(code.rise[0]), _mm512_load_si512(code.rise[1])},
          base{_mm512_load_si512(code.base[0]), _mm512_load_si512(code.base[1])} {}

    // Of the upper halves of 32 positive floats.
    __m512i guess(__m512i half) const {
        half = _mm512_max_epi16(half, _mm512_set1_epi16(Blockwise8Code::kFirstExponent << 7));
        const __m512i exponent = _mm512_srli_epi16(half, 7), fraction = _mm512_slli_epi16(half, 9);
        __m512i line[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {  // permutes read 5 bits of an index
            const __m512i risen = _mm512_mulhi_epu16(fraction, _mm512_permutexvar_epi16(exponent, rise[i]));
            line[i] = _mm512_add_epi16(risen, _mm512_permutexvar_epi16(exponent, base[i]));
        }
        return _mm512_srli_epi16(_mm512_min_epu16(line[0], line[1]), 8);
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
        __m512 v[4], threshold[4];
        __m512i half[4], guess[2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), scale);
            half[i] = _mm512_srai_epi32(_mm512_castps_si512(v[i]), 16);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            if (kSigned) {
                const __m512i word = _mm512_packs_epi32(half[2 * i], half[2 * i + 1]);
                // 127 + guess for positive v, 126 - guess for negative ones.
                const __m512i magnitude = _mm512_and_si512(word, _mm512_set1_epi16(0x7fff));
                const __m512i mirrored = _mm512_xor_si512(lines.guess(magnitude), _mm512_srai_epi16(word, 15));
                guess[i] = _mm512_add_epi16(mirrored, _mm512_set1_epi16(127));
            } else {
                guess[i] = lines.guess(_mm512_packus_epi32(half[2 * i], half[2 * i + 1]));  // negative v: 0
            }
        }
        const __m512i lanes = _mm512_packus_epi16(guess[0], guess[1]);  // and what is below 0: 0
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
