// AVX-512 with VBMI: permutes of bytes look up 64 codes at once.
#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "scalar.h"

#include "blockwise8_avx512.inl"

namespace lora_ops {
namespace {

// Each byte of the entries is looked up in a table of its own; the four then interleave to 64 entries.
struct VbmiLookUp {
    static __m512i upper_bytes(__m512i a, __m512i b) {
        alignas(64) static constexpr struct Index {
            uint8_t byte[64];
            constexpr Index() : byte() {
                for (int i = 0; i < 64; ++i) {
                    const int lane = i / 16, at = i % 16;
                    byte[i] = static_cast<uint8_t>(at / 8 * 64 + 2 * (8 * lane + at % 8) + 1);
                }
            }
        } index;
        return _mm512_permutex2var_epi8(a, _mm512_load_si512(&index), b);
    }

    static void look_up64(const float*, const uint8_t (*table_bytes)[256], __m512i lanes, __m512 out[4]) {
        const __mmask64 upper = _mm512_movepi8_mask(lanes);  // the permutes read 7 bits of an index
        __m512i byte[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const uint8_t* const t = table_bytes[i];
            const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(t), lanes, _mm512_load_si512(t + 64));
            const __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(t + 128), lanes, _mm512_load_si512(t + 192));
            byte[i] = _mm512_mask_blend_epi8(upper, low, high);
        }
        const __m512i low01 = _mm512_unpacklo_epi8(byte[0], byte[1]), high01 = _mm512_unpackhi_epi8(byte[0], byte[1]);
        const __m512i low23 = _mm512_unpacklo_epi8(byte[2], byte[3]), high23 = _mm512_unpackhi_epi8(byte[2], byte[3]);
        out[0] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(low01, low23));
        out[1] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(low01, low23));
        out[2] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(high01, high23));
        out[3] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(high01, high23));
    }
};

}  // namespace

const Blockwise8Kernels kAvx512VbmiBlockwise8 = blockwise8_kernels<VbmiLookUp>();

}  // namespace lora_ops
