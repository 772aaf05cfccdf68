// 8-bit blockwise codes with AVX-512, 64 values at a time, without gathers: they bound the search (2.7 times the
// whole step's time on Zen 5). LookUp finds 4-byte entries by 64 codes:
//   Table<256>, any table, and Table<128>, the upper half of one by the low 7 bits of a code:
//     Table(const void* entries, const uint8_t (*bytes)[256]), void look_up64(__m512i lanes, __m512i out[4]) const
//   Mirrored(const Blockwise8Code&), the values of a linear signed code, the same way
//   __m512i upper_halves(__m512i a, __m512i b), of 2 x 16 integers, their two bytes swapped, in lanes
//   __m512i upper_bytes(__m512i a, __m512i b), of 2 x 32 words, in lanes
//
// "Lanes" are 64 bytes in the order in which 4 vectors of 16 pack: each 128-bit lane holds 4 bytes of each vector.
#pragma once

#include <string.h>

#include "blockwise8/codec.h"
#include "isa/avx512.h"

namespace lora_ops {
namespace {

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

template <class LookUp>
struct Avx512Blockwise8 {
    static uint32_t max_abs_bits(const float* x, int64_t n) { return lora_ops::max_abs_bits(x, n); }

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
};

// Two-register permutes by the low 5 bits of an index, and a tree of blends by the rest.
struct Avx512LookUp {
    static __m512i upper_bytes(__m512i a, __m512i b) {
        return _mm512_packus_epi16(_mm512_srli_epi16(a, 8), _mm512_srli_epi16(b, 8));
    }

    static __m512i upper_halves(__m512i a, __m512i b) {
        const __m512i halves = _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16));
        return _mm512_or_si512(_mm512_slli_epi16(halves, 8), _mm512_srli_epi16(halves, 8));
    }

    template <int kParts>
    static __m512i look_up16(const uint32_t* table, __m512i index) {
        __m512i part[kParts];
#pragma GCC unroll 8
        for (int i = 0; i < kParts; ++i) {
            const uint32_t* const t = table + 32 * i;
            part[i] = _mm512_permutex2var_epi32(_mm512_load_si512(t), index, _mm512_load_si512(t + 16));
        }
#pragma GCC unroll 3
        for (int bit = 32, left = kParts / 2; left > 0; bit *= 2, left /= 2) {
            const __mmask16 set = _mm512_test_epi32_mask(index, _mm512_set1_epi32(bit));
#pragma GCC unroll 4
            for (int i = 0; i < left; ++i) part[i] = _mm512_mask_blend_epi32(set, part[2 * i], part[2 * i + 1]);
        }
        return part[0];
    }

    template <int kEntries>
    class Table {
      public:
        Table(const void* entries, const uint8_t (*)[256])
            : entries_(static_cast<const uint32_t*>(entries) + 256 - kEntries) {}

        void look_up64(__m512i lanes, __m512i out[4]) const {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                // Byte j of every 32-bit part i of a 128-bit lane, widened.
                const __m512i widen = _mm512_broadcast_i32x4(_mm_add_epi32(
                    _mm_setr_epi32(INT32_MIN, INT32_MIN + 1, INT32_MIN + 2, INT32_MIN + 3), _mm_set1_epi32(4 * i)));
                const __m512i bytes = _mm512_or_si512(widen, _mm512_set1_epi32(INT32_MIN | 0x808000));
                out[i] = look_up16<kEntries / 32>(entries_, _mm512_shuffle_epi8(lanes, bytes));
            }
        }

      private:
        const uint32_t* entries_;
    };

    struct Mirrored : Table<256> {
        explicit Mirrored(const Blockwise8Code& code) : Table(code.map, code.map_bytes) {}
    };
};

}  // namespace
}  // namespace lora_ops
