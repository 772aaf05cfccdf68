// 8-bit blockwise codes and AdamW on AVX-512, 64 values at a time, without gathers: they bound the search (2.7 times the
// whole step's time on Zen 5). LookUp finds 4-byte entries by 64 codes:
//   Table<256>, any table, and Table<128>, the upper half of one by the low 7 bits of a code:
//     Table(const void* entries, const uint8_t (*bytes)[256]), void look_up64(__m512i lanes, __m512i out[4]) const
//   Mirrored(const Blockwise8Code&), the values of a linear signed code, the same way
//   __m512i upper_halves(__m512i a, __m512i b), of 2 x 16 integers, their two bytes swapped, in lanes
//   __m512i upper_bytes(__m512i a, __m512i b), of 2 x 32 words, in lanes
//
// "Lanes" are 64 bytes in the order in which 4 vectors of 16 pack: each 128-bit lane holds 4 bytes of each vector.
//
// AdamW decodes, updates, guesses and settles a block in short loops, each with its tables in registers: on Zen 4 27, 64,
// 46 and 37 cycles for 64 elements. Woven into one loop they compete for registers and for the 64 places in which operations
// wait: 185 cycles instead of 197 for all in cache, and no faster from memory.
#pragma once

#include "blockwise8.inl"

#include "adamw.inl"

namespace lora_ops {
namespace {

inline __m512i magnitude(__m512 x) { return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)); }

inline uint32_t max_abs_bits_f32(const float* x, int64_t n) {
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) largest = _mm512_max_epu32(largest, magnitude(_mm512_loadu_ps(x + i)));
    return _mm512_reduce_max_epu32(largest);
}

// Bytes in order <-> lanes: the transpose is its own inverse.
inline __m512i transpose_lanes(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

// Up to 256 values on their way to codes.
struct Blockwise8Guess {
    alignas(64) uint32_t doubled[256];  // 2 |v| + (v < 0)
    alignas(64) uint8_t lanes[256];     // codes of |v|, or one less
    alignas(64) int8_t signs[256];
};

// The first step of coding: the guesses of the lines.
template <class LookUp, bool kSigned>
class Blockwise8Lines {
  public:
    explicit Blockwise8Lines(const Blockwise8Code& code)
        : bend_(_mm512_load_si512(code.bend)),
          rise_{_mm512_load_si512(code.rise[0]), _mm512_load_si512(code.rise[1])},
          base_{_mm512_load_si512(code.base[0]), _mm512_load_si512(code.base[1])} {}

    void guess64(const float* x, __m512 scale, Blockwise8Guess& guess, int64_t at) const {
        __m512i v[4], doubled[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            v[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), scale));
            const __m512i least = _mm512_set1_epi32(Blockwise8Code::kFirstExponent << (kSigned ? 24 : 23));
            if (kSigned) {
                doubled[i] = _mm512_max_epu32(_mm512_rol_epi32(v[i], 1), least);
            } else {  // what is negative all the same is below the first bin: 0
                doubled[i] = _mm512_max_epi32(v[i], least);
                doubled[i] = _mm512_add_epi32(doubled[i], doubled[i]);
            }
            _mm512_store_si512(guess.doubled + at + 16 * i, doubled[i]);
        }
        if (kSigned) {
            const __m512i signs = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
            _mm512_store_si512(guess.signs + at, transpose_lanes(signs));
        }
        const __m512i a = line(LookUp::upper_halves(doubled[0], doubled[1]));
        const __m512i b = line(LookUp::upper_halves(doubled[2], doubled[3]));
        _mm512_store_si512(guess.lanes + at, LookUp::upper_bytes(a, b));
    }

  private:
    // In the upper byte of each word, from fraction << 8 | exponent; bit 5 of an exponent below 1 is set.
    __m512i line(__m512i half) const {
        const __mmask32 bent = _mm512_cmpgt_epu16_mask(half, _mm512_permutexvar_epi16(half, bend_));
        const __m512i index = _mm512_mask_sub_epi16(half, bent, half, _mm512_set1_epi16(32));
        const __m512i rise = _mm512_permutex2var_epi16(rise_[0], index, rise_[1]);
        return _mm512_add_epi16(_mm512_mulhi_epu16(half, rise), _mm512_permutex2var_epi16(base_[0], index, base_[1]));
    }

    __m512i bend_, rise_[2], base_[2];
};

// The second step: a code is the lines' guess, or one more.
template <class LookUp, bool kSigned>
void blockwise8_settle(const Blockwise8Guess& guess, int64_t n, const Blockwise8Code& code, uint8_t* codes) {
    const typename LookUp::template Table<kSigned ? 128 : 256> table(code.doubled, code.doubled_bytes);
    for (int64_t at = 0; at < n; at += 64) {
        const __m512i lanes = _mm512_load_si512(guess.lanes + at);
        __m512i threshold[4];
        table.look_up64(lanes, threshold);
        __mmask16 part[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            part[i] = _mm512_cmplt_epu32_mask(threshold[i], _mm512_load_si512(guess.doubled + at + 16 * i));
        }
        const __mmask64 above = _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), _mm512_kunpackw(part[1], part[0]));
        __m512i found = transpose_lanes(lanes);
        found = _mm512_mask_add_epi8(found, above, found, _mm512_set1_epi8(1));
        if (kSigned) {  // -v has the code 254 - that of v, or 0
            const __mmask64 negative = _mm512_movepi8_mask(_mm512_load_si512(guess.signs + at));
            found = _mm512_mask_subs_epu8(found, negative, _mm512_set1_epi8(static_cast<char>(254)), found);
        }
        _mm512_storeu_si512(codes + at, found);
    }
}

// adamw_update, in its order of operations: on Zen 4 16 cycles, all of them its root's and its quotient's.
inline void adamw_update16(float* p, const float* g, float* m_now, float* v_now, const AdamwConstants& c,
                           __m512i& m_largest, __m512i& v_largest) {
    const __m512 grad = _mm512_mul_ps(_mm512_loadu_ps(g), _mm512_set1_ps(c.sign));
    __m512 m = _mm512_load_ps(m_now), v = _mm512_load_ps(v_now);
    m = _mm512_add_ps(m, _mm512_mul_ps(_mm512_sub_ps(grad, m), _mm512_set1_ps(c.beta1c)));
    v = _mm512_add_ps(_mm512_mul_ps(v, _mm512_set1_ps(c.beta2)),
                      _mm512_mul_ps(_mm512_mul_ps(grad, _mm512_set1_ps(c.beta2c)), grad));
    const __m512 below = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(c.bias2)), _mm512_set1_ps(c.eps));
    const __m512 way = _mm512_div_ps(_mm512_mul_ps(m, _mm512_set1_ps(c.step_size)), below);
    _mm512_storeu_ps(p, _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(c.decay)), way));
    _mm512_store_ps(m_now, m);
    _mm512_store_ps(v_now, v);
    m_largest = _mm512_max_epu32(m_largest, magnitude(m));
    v_largest = _mm512_max_epu32(v_largest, magnitude(v));
}

template <class LookUp>
struct Avx512Blockwise8 {
    template <class T>
    static uint32_t max_abs_bits(const T* x, int64_t n) {
        return max_abs_bits_f32(x, n);
    }

    template <bool kSigned>
    static void encode(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        const Blockwise8Lines<LookUp, kSigned> lines(code);
        const __m512 scales = _mm512_set1_ps(scale);
        Blockwise8Guess guess;
        for (int64_t i = 0; i < n; i += 256) {
            const int64_t count = n - i < 256 ? n - i : 256, end = count / 64 * 64;
            for (int64_t at = 0; at < end; at += 64) lines.guess64(x + i + at, scales, guess, at);
            blockwise8_settle<LookUp, kSigned>(guess, end, code, codes + i);
            if (end == count) continue;
            float last[64] = {};
            uint8_t last_codes[64];
            memcpy(last, x + i + end, 32 * sizeof *x);
            lines.guess64(last, scales, guess, 0);
            blockwise8_settle<LookUp, kSigned>(guess, 64, code, last_codes);
            memcpy(codes + i + end, last_codes, 32);
        }
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

    template <class Table>
    static void decode(const Table& table, const uint8_t* codes, int64_t n, float scale, float* out) {
        const __m512 scales = _mm512_set1_ps(scale);
        for (int64_t i = 0; i < n; i += 64) {
            __m512i value[4];
            table.look_up64(transpose_lanes(_mm512_loadu_si512(codes + i)), value);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                _mm512_storeu_ps(out + i + 16 * j, _mm512_mul_ps(_mm512_castsi512_ps(value[j]), scales));
            }
        }
    }

    static void decode8(const uint8_t* codes, int64_t n, float scale, const Blockwise8Code& code, float* out) {
        const int64_t end = n / 64 * 64;
        if (code.linear && code.is_signed) {
            decode(typename LookUp::Mirrored(code), codes, end, scale, out);
        } else {
            decode(typename LookUp::template Table<256>(code.map, code.map_bytes), codes, end, scale, out);
        }
        blockwise8_decode(codes + end, n - end, scale, code, out + end);
    }

    // The update of a whole block, which finds the largest values too.
    static void adamw_coded(float* p, const float* g, int64_t n, const CodedBlock& block, const AdamwConstants& constants,
                            const AdamwCodes& codes) {
        if (n < kAdamwBlock) return adamw_update_coded<Avx512Blockwise8>(p, g, n, block, constants, codes);
        const AdamwConstants c = constants;
        alignas(64) float m[kAdamwBlock], v[kAdamwBlock];
        decode8(block.m_codes, kAdamwBlock, *block.m_absmax, *codes.exp_avg, m);
        decode8(block.v_codes, kAdamwBlock, *block.v_absmax, *codes.exp_avg_sq, v);
        __m512i m_largest = _mm512_setzero_si512(), v_largest = m_largest;
        for (int i = 0; i < kAdamwBlock; i += 16) adamw_update16(p + i, g + i, m + i, v + i, c, m_largest, v_largest);
        *block.m_absmax = bits_float(_mm512_reduce_max_epu32(m_largest));
        *block.v_absmax = bits_float(_mm512_reduce_max_epu32(v_largest));
        encode8(m, kAdamwBlock, 1.0f / at_least(*block.m_absmax, kLeastAbsmax), *codes.exp_avg, block.m_codes);
        encode8(v, kAdamwBlock, 1.0f / at_least(*block.v_absmax, kLeastAbsmax), *codes.exp_avg_sq, block.v_codes);
    }
};

template <class LookUp>
constexpr Blockwise8Kernels blockwise8_kernels() {
    using Vec = Avx512Blockwise8<LookUp>;
    return {blockwise8_quantize<Vec>, blockwise8_dequantize<Vec>, adamw<Vec>};
}

}  // namespace
}  // namespace lora_ops
