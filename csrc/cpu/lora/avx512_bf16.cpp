// AVX-512 with BF16: bfloat16 activations are multiplied in pairs, 64 operations an instruction (measured on Zen 5: two
// instructions a cycle).
#include "isa/avx512_bf16.h"
#include "lora/avx512.h"

namespace lora_ops {
namespace {

inline __mmask32 bits32(const uint8_t* bits, int64_t column) {
    uint32_t kept = 0xffffffffu;
    if (bits) memcpy(&kept, bits + column / 8, sizeof kept);
    return kept;
}

inline __mmask32 kept32(int64_t n, const uint8_t* bits, int64_t column) {
    return first32(n - column) & bits32(bits, column);
}

struct Avx512Bf16 : Avx512Float {
    static constexpr int kPair = 2;

    static F multiply_add(F sum, F a, F b) {
        return _mm512_dpbf16_ps(sum, as_bf16(_mm512_castps_si512(a)), as_bf16(_mm512_castps_si512(b)));
    }

    // x [n] -> out: width values of 16 bits.
    template <class T>
    static void pack_row(const T* x, int64_t n, const uint8_t* bits, uint32_t* out, int64_t width) {
        int64_t c = 0;
        // Apart from the edge, whose masks cost as much as the rest.
        for (; c + 32 <= std::min(n, width); c += 32) _mm512_storeu_si512(out + c / 2, load32(x + c, bits32(bits, c)));
        for (; c < width; c += 32) {
            const __m512i v = load32(x + c, kept32(n, bits, c));
            if (c + 32 <= width) {
                _mm512_storeu_si512(out + c / 2, v);
            } else {
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c / 2), _mm512_castsi512_si256(v));
            }
        }
    }

    // Rows a [a_n] and b [b_n] -> out: width pairs. b's bits follow a's.
    template <class T>
    static void pack_two_rows(const T* a, int64_t a_n, const T* b, int64_t b_n, const uint8_t* bits, uint32_t* out,
                              int64_t width) {
        alignas(64) static constexpr int16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                           8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
        const uint8_t* const b_bits = bits ? bits + kMaskBytes : nullptr;
        int64_t c = 0;
        for (; c + 32 <= std::min({width, a_n, b_n}); c += 32) {
            const __m512i va = load32(a + c, bits32(bits, c)), vb = load32(b + c, bits32(b_bits, c));
            _mm512_storeu_si512(out + c, _mm512_permutex2var_epi16(va, first, vb));
            _mm512_storeu_si512(out + c + 16, _mm512_permutex2var_epi16(va, second, vb));
        }
        for (; c < width; c += 32) {
            const __m512i va = load32(a + c, kept32(a_n, bits, c)), vb = load32(b + c, kept32(b_n, b_bits, c));
            _mm512_storeu_si512(out + c, _mm512_permutex2var_epi16(va, first, vb));
            if (c + 16 < width) _mm512_storeu_si512(out + c + 16, _mm512_permutex2var_epi16(va, second, vb));
        }
    }

    template <int J>
    static void add_row(BF16* y, const F (&sums)[J], const uint8_t* bits) {
#pragma GCC unroll 2
        for (int j = 0; j < J; j += 2) {
            const __m512 low = load16(y + 16 * j, 0xffff), high = load16(y + 16 * j + 16, 0xffff);
            const __m512bh rounded =
                _mm512_cvtne2ps_pbh(_mm512_add_ps(high, sums[j + 1]), _mm512_add_ps(low, sums[j]));
            const __m512i sum = reinterpret_cast<__m512i>(rounded);
            if (bits) {
                _mm512_mask_storeu_epi16(y + 16 * j, kept32(16 * J, bits, 16 * j), sum);
            } else {
                _mm512_storeu_si512(y + 16 * j, sum);
            }
        }
    }
};

}  // namespace

const LoraKernels kAvx512Bf16Lora = Entry<Avx512Bf16, Avx512Float>::kernels();

}  // namespace lora_ops
