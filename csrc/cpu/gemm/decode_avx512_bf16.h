// NF4 to bfloat16 with AVX-512 BF16 and VBMI.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "gemm/gemm.h"
#include "isa/avx512_bf16.h"
#include "nf4/codec.h"

namespace lora_ops {
namespace {

// The 16 products code * absmax of a block, rounded to nearest even; twice, so that an index's fifth bit is free.
inline __m512i bf16_table(float absmax) {
    const __m512 exact = _mm512_mul_ps(_mm512_loadu_ps(kNF4Code), _mm512_set1_ps(absmax));
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(exact, exact));
}

// Index of lane e of a quadword's 16 elements: the 8 bits from bit 8 * (e / 2) on, from 4 more where e is even. Of
// each 16-bit lane only the low 4 bits are a code; a permute ignores all but 5, and the fifth is free.
constexpr int16_t kShift[16] = {4, 0, 12, 8, 20, 16, 28, 24, 36, 32, 44, 40, 52, 48, 60, 56};

// 32 elements in order.
inline __m512i decode32(__m512i table, __m128i packed) {
    const __m512i quadwords = _mm512_setr_epi64(0, 0, 0, 0, 1, 1, 1, 1);
    const __m512i shifts = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kShift)));
    const __m512i codes = _mm512_permutexvar_epi64(quadwords, _mm512_castsi128_si512(packed));
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, codes), table);
}

inline __m512i decode32(__m512i table, const uint8_t* packed) {
    return decode32(table, _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

// The same where the tensor ends within the 16 bytes.
inline __m512i decode32(__m512i table, const uint8_t* packed, int64_t n_bytes) {
    return decode32(table, _mm_maskz_loadu_epi8(first16(n_bytes), packed));
}

// 32 elements in an order that saves a permute: quadword 2 i of the result is elements 4 i to 4 i + 3 of the first 16,
// quadword 2 i + 1 the same of the last 16. Loads broadcast for free.
struct Interleaved32 {
    __m512i shifts;
    Interleaved32() {
        const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift));
        const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kShift + 8));
        const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(high, low)),
                                                _mm256_set_m128i(high, low), 1);
        shifts = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3), both);
    }
    __m512i decode(__m512i table, const uint8_t* packed) const {
        const __m512i codes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
        return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, codes), table);
    }
    // Of the pair of elements in 32-bit lane i.
    static constexpr int pair(int i) { return 8 * (i / 2 % 2) + 2 * (i / 4) + i % 2; }
};

// 64 elements in an order that takes a shift and a permute a half: 16-bit lane l < 16 of half h is element 4 l + 2 h + 1,
// lane 16 + l the one before it. Unlike multishift, shifts by lane run beside vdpbf16ps: on Zen 4 they share no pipe.
struct Interleaved64 {
    __m512i shift[2];
    Interleaved64() {
        const auto lanes = [](short low, short high) {
            return _mm512_inserti64x4(_mm512_set1_epi16(low), _mm256_set1_epi16(high), 1);
        };
        shift[0] = lanes(0, 4);
        shift[1] = lanes(8, 12);
    }
    // 64 codes; loads broadcast for free.
    static __m512i load(const uint8_t* packed) {
        return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
    }
    __m512i decode(__m512i table, __m512i codes, int half) const {
        return _mm512_permutexvar_epi16(_mm512_srlv_epi16(codes, shift[half]), table);
    }
    // A half of any 64 elements, low and high, in that order.
    static __m512i interleave(__m512i low, __m512i high, int half) {
        alignas(64) uint16_t from[32];
        for (int lane = 0; lane < 32; ++lane) from[lane] = static_cast<uint16_t>(4 * (lane % 16) + 2 * half + (lane < 16));
        return _mm512_permutex2var_epi16(low, _mm512_load_si512(from), high);
    }
};

// The map of nested scales, byte by byte: a permute of bytes looks up 64 codes.
struct ScaleBytes {
    alignas(64) uint8_t byte[4][256];
    explicit ScaleBytes(const float* map) {
        for (int i = 0; i < 256; i += 16) {
            const __m512i values = _mm512_loadu_si512(map + i);
            for (int b = 0; b < 4; ++b) {
                const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_srli_epi32(values, 8 * b));
                _mm_store_si128(reinterpret_cast<__m128i*>(byte[b] + i), bytes);
            }
        }
    }

    // The scales of blocks [block, block + n), block a multiple of 64, in room for 63 more: nf4_absmax, which takes 9
    // cycles for each where this takes 1.
    void scales(const lora_ops_nf4_weight& w, int64_t block, int64_t n, float* to) const {
        // Four vectors of dwords, taken apart to bytes and interleaved again in each 128 bits, are in this order.
        const __m512i transposed = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        const __m512 offset = _mm512_set1_ps(w.nested_offset);
        for (int64_t i = 0; i < n; i += 64) {
            const int64_t left = n - i;
            const __mmask64 inside = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
            const __m512i codes = _mm512_permutexvar_epi32(
                transposed, _mm512_maskz_loadu_epi8(inside, w.absmax_codes + block + i));
            const __mmask64 upper = _mm512_movepi8_mask(codes);  // a permute reads 7 bits of an index
            __m512i b[4];
            for (int j = 0; j < 4; ++j) {
                const auto part = [&](int at) { return _mm512_load_si512(byte[j] + at); };
                b[j] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(part(0), codes, part(64)),
                                              _mm512_permutex2var_epi8(part(128), codes, part(192)));
            }
            const __m512 nested = _mm512_set1_ps(w.nested_absmax[(block + i) / 256]);
            const auto write = [&](int j, __m512i bits) {
                const __m512 scale = _mm512_mul_ps(_mm512_castsi512_ps(bits), nested);
                _mm512_storeu_ps(to + i + 16 * j, _mm512_add_ps(scale, offset));
            };
            const __m512i low01 = _mm512_unpacklo_epi8(b[0], b[1]), high01 = _mm512_unpackhi_epi8(b[0], b[1]);
            const __m512i low23 = _mm512_unpacklo_epi8(b[2], b[3]), high23 = _mm512_unpackhi_epi8(b[2], b[3]);
            write(0, _mm512_unpacklo_epi16(low01, low23));
            write(1, _mm512_unpackhi_epi16(low01, low23));
            write(2, _mm512_unpacklo_epi16(high01, high23));
            write(3, _mm512_unpackhi_epi16(high01, high23));
        }
    }
};

// Whether rows and blocks of W meet at multiples of 64 elements.
inline bool is_aligned(const Gemm& g) { return g.k % 64 == 0 && g.w.block_size % 64 == 0; }

// Decodes elements [begin, begin + n) and up to 31 before and after them, aligned to 32. Element begin is at the
// returned address. out has room for n + 62.
inline const uint16_t* decode_span(const Gemm& g, int64_t begin, int64_t n, uint16_t* out) {
    const int64_t first = begin / 32 * 32, last = begin + n;
    const int64_t n_bytes = (g.n * g.k + 1) / 2;
    const bool inside = (last + 31) / 32 * 16 <= n_bytes;
    int64_t block = first / g.w.block_size, block_end = block * g.w.block_size;
    for (int64_t i = first; i < last; ++block) {
        block_end += g.w.block_size;
        const int64_t end = lesser(block_end, last);
        const __m512i table = bf16_table(nf4_absmax(g.w, block));
        if (inside) {
            for (; i < end; i += 32) _mm512_storeu_si512(out + i - first, decode32(table, g.w.packed + i / 2));
        } else {
            for (; i < end; i += 32) {
                _mm512_storeu_si512(out + i - first, decode32(table, g.w.packed + i / 2, n_bytes - i / 2));
            }
        }
    }
    return out + (begin - first);
}

// Fetches the line of element i, if there is such an element.
inline void prefetch(const Gemm& g, int64_t i) {
    if (i < g.n * g.k) _mm_prefetch(reinterpret_cast<const char*>(g.w.packed + i / 2), _MM_HINT_T0);
}

}  // namespace
}  // namespace lora_ops
