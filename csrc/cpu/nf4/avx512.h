// The NF4 codec with AVX-512: one register permute looks up 16 or 32 codes.
#pragma once

#include "isa/avx512.h"
#include "nf4/codec.h"

namespace lora_ops {
namespace {

// v * 15.49 rounded to an integer puts v in one of 31 bins, -15 ... 15, each narrower than any gap between two
// thresholds. So the code is the number of thresholds in lower bins plus one comparison. Rounding is monotone, so
// this is exact. The 32-entry tables are indexed by the low 5 bits of the bin.
constexpr float kBinsPerUnit = 15.49f;

constexpr int nf4_bin(float v) {
    const float scaled = v * kBinsPerUnit;
    return static_cast<int>(scaled < 0 ? scaled - 0.5f : scaled + 0.5f);
}

constexpr bool bins_are_exact() {
    for (int i = 0; i < 15; ++i) {
        if (i < 14 && nf4_bin(nf4_threshold(i)) == nf4_bin(nf4_threshold(i + 1))) return false;
        // The hardware rounds ties to even, nf4_bin away from zero: no threshold may be near a tie.
        const float from_bin = nf4_threshold(i) * kBinsPerUnit - static_cast<float>(nf4_bin(nf4_threshold(i)));
        if (from_bin < -0.499f || from_bin > 0.499f) return false;
    }
    return true;
}
static_assert(bins_are_exact(), "choose another kBinsPerUnit");

struct BinTables {
    alignas(64) float threshold[32];  // the bin's own threshold; without one, a value that nothing exceeds
    alignas(64) int32_t base[32];     // thresholds in lower bins
    constexpr BinTables() : threshold(), base() {
        for (int bin = -16; bin < 16; ++bin) {
            threshold[bin & 31] = 2.0f;
            base[bin & 31] = 0;
            for (int i = 0; i < 15; ++i) {
                if (nf4_bin(nf4_threshold(i)) == bin) threshold[bin & 31] = nf4_threshold(i);
                base[bin & 31] += nf4_bin(nf4_threshold(i)) < bin;
            }
        }
    }
};
constexpr BinTables kNF4Bins;

inline __m512i nf4_encode16(__m512 v) {
    const __m512i bin = _mm512_cvtps_epi32(_mm512_mul_ps(v, _mm512_set1_ps(kBinsPerUnit)));
    const __m512 threshold = _mm512_permutex2var_ps(_mm512_load_ps(kNF4Bins.threshold), bin,
                                                    _mm512_load_ps(kNF4Bins.threshold + 16));
    const __m512i base = _mm512_permutex2var_epi32(_mm512_load_si512(kNF4Bins.base), bin,
                                                   _mm512_load_si512(kNF4Bins.base + 16));
    const __mmask16 above = _mm512_cmp_ps_mask(v, threshold, _CMP_GT_OQ);
    return _mm512_mask_add_epi32(base, above, base, _mm512_set1_epi32(1));
}

struct Pairs {
    __m512 even, odd;
};

// 32 elements, split by the parity of their index: the two nibbles of a byte come from the same lane.
inline Pairs load_pairs(const BF16* w) {
    const __m512i bits = _mm512_loadu_si512(w);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
}
inline Pairs load_pairs(const F16* w) {
    const __m512i bits = _mm512_loadu_si512(w);
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(bits)),
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)))};
}
inline Pairs load_pairs(const float* w) {
    const __m512 a = _mm512_loadu_ps(w), b = _mm512_loadu_ps(w + 16);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b)};
}

// Lane l of the 32 lanes takes element from(l).
template <class Function>
inline __m512i permutation(Function from) {
    alignas(64) uint16_t lanes[32];
    for (int l = 0; l < 32; ++l) lanes[l] = static_cast<uint16_t>(from(l));
    return _mm512_load_si512(lanes);
}

// 16 values rounded, twice. For bfloat16, the upper halves; what is not finite takes the longer way.
inline __m512i rounded_twice(__m512 x, bool, F16) { return _mm512_broadcast_i64x4(to_16_bits(x, F16{})); }
inline __m512i rounded_twice(__m512 x, bool finite, BF16) {
    if (!finite) return _mm512_broadcast_i64x4(to_16_bits(x, BF16{}));
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_slli_epi32(one, 16));
    const __m512i half = _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fff), is_odd, _mm512_set1_epi32(0x7fff), one);
    return _mm512_permutexvar_epi16(permutation([](int l) { return 2 * (l % 16) + 1; }), _mm512_add_epi32(bits, half));
}

struct Avx512NF4 {
    template <class T>
    static uint32_t max_abs_bits(const T* w, int64_t n) {
        return lora_ops::max_abs_bits(w, n);
    }

    template <class T>
    static void encode32(const T* w, float scale, uint8_t* packed) {
        const Pairs x = load_pairs(w);
        const __m512i even = nf4_encode16(_mm512_mul_ps(x.even, _mm512_set1_ps(scale)));
        const __m512i odd = nf4_encode16(_mm512_mul_ps(x.odd, _mm512_set1_ps(scale)));
        const __m512i bytes = _mm512_or_si512(_mm512_slli_epi32(even, 4), odd);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(bytes));
    }

    template <class T>
    struct Table {
        __m512i value;  // the 16 values twice, so that the fifth bit of an index does not matter
        explicit Table(float absmax) {
            const __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(absmax));
            value = rounded_twice(exact, abs_bits(absmax) < kInfBits<float>, T{});
        }
    };

    template <class T>
    static void decode32(const Table<T>& table, const uint8_t* packed, T* out) {
        // Each 16 bits with 4 codes go to 4 lanes, each of which shifts its own down; a permute ignores all but 5 bits.
        const __m512i codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        const __m512i four = _mm512_permutexvar_epi16(permutation([](int l) { return l / 4; }), codes);
        const __m512i index = _mm512_srlv_epi16(four, _mm512_set1_epi64(0x0008'000c'0000'0004));
        _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table.value));
    }
};

template <>
struct Avx512NF4::Table<float> {
    __m512 value;
    explicit Table(float absmax) : value(_mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(absmax))) {}
};

template <>
void Avx512NF4::decode32<float>(const Table<float>& table, const uint8_t* packed, float* out) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    for (int half = 0; half < 2; ++half) {
        const __m512i wide = _mm512_cvtepu8_epi64(half ? _mm_unpackhi_epi64(bytes, bytes) : bytes);
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
        _mm512_storeu_ps(out + 16 * half, _mm512_permutexvar_ps(index, table.value));
    }
}

}  // namespace
}  // namespace lora_ops
