// AVX-512 F, BW, DQ, VL: one register permute looks up 16 or 32 codes.
#include <immintrin.h>
#include <string.h>

#include "gemm.h"
#include "kernels.h"
#include "nf4_table.h"
#include "scalar.h"

#include "nf4.inl"
#include "gemm.inl"
#include "gemm_f32.inl"
#include "nf4_transposed.inl"
#include "blockwise8_avx512.inl"
#include "checksum.inl"

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

// Rounds to nearest even with integers: vcvtneps2bf16 would flush denormals to zero.
inline __m256i to_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i high = _mm512_srli_epi32(bits, 16);
    const __m512i lowest_kept = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(lowest_kept, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

inline __m256i to_16_bits(__m512 x, BF16) { return to_bf16(x); }
inline __m256i to_16_bits(__m512 x, F16) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
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
    if (!finite) return _mm512_broadcast_i64x4(to_bf16(x));
    const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
    const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_slli_epi32(one, 16));
    const __m512i half = _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fff), is_odd, _mm512_set1_epi32(0x7fff), one);
    return _mm512_permutexvar_epi16(permutation([](int l) { return 2 * (l % 16) + 1; }), _mm512_add_epi32(bits, half));
}

inline uint32_t max_u16(__m512i x) {
    const __m256i y = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    const __m128i z = _mm_max_epu16(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    // The hardware has a horizontal minimum of 16-bit numbers only: the maximum is the complement's minimum.
    return ~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(z, _mm_set1_epi16(-1)))) & 0xffffu;
}

struct Avx512 {
    // T has 16 bits; float is specialized below.
    template <class T>
    static uint32_t max_abs_bits(const T* w, int64_t n) {
        const __m512i magnitude = _mm512_set1_epi16(0x7fff);
        __m512i largest = _mm512_setzero_si512();
        for (int64_t i = 0; i < n; i += 32) {
            largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(w + i), magnitude));
        }
        return max_u16(largest);
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
uint32_t Avx512::max_abs_bits<float>(const float* w, int64_t n) {
    return max_abs_bits_f32(w, n);
}

template <>
struct Avx512::Table<float> {
    __m512 value;
    explicit Table(float absmax) : value(_mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(absmax))) {}
};

template <>
void Avx512::decode32<float>(const Table<float>& table, const uint8_t* packed, float* out) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    for (int half = 0; half < 2; ++half) {
        const __m512i wide = _mm512_cvtepu8_epi64(half ? _mm_unpackhi_epi64(bytes, bytes) : bytes);
        const __m512i index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
        _mm512_storeu_ps(out + 16 * half, _mm512_permutexvar_ps(index, table.value));
    }
}

inline __m512 widen(__m256i x, F16) { return _mm512_cvtph_ps(x); }
inline __m512 widen(__m256i x, BF16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

struct Avx512Floats {
    using F = __m512;
    using Codec = Avx512;
    static constexpr int kLanes = 16, kRows = 6, kVectors = 4;  // 24 accumulators, 4 + 1 operands of 32 registers

    template <class T>
    static Avx512::Table<float> table(float absmax) {
        Avx512::Table<float> table(absmax);
        if constexpr (sizeof(T) == 2) table.value = widen(to_16_bits(table.value, T{}), T{});
        return table;
    }
    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    template <class T>
    static F load(const T* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{}); }
    template <class T>
    static void store(T* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_16_bits(x, T{})); }

    // Columns [at, at + 16) of 16 rows -> rows of out.
    static void transpose(const float* const rows[16], int64_t at, float* out, int64_t stride) {
        __m512 r[16], t[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(rows[i] + at);
        for (int i = 0; i < 16; i += 4) {
            const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(r[i], r[i + 1]));
            const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(r[i], r[i + 1]));
            const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(r[i + 2], r[i + 3]));
            const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(r[i + 2], r[i + 3]));
            t[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
            t[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
            t[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
            t[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
        }
        for (int i = 0; i < 4; ++i) {
            const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
            const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88);
            const __m512 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
            _mm512_storeu_ps(out + i * stride, _mm512_shuffle_f32x4(a, c, 0x88));
            _mm512_storeu_ps(out + (i + 8) * stride, _mm512_shuffle_f32x4(a, c, 0xdd));
            _mm512_storeu_ps(out + (i + 4) * stride, _mm512_shuffle_f32x4(b, d, 0x88));
            _mm512_storeu_ps(out + (i + 12) * stride, _mm512_shuffle_f32x4(b, d, 0xdd));
        }
    }
};

struct Avx512Parts {
    using V = __m512i;
    static constexpr int kParts = 4;
    static constexpr bool kStreams = true;
    static __m256i load2(const char* p, int64_t stride) {
        const auto part = [](const char* q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)); };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(part(p)), part(p + stride), 1);
    }
    // Three broadcasts under masks would need no shuffle, but on Zen 4 they take longer: it loads 512 bits every 2 cycles.
    static V load(const char* p, int64_t stride) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(load2(p, stride)), load2(p + 2 * stride, stride), 1);
    }
    static void store(char* p, V v) { _mm512_storeu_si512(p, v); }
    static void stream(char* p, V v) { _mm512_stream_si512(reinterpret_cast<V*>(p), v); }
    static void finish() { _mm_sfence(); }
    template <class T>
    static V low(V a, V b) { return sizeof(T) == 2 ? _mm512_unpacklo_epi16(a, b) : _mm512_unpacklo_epi32(a, b); }
    template <class T>
    static V high(V a, V b) { return sizeof(T) == 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpackhi_epi32(a, b); }
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

#include "dots_avx512.inl"

namespace lora_ops {
const GemmKernels kAvx512Gemm = {avx512_plan, avx512_prepare, avx512_task};

const Kernels kAvx512Kernels = {nf4_quantize_any<Avx512>, nf4_dequantize_any<Avx512>,
                                     nf4_dequantize_transposed_any<Avx512, Avx512Parts>,
                                     nf4_quantize_transposed_any<Avx512, Avx512Parts>, checksum_rows};

const Blockwise8Kernels kAvx512Blockwise8 = blockwise8_kernels<Avx512LookUp>();

}  // namespace lora_ops
