// The NF4 codec with AVX2: 8 lanes, lookups by byte shuffles and 8-entry permutes.
#pragma once

#include "isa/avx2.h"
#include "nf4/codec.h"

namespace lora_ops {
namespace {

// One level of a binary search over the thresholds: 2 * code + (v > the threshold that code selects).
inline __m256i next_bit(__m256 v, __m256i code, __m256 thresholds) {
    const __m256 above = _mm256_cmp_ps(v, _mm256_permutevar8x32_ps(thresholds, code), _CMP_GT_OQ);
    return _mm256_sub_epi32(_mm256_add_epi32(code, code), _mm256_castps_si256(above));
}

inline __m256i nf4_encode8(__m256 v) {
    constexpr auto t = nf4_threshold;
    __m256i code = next_bit(v, _mm256_setzero_si256(), _mm256_set1_ps(t(7)));
    code = next_bit(v, code, _mm256_setr_ps(t(3), t(11), 0, 0, 0, 0, 0, 0));
    code = next_bit(v, code, _mm256_setr_ps(t(1), t(5), t(9), t(13), 0, 0, 0, 0));
    return next_bit(v, code, _mm256_setr_ps(t(0), t(2), t(4), t(6), t(8), t(10), t(12), t(14)));
}

struct Pairs {
    __m256 even, odd;
};

// 16 elements, split by the parity of their index: the two nibbles of a byte come from the same lane.
inline Pairs split(__m256 a, __m256 b) {
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    return {_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd)};
}
inline Pairs load_pairs(const float* w) { return split(_mm256_loadu_ps(w), _mm256_loadu_ps(w + 8)); }
inline Pairs load_pairs(const F16* w) {
    const __m256i bits = load256(w);
    return split(_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)));
}
inline Pairs load_pairs(const BF16* w) {
    const __m256i bits = load256(w);
    const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)), _mm256_castsi256_ps(_mm256_and_si256(bits, upper_half))};
}

// 16 elements -> 8 packed bytes, one in each 32-bit lane.
template <class T>
__m256i encode16(const T* w, float scale) {
    const Pairs x = load_pairs(w);
    const __m256i even = nf4_encode8(_mm256_mul_ps(x.even, _mm256_set1_ps(scale)));
    const __m256i odd = nf4_encode8(_mm256_mul_ps(x.odd, _mm256_set1_ps(scale)));
    return _mm256_or_si256(_mm256_slli_epi32(even, 4), odd);
}

// 16 packed bytes -> the codes of 32 elements in order, 16 bytes each.
struct Codes {
    __m128i first, second;
    explicit Codes(const uint8_t* packed) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
        const __m128i nibble = _mm_set1_epi8(15);
        const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble), odd = _mm_and_si128(bytes, nibble);
        first = _mm_unpacklo_epi8(even, odd);
        second = _mm_unpackhi_epi8(even, odd);
    }
};

struct Avx2NF4 {
    template <class T>
    static uint32_t max_abs_bits(const T* w, int64_t n) {
        return lora_ops::max_abs_bits(w, n);
    }

    template <class T>
    static void encode32(const T* w, float scale, uint8_t* packed) {
        const __m256i words = narrow(encode16(w, scale), encode16(w + 16, scale));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), to_bytes(words));
    }

    template <class T>
    struct Table {
        __m128i low, high;  // the lower and the upper byte of the 16 values
        explicit Table(float absmax) {
            const __m256 scale = _mm256_set1_ps(absmax);
            const __m128i a = to_16_bits(_mm256_mul_ps(_mm256_loadu_ps(kNF4Code), scale), T{});
            const __m128i b = to_16_bits(_mm256_mul_ps(_mm256_loadu_ps(kNF4Code + 8), scale), T{});
            const __m128i byte = _mm_set1_epi16(0xff);
            low = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
            high = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
        }
    };

    template <class T>
    static void look_up(const Table<T>& table, __m128i codes, T* out) {
        const __m128i low = _mm_shuffle_epi8(table.low, codes), high = _mm_shuffle_epi8(table.high, codes);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi8(low, high));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 8), _mm_unpackhi_epi8(low, high));
    }

    template <class T>
    static void decode32(const Table<T>& table, const uint8_t* packed, T* out) {
        const Codes codes(packed);
        look_up(table, codes.first, out);
        look_up(table, codes.second, out + 16);
    }
};

template <>
struct Avx2NF4::Table<float> {
    __m256 low, high;  // values 0-7 and 8-15
    explicit Table(float absmax)
        : low(_mm256_mul_ps(_mm256_loadu_ps(kNF4Code), _mm256_set1_ps(absmax))),
          high(_mm256_mul_ps(_mm256_loadu_ps(kNF4Code + 8), _mm256_set1_ps(absmax))) {}
};

template <>
void Avx2NF4::decode32<float>(const Table<float>& table, const uint8_t* packed, float* out) {
    const Codes codes(packed);
    const __m128i eights[] = {codes.first, _mm_unpackhi_epi64(codes.first, codes.first), codes.second,
                              _mm_unpackhi_epi64(codes.second, codes.second)};
    for (int i = 0; i < 4; ++i) {
        const __m256i code = _mm256_cvtepu8_epi32(eights[i]);
        const __m256 low = _mm256_permutevar8x32_ps(table.low, code);
        const __m256 high = _mm256_permutevar8x32_ps(table.high, code);
        const __m256 bit3_as_sign = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
        _mm256_storeu_ps(out + 8 * i, _mm256_blendv_ps(low, high, bit3_as_sign));
    }
}

}  // namespace
}  // namespace lora_ops
