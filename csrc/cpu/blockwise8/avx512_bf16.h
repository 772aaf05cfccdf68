// 8-bit codes with AVX-512 VBMI, which comes with BF16: permutes of bytes look up 64 codes at once.
#pragma once

#include "blockwise8/avx512.h"

namespace lora_ops {
namespace {

// Bytes that two permutes pick.
struct Indices {
    alignas(64) uint8_t upper_byte[64], upper_half[64];
    constexpr Indices() : upper_byte(), upper_half() {
        for (int i = 0; i < 64; ++i) {
            const int lane = i / 16, at = i % 16;
            upper_byte[i] = static_cast<uint8_t>(at / 8 * 64 + 2 * (8 * lane + at % 8) + 1);
            upper_half[i] = static_cast<uint8_t>(at / 8 * 64 + 4 * (4 * lane + at % 8 / 2) + (at % 2 ? 2 : 3));
        }
    }
};
constexpr Indices kIndices;

// Each byte of the entries is looked up in a table of its own; the four then interleave to 64 entries.
struct VbmiLookUp {
    static __m512i upper_bytes(__m512i a, __m512i b) {
        return _mm512_permutex2var_epi8(a, _mm512_load_si512(kIndices.upper_byte), b);
    }

    static __m512i upper_halves(__m512i a, __m512i b) {
        return _mm512_permutex2var_epi8(a, _mm512_load_si512(kIndices.upper_half), b);
    }

    template <int kEntries>
    class Table {
      public:
        Table(const void*, const uint8_t (*bytes)[256]) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 4
                for (int j = 0; j < kParts; ++j) part_[i][j] = _mm512_load_si512(bytes[i] + 256 - kEntries + 64 * j);
            }
        }

        void look_up64(__m512i lanes, __m512i out[4]) const {
            const __mmask64 upper = _mm512_movepi8_mask(lanes), lower = _knot_mask64(upper);
            __m512i byte[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const __m512i* const t = part_[i];
                if (kEntries == 128) {
                    byte[i] = _mm512_permutex2var_epi8(t[0], lanes, t[1]);
                } else {  // permutes read 7 bits of an index: each replaces its half of the codes
                    byte[i] = _mm512_mask2_permutex2var_epi8(t[2], lanes, upper, t[3]);
                    byte[i] = _mm512_mask2_permutex2var_epi8(t[0], byte[i], lower, t[1]);
                }
            }
            interleave(byte, out);
        }

      private:
        static constexpr int kParts = kEntries / 64;
        __m512i part_[4][kParts];
    };

    class Mirrored {
      public:
        explicit Mirrored(const Blockwise8Code& code) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                part_[i][0] = _mm512_load_si512(code.map_bytes[i] + 128);
                part_[i][1] = _mm512_load_si512(code.map_bytes[i] + 192);
            }
        }

        void look_up64(__m512i lanes, __m512i out[4]) const {
            const __m512i zero = _mm512_set1_epi8(127);
            const __mmask64 negative = _mm512_cmplt_epu8_mask(lanes, zero), nonzero = _mm512_cmpneq_epi8_mask(lanes, zero);
            const __m512i positive = _mm512_mask_sub_epi8(lanes, negative, _mm512_set1_epi8(static_cast<char>(254)), lanes);
            __m512i byte[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                byte[i] = _mm512_maskz_permutex2var_epi8(nonzero, part_[i][0], positive, part_[i][1]);
            }
            byte[3] = _mm512_mask_add_epi8(byte[3], negative, byte[3], _mm512_set1_epi8(static_cast<char>(128)));
            interleave(byte, out);
        }

      private:
        __m512i part_[4][2];
    };

  private:
    static void interleave(const __m512i byte[4], __m512i out[4]) {
        const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(byte[2], byte[3]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
        out[0] = _mm512_unpacklo_epi16(low01, low23);
        out[1] = _mm512_unpackhi_epi16(low01, low23);
        out[2] = _mm512_unpacklo_epi16(high01, high23);
        out[3] = _mm512_unpackhi_epi16(high01, high23);
    }
};

}  // namespace
}  // namespace lora_ops
