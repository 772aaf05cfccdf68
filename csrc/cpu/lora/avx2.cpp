// AVX2, FMA, F16C.
#include "isa/avx2.h"
#include "lora/entry.h"
#include "philox/avx2.h"

namespace lora_ops {
namespace {

// The bits of a byte as 8 lanes of ones or zeros.
inline __m256 lanes_of(uint8_t bits) {
    const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits), each), each));
}

struct Avx2 {
    using F = __m256;
    using Mask = Avx2Mask;
    static constexpr int kWidth = 8, kPair = 1, kRows = 4;

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

const LoraKernels kAvx2Lora = Entry<Avx2, Avx2>::kernels();

}  // namespace lora_ops
