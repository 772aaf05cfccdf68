// AVX2, FMA and F16C: 8 lanes, lookups by byte shuffles and 8-entry permutes.
#include <immintrin.h>
#include <string.h>

#include "gemm.h"
#include "kernels.h"
#include "nf4_table.h"
#include "scalar.h"

#include "nf4.inl"
#include "blockwise8.inl"
#include "gemm.inl"
#include "gemm_f32.inl"
#include "nf4_transposed.inl"
#include "adamw.inl"
#include "checksum.inl"

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

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

// 16 elements, split by the parity of their index: the two nibbles of a byte come from the same lane.
inline Pairs split(__m256 a, __m256 b) {
    const __m256 low = _mm256_permute2f128_ps(a, b, 0x20), high = _mm256_permute2f128_ps(a, b, 0x31);
    return {_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xdd)};
}
inline Pairs load_pairs(const float* w) { return split(_mm256_loadu_ps(w), _mm256_loadu_ps(w + 8)); }
inline Pairs load_pairs(const F16* w) {
    const __m256i bits = load(w);
    return split(_mm256_cvtph_ps(_mm256_castsi256_si128(bits)), _mm256_cvtph_ps(_mm256_extracti128_si256(bits, 1)));
}
inline Pairs load_pairs(const BF16* w) {
    const __m256i bits = load(w);
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

// 8 + 8 numbers of 32 bits below 2^16 -> 16 numbers of 16 bits, in order.
inline __m256i narrow(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8); }

// 16 numbers of 16 bits below 2^8 -> 16 bytes.
inline __m128i to_bytes(__m256i words) {
    return _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

inline __m128i to_16_bits(__m256 x, F16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
inline __m128i to_16_bits(__m256 x, BF16) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i lowest_kept = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(lowest_kept, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    return _mm256_castsi256_si128(narrow(_mm256_blendv_epi8(rounded, quiet, nan), _mm256_setzero_si256()));
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

struct Avx2 {
    // T has 16 bits; float is specialized below.
    template <class T>
    static uint32_t max_abs_bits(const T* w, int64_t n) {
        const __m256i magnitude = _mm256_set1_epi16(0x7fff);
        __m256i largest = _mm256_setzero_si256();
        for (int64_t i = 0; i < n; i += 16) {
            largest = _mm256_max_epu16(largest, _mm256_and_si256(load(w + i), magnitude));
        }
        const __m128i x = _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
        // The hardware has a horizontal minimum of 16-bit numbers only: the maximum is the complement's minimum.
        return ~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(x, _mm_set1_epi16(-1)))) & 0xffffu;
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

    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes);
    static constexpr auto decode8 = blockwise8_decode;
    static constexpr auto adamw_coded = adamw_update_coded<Avx2>;
};

template <>
uint32_t Avx2::max_abs_bits<float>(const float* w, int64_t n) {
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i largest = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 8) {
        largest = _mm256_max_epu32(largest, _mm256_and_si256(load(w + i), magnitude));
    }
    __m128i x = _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0x4e));
    x = _mm_max_epu32(x, _mm_shuffle_epi32(x, 0xb1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(x));
}

template <>
struct Avx2::Table<float> {
    __m256 low, high;  // values 0-7 and 8-15
    explicit Table(float absmax)
        : low(_mm256_mul_ps(_mm256_loadu_ps(kNF4Code), _mm256_set1_ps(absmax))),
          high(_mm256_mul_ps(_mm256_loadu_ps(kNF4Code + 8), _mm256_set1_ps(absmax))) {}
};

template <>
void Avx2::decode32<float>(const Table<float>& table, const uint8_t* packed, float* out) {
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

inline __m256i blockwise8_encode8(const float* x, float scale, const Blockwise8Code& code) {
    const __m256i sign = _mm256_set1_epi32(INT32_MIN), one = _mm256_set1_epi32(kOneBits);
    const __m256i bits = _mm256_castps_si256(_mm256_mul_ps(_mm256_loadu_ps(x), _mm256_set1_ps(scale)));
    const __m256i magnitude = _mm256_min_epu32(_mm256_andnot_si256(sign, bits), one);
    const __m256 v = _mm256_castsi256_ps(_mm256_or_si256(_mm256_and_si256(sign, bits), magnitude));
    const __m256i key = _mm256_sub_epi32(_mm256_srli_epi32(magnitude, 16), _mm256_set1_epi32(code.kFirstKey));
    const __m256i negative_bins = _mm256_and_si256(_mm256_srai_epi32(bits, 31), _mm256_set1_epi32(code.kBins));
    const __m256i bin = _mm256_add_epi32(_mm256_max_epi32(key, _mm256_setzero_si256()), negative_bins);
    const __m256i start = _mm256_i32gather_epi32(reinterpret_cast<const int*>(code.start), bin, 1);
    __m256i found = _mm256_and_si256(start, _mm256_set1_epi32(255));
    for (int step = 0; step < code.most_steps; ++step) {
        const __m256 threshold = _mm256_i32gather_ps(code.threshold, found, 4);
        found = _mm256_sub_epi32(found, _mm256_castps_si256(_mm256_cmp_ps(v, threshold, _CMP_GT_OQ)));
    }
    return found;
}

void Avx2::encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
    for (int64_t i = 0; i < n; i += 16) {
        const __m256i a = blockwise8_encode8(x + i, scale, code), b = blockwise8_encode8(x + i + 8, scale, code);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), to_bytes(narrow(a, b)));
    }
}

inline __m256 widen(__m128i x, F16) { return _mm256_cvtph_ps(x); }
inline __m256 widen(__m128i x, BF16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}

struct Avx2Floats {
    using F = __m256;
    using Codec = Avx2;
    static constexpr int kLanes = 8, kRows = 6, kVectors = 2;  // 12 accumulators, 2 + 1 operands of 16 registers

    template <class T>
    static Avx2::Table<float> table(float absmax) {
        Avx2::Table<float> table(absmax);
        if constexpr (sizeof(T) == 2) {
            table.low = widen(to_16_bits(table.low, T{}), T{});
            table.high = widen(to_16_bits(table.high, T{}), T{});
        }
        return table;
    }
    static F zero() { return _mm256_setzero_ps(); }
    static F set1(float x) { return _mm256_set1_ps(x); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static float sum(F a) {
        __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
    }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    template <class T>
    static F load(const T* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{}); }
    template <class T>
    static void store(T* p, F x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_16_bits(x, T{})); }

    // Columns [at, at + 8) of 8 rows -> rows of out.
    static void transpose(const float* const rows[8], int64_t at, float* out, int64_t stride) {
        for (int half = 0; half < 2; ++half) {  // columns 0-3, then 4-7
            __m256 r[4];  // rows i and i + 4
            for (int i = 0; i < 4; ++i) {
                const __m128 low = _mm_loadu_ps(rows[i] + at + 4 * half), high = _mm_loadu_ps(rows[i + 4] + at + 4 * half);
                r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
            }
            const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
            const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
            float* const to = out + 4 * half * stride;
            _mm256_storeu_ps(to, _mm256_shuffle_ps(a, c, 0x44));
            _mm256_storeu_ps(to + stride, _mm256_shuffle_ps(a, c, 0xee));
            _mm256_storeu_ps(to + 2 * stride, _mm256_shuffle_ps(b, d, 0x44));
            _mm256_storeu_ps(to + 3 * stride, _mm256_shuffle_ps(b, d, 0xee));
        }
    }
};

struct Avx2Parts {
    using V = __m256i;
    static constexpr int kParts = 2;
    static constexpr bool kStreams = true;
    static V load(const char* p, int64_t stride) {
        const auto part = [](const char* q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)); };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(part(p)), part(p + stride), 1);
    }
    static void store(char* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
    static void stream(char* p, V v) { _mm256_stream_si256(reinterpret_cast<V*>(p), v); }
    static void finish() { _mm_sfence(); }
    template <class T>
    static V low(V a, V b) { return sizeof(T) == 2 ? _mm256_unpacklo_epi16(a, b) : _mm256_unpacklo_epi32(a, b); }
    template <class T>
    static V high(V a, V b) { return sizeof(T) == 2 ? _mm256_unpackhi_epi16(a, b) : _mm256_unpackhi_epi32(a, b); }
};

}  // namespace

const GemmKernels kAvx2Gemm = {f32_plan<Avx2Floats>, nullptr, f32_task<Avx2Floats>};

const Kernels kAvx2Kernels = {nf4_quantize_any<Avx2>, nf4_dequantize_any<Avx2>,
                                   nf4_dequantize_transposed_any<Avx2, Avx2Parts>,
                                   nf4_quantize_transposed_any<Avx2, Avx2Parts>, checksum_rows};

const Blockwise8Kernels kAvx2Blockwise8 = {blockwise8_quantize<Avx2>, blockwise8_dequantize<Avx2>, adamw<Avx2>};

}  // namespace lora_ops
