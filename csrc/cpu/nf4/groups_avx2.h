// Groups of 64 weights of an NF4 block to fp32 with AVX2: code * absmax rounded to T, and widened. A group comes in an order
// that saves shuffles; sums along it do not mind, if x is put in the same.
//
// AVX2 looks up bytes: a table of 16 values is one register for each of their bytes. The lookups, and the unpacks that put
// bytes together, go to the two pipes (one, on older machines) that shuffle, and are what bounds decoding.
#pragma once

#include "isa/avx2.h"
#include "nf4/codec.h"

namespace lora_ops {
namespace {

// Of 64 packed weights the codes of the even ones, or of the odd ones, each a byte.
inline __m256i nf4_codes(__m256i packed, int odd) {
    return _mm256_and_si256(odd ? packed : _mm256_srli_epi16(packed, 4), _mm256_set1_epi8(15));
}

// Moves pairs of bytes, so that even and odd codes, interleaved and unpacked twice, come out in order.
inline __m256i nf4_dealt(__m256i packed) {
    const __m128i pairs = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(packed, _mm256_broadcastsi128_si256(pairs)), 0xd8);
}

// Of 64 packed weights 32 codes, those of the lower or the upper 8 bytes of each 128 bits in their order.
inline __m256i nf4_codes_in_order(__m256i packed, int upper) {
    const __m256i even = nf4_codes(packed, 0), odd = nf4_codes(packed, 1);
    return upper ? _mm256_unpackhi_epi8(even, odd) : _mm256_unpacklo_epi8(even, odd);
}

// The bits of the code book's values, which a compiler of C++17 does not tell before it runs.
constexpr uint32_t nf4_code_bits(int i) {
    float x = kNF4Code[i] < 0 ? -kNF4Code[i] : kNF4Code[i];
    if (x == 0) return 0;
    uint32_t exponent = 127;
    for (; x < 1; x *= 2) --exponent;
    return (kNF4Code[i] < 0 ? 0x80000000u : 0u) | exponent << 23 | static_cast<uint32_t>((x - 1) * 0x1p23f);
}

struct NF4CodeBytes {
    alignas(16) uint8_t byte[4][16];
    constexpr NF4CodeBytes() : byte() {
        for (int b = 0; b < 4; ++b) {
            for (int i = 0; i < 16; ++i) byte[b][i] = static_cast<uint8_t>(nf4_code_bits(i) >> 8 * b);
        }
    }
};
constexpr NF4CodeBytes kNF4CodeBytes;

// Which of 64 weights is in lane `lane` of vector `vector` of a group: element(vector, lane). What a block needs: Table.
//
// In fp32: 25 operations that shuffle for 64 weights, where permutes of 8 entries, twice, with a blend by the code's fourth
// bit took 48. The planes are the code book's, so the scale comes after: to make a block's own costs more.
template <class T>
struct NF4Groups {
    using Table = float;  // absmax
    __m256i plane[4];

    NF4Groups() {
        for (int b = 0; b < 4; ++b) plane[b] = _mm256_broadcastsi128_si256(load128(kNF4CodeBytes.byte[b]));
    }

    static const Table* tables(const float* absmax, int64_t, Table*) { return absmax; }

    void decode(const uint8_t* packed, const Table& absmax, __m256 (&w)[8]) const {
        const __m256i bytes = load256(packed);
        for (int odd = 0; odd < 2; ++odd) look_up(nf4_codes(bytes, odd), absmax, w + 4 * odd);
    }

    void decode_in_order(const uint8_t* packed, const Table& absmax, __m256 (&w)[8]) const {
        const __m256i bytes = nf4_dealt(load256(packed));
        for (int upper = 0; upper < 2; ++upper) look_up(nf4_codes_in_order(bytes, upper), absmax, w + 4 * upper);
    }

    void look_up(__m256i codes, const float& absmax, __m256* w) const {
        const __m256 scale = _mm256_broadcast_ss(&absmax);
        __m256i b[4];
        for (int i = 0; i < 4; ++i) b[i] = _mm256_shuffle_epi8(plane[i], codes);
        const __m256i low01 = _mm256_unpacklo_epi8(b[0], b[1]), high01 = _mm256_unpackhi_epi8(b[0], b[1]);
        const __m256i low23 = _mm256_unpacklo_epi8(b[2], b[3]), high23 = _mm256_unpackhi_epi8(b[2], b[3]);
        const __m256i code[] = {_mm256_unpacklo_epi16(low01, low23), _mm256_unpackhi_epi16(low01, low23),
                                _mm256_unpacklo_epi16(high01, high23), _mm256_unpackhi_epi16(high01, high23)};
        for (int i = 0; i < 4; ++i) w[i] = _mm256_mul_ps(_mm256_castsi256_ps(code[i]), scale);
    }

    static constexpr int element(int vector, int lane) {
        return 2 * (4 * (vector % 4) + lane % 4 + 16 * (lane / 4)) + vector / 4;
    }
};

// The values of a block, rounded to 16 bits.
struct alignas(32) NF4Bytes {
    uint8_t low[16], high[16];
};

// Rounded to nearest even by an addition, which is right for all but a NaN; the upper half is the result. A comparison, as
// a shift would take the place of a shuffle.
inline __m256i rounded_up(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), lowest = _mm256_and_si256(bits, _mm256_set1_epi32(0x10000));
    const __m256i even = _mm256_cmpeq_epi32(lowest, _mm256_setzero_si256());  // -1
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x8000)), even);
}

// Of any absmax: rare, so never inlined, which would crowd the loop beside it.
template <class T>
__attribute__((noinline)) void nf4_bytes_of_any(float absmax, NF4Bytes& table) {
    for (int i = 0; i < 16; ++i) {
        const uint16_t bits = round_to<T>(kNF4Code[i] * absmax).bits;
        table.low[i] = static_cast<uint8_t>(bits);
        table.high[i] = static_cast<uint8_t>(bits >> 8);
    }
}

inline void nf4_bytes(float absmax, NF4Bytes& table, BF16) {
    // Values 0-3 and 8-11, then the others: shuffles within 128 bits leave 0-7 and 8-15.
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m256 first = _mm256_setr_m128(_mm_loadu_ps(kNF4Code), _mm_loadu_ps(kNF4Code + 8));
    const __m256 second = _mm256_setr_m128(_mm_loadu_ps(kNF4Code + 4), _mm_loadu_ps(kNF4Code + 12));
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_setr_epi8(2, 6, 10, 14, 2, 6, 10, 14, 3, 7, 11, 15, 3, 7, 11, 15));
    const __m256i a = _mm256_shuffle_epi8(rounded_up(_mm256_mul_ps(first, scale)), bytes);
    const __m256i b = _mm256_shuffle_epi8(rounded_up(_mm256_mul_ps(second, scale)), bytes);
    const __m256i halves = _mm256_blend_epi32(a, b, 0xaa);
    _mm256_store_si256(reinterpret_cast<__m256i*>(&table), _mm256_permute4x64_epi64(halves, 0xd8));
}

inline void nf4_bytes(float absmax, NF4Bytes& table, F16) {
    const __m256 scale = _mm256_set1_ps(absmax);
    const __m128i bytes = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    const auto eight = [&](int from) {
        return _mm_shuffle_epi8(to_16_bits(_mm256_mul_ps(_mm256_loadu_ps(kNF4Code + from), scale), F16{}), bytes);
    };
    const __m128i a = eight(0), b = eight(8);
    _mm_store_si128(reinterpret_cast<__m128i*>(table.low), _mm_unpacklo_epi64(a, b));
    _mm_store_si128(reinterpret_cast<__m128i*>(table.high), _mm_unpackhi_epi64(a, b));
}

// In 16 bits: 8 lookups and unpacks, and the table of a block. Tables are made in a loop of their own, which the processor
// overlaps better than a chain of 20 cycles before each group, and a load broadcasts what it has stored.
template <class T>
struct NF4Groups16 {
    using Table = NF4Bytes;

    static const Table* tables(const float* absmax, int64_t n, Table* to) {
        if (largest_abs_bits(absmax, n) < kInfBits<float>) {
            for (int64_t i = 0; i < n; ++i) nf4_bytes(absmax[i], to[i], T{});
        } else {
            for (int64_t i = 0; i < n; ++i) nf4_bytes_of_any<T>(absmax[i], to[i]);
        }
        return to;
    }

    // 64 weights in order, 16 a vector.
    static void words_in_order(const uint8_t* packed, const Table& table, __m256i (&words)[4]) {
        // Four bytes in turn for the lower and the upper 128 bits.
        const __m256i dealt = _mm256_permutevar8x32_epi32(load256(packed), _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
        for (int upper = 0; upper < 2; ++upper) {
            __m256i two[2];
            look_up(table, nf4_codes_in_order(dealt, upper), two);
            words[2 * upper] = two[0];
            words[2 * upper + 1] = two[1];
        }
    }

    static void decode_in_order(const uint8_t* packed, const Table& table, __m256 (&w)[8]) {
        __m256i words[4];
        words_in_order(packed, table, words);
        for (int i = 0; i < 4; ++i) {
            w[2 * i] = widen(_mm256_castsi256_si128(words[i]), T{});
            w[2 * i + 1] = widen(_mm256_extracti128_si256(words[i], 1), T{});
        }
    }

    // Of 32 codes, a byte each: those of bytes 0-7 and 16-23, then of 8-15 and 24-31.
    static void look_up(const Table& table, __m256i codes, __m256i (&words)[2]) {
        const __m256i low = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(table.low)), codes);
        const __m256i high = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load128(table.high)), codes);
        words[0] = _mm256_unpacklo_epi8(low, high);
        words[1] = _mm256_unpackhi_epi8(low, high);
    }
};

template <>
struct NF4Groups<BF16> : NF4Groups16<BF16> {
    static void decode(const uint8_t* packed, const Table& table, __m256 (&w)[8]) {
        const __m256i bytes = load256(packed), upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
        for (int odd = 0; odd < 2; ++odd) {
            __m256i words[2];
            look_up(table, nf4_codes(bytes, odd), words);
            for (int i = 0; i < 2; ++i) {
                w[4 * odd + 2 * i] = _mm256_castsi256_ps(_mm256_slli_epi32(words[i], 16));
                w[4 * odd + 2 * i + 1] = _mm256_castsi256_ps(_mm256_and_si256(words[i], upper));
            }
        }
    }
    static constexpr int element(int vector, int lane) {
        return 2 * (8 * (vector / 2 % 2) + 2 * (lane % 4) + vector % 2 + 16 * (lane / 4)) + vector / 4;
    }
};

template <>
struct NF4Groups<F16> : NF4Groups16<F16> {
    static void decode(const uint8_t* packed, const Table& table, __m256 (&w)[8]) {
        const __m256i bytes = load256(packed);
        for (int odd = 0; odd < 2; ++odd) {
            __m256i words[2];
            look_up(table, nf4_codes(bytes, odd), words);
            for (int i = 0; i < 2; ++i) {
                w[4 * odd + 2 * i] = _mm256_cvtph_ps(_mm256_castsi256_si128(words[i]));
                w[4 * odd + 2 * i + 1] = _mm256_cvtph_ps(_mm256_extracti128_si256(words[i], 1));
            }
        }
    }
    static constexpr int element(int vector, int lane) {
        return 2 * (8 * (vector / 2 % 2) + lane + 16 * (vector % 2)) + vector / 4;
    }
};

// nf4_absmax of blocks [block, block + n) of doubly quantized scales.
inline void nf4_nested_scales(const lora_ops_nf4_weight& w, int64_t block, int64_t n, float* to) {
    const __m256 offset = _mm256_set1_ps(w.nested_offset);
    const uint8_t* const codes = w.absmax_codes + block;
    for (int64_t i = 0; i < n;) {
        const int64_t end = lesser(n, i + 256 - (block + i) % 256);
        const float nested_absmax = w.nested_absmax[(block + i) / 256];
        for (; i + 8 <= end; i += 8) {
            const __m256 value = look_up8(w.absmax_map, [&](int j) { return codes[i + j]; });
            _mm256_storeu_ps(to + i, _mm256_add_ps(_mm256_mul_ps(value, _mm256_set1_ps(nested_absmax)), offset));
        }
        for (; i < end; ++i) to[i] = w.absmax_map[codes[i]] * nested_absmax + w.nested_offset;
    }
}

// The scales of n groups of 64 from element `first` on, where they are or in `to`.
inline const float* nf4_scales_of_64(const lora_ops_nf4_weight& w, int64_t first, int64_t n, float* to) {
    const int64_t block = first / w.block_size;
    if (w.block_size != 64) {
        scales_of_64(w, first, n, to);
    } else if (w.absmax) {
        return w.absmax + block;
    } else {
        nf4_nested_scales(w, block, n, to);
    }
    return to;
}

inline void store_groups(const NF4Groups<float>& nf4, const uint8_t* packed, const float& absmax, float* out) {
    __m256 w[8];
    nf4.decode_in_order(packed, absmax, w);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + 8 * i, w[i]);
}

template <class T>
void store_groups(const NF4Groups<T>& nf4, const uint8_t* packed, const NF4Bytes& table, T* out) {
    __m256i words[4];
    nf4.words_in_order(packed, table, words);
    for (int i = 0; i < 4; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16 * i), words[i]);
}

// Elements [begin, end): groups of 64 within one block, and by `rest` those before and after them.
template <class T, class Rest>
void nf4_dequantize_groups(const lora_ops_nf4_weight& w, int64_t begin, int64_t end, T* out, Rest rest) {
    constexpr int64_t kGroups = 32;  // whose tables take 1 KiB
    const int64_t first = ceil_div(begin, 64) * 64, last = end / 64 * 64;
    if (w.block_size % 64 || first >= last) return rest(begin, end, out);
    if (begin < first) rest(begin, first, out);
    const NF4Groups<T> nf4;
    float scales[kGroups];
    typename NF4Groups<T>::Table room[kGroups];
    for (int64_t i = first; i < last; i += 64 * kGroups) {
        const int64_t n = lesser(64 * kGroups, last - i) / 64;
        const auto* const table = NF4Groups<T>::tables(nf4_scales_of_64(w, i, n, scales), n, room);
        for (int64_t j = 0; j < n; ++j) store_groups(nf4, w.packed + i / 2 + 32 * j, table[j], out + (i - begin) + 64 * j);
    }
    if (last < end) rest(last, end, out + (last - begin));
}

}  // namespace
}  // namespace lora_ops
