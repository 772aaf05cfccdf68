// AVX2, FMA, F16C.
#include <immintrin.h>

#include "lora.inl"
#include "philox_avx2.inl"

namespace lora_ops {
namespace {

inline __m256 load8(const float* x) { return _mm256_loadu_ps(x); }
inline __m256 load8(const F16* x) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))); }
inline __m256 load8(const BF16* x) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline void store8(float* x, __m256 v) { _mm256_storeu_ps(x, v); }
inline void store8(F16* x, __m256 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store8(BF16* x, __m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i high = _mm256_srli_epi32(bits, 16);
    const __m256i half = _mm256_add_epi32(_mm256_and_si256(high, _mm256_set1_epi32(1)), _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    const __m256i wide = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(wide, wide), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm256_castsi256_si128(words));
}

// The bits of a byte as 8 lanes of ones or zeros.
inline __m256 lanes_of(uint8_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each));
}

struct Avx2 {
    using F = __m256;
    using Mask = Avx2Mask;
    static constexpr int kWidth = 8, kPair = 1;

    static F zero() { return _mm256_setzero_ps(); }
    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static F load(const uint32_t* p) {
        return _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
    static F broadcast(const uint32_t* p) { return _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(*p))); }
    static F multiply_add(F sum, F a, F b) { return _mm256_fmadd_ps(a, b, sum); }

    template <class T>
    static void pack_row(const T* x, int64_t n, const uint8_t* bits, uint32_t* out, int64_t width) {
        int64_t c = 0;
        for (; c + 8 <= n; c += 8) {
            const __m256 v = load8(x + c);
            store(reinterpret_cast<float*>(out + c), bits ? _mm256_and_ps(v, lanes_of(bits[c / 8])) : v);
        }
        for (; c < n; ++c) out[c] = is_kept(bits, c) ? float_bits(to_float(x[c])) : 0;
        for (; c < width; ++c) out[c] = 0;
    }

    template <int J, class T>
    static void add_row(T* y, const F (&sums)[J], const uint8_t* bits) {
#pragma GCC unroll 2
        for (int j = 0; j < J; ++j) {
            const __m256 old = load8(y + 8 * j), sum = _mm256_add_ps(old, sums[j]);
            store8(y + 8 * j, bits ? _mm256_blendv_ps(old, sum, lanes_of(bits[j])) : sum);
        }
    }
};

}  // namespace

const LoraKernels kAvx2Lora = {LoraEntry<Avx2, Avx2>::forward, LoraEntry<Avx2, Avx2>::backward,
                               dropout_mask_rows<Avx2Mask>};

}  // namespace lora_ops
