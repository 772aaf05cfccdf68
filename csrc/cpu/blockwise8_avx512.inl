// 8-bit blockwise codes and AdamW on AVX-512, 64 values at a time, without gathers: they bound the search (2.7 times the
// whole step's time on Zen 5). LookUp reads a table of 256 entries:
//   void look_up64(const float* table, const uint8_t (*table_bytes)[256], __m512i lanes, __m512 out[4])
//   __m512i upper_bytes(__m512i a, __m512i b), of 2 x 32 words, in lanes
//
// "Lanes" are 64 bytes in the order in which 4 vectors of 16 pack: each 128-bit lane holds 4 bytes of each vector.
#pragma once

#include "blockwise8.inl"

#include "adamw.inl"

namespace lora_ops {
namespace {

inline uint32_t max_abs_bits_f32(const float* x, int64_t n) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 16) {
        largest = _mm512_max_epu32(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
    }
    return _mm512_reduce_max_epu32(largest);
}

// Bytes in order <-> lanes: the transpose is its own inverse.
inline __m512i transpose_lanes(__m512i bytes) {
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), bytes);
}

struct Blockwise8Lines {
    __m512i rise[2], base[2];
    explicit Blockwise8Lines(const Blockwise8Code& code)
        : rise{_mm512_load_si512(code.rise[0]), _mm512_load_si512(code.rise[1])},
          base{_mm512_load_si512(code.base[0]), _mm512_load_si512(code.base[1])} {}

    // In the upper byte of each word, of the upper halves of 32 positive floats.
    __m512i guess(__m512i half) const {
        half = _mm512_max_epi16(half, _mm512_set1_epi16(Blockwise8Code::kFirstExponent << 7));
        const __m512i exponent = _mm512_srli_epi16(half, 7), fraction = _mm512_slli_epi16(half, 9);
        __m512i line[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {  // permutes read 5 bits of an index
            const __m512i risen = _mm512_mulhi_epu16(fraction, _mm512_permutexvar_epi16(exponent, rise[i]));
            line[i] = _mm512_add_epi16(risen, _mm512_permutexvar_epi16(exponent, base[i]));
        }
        return _mm512_min_epu16(line[0], line[1]);
    }
};

// The upper halves of 2 x 16 floats, in lanes.
inline __m512i upper_halves(__m512 a, __m512 b) {
    alignas(64) static constexpr struct Index {
        uint16_t word[32];
        constexpr Index() : word() {
            for (int i = 0; i < 32; ++i) {
                const int lane = i / 8, at = i % 8;
                word[i] = static_cast<uint16_t>(at / 4 * 32 + 2 * (4 * lane + at % 4) + 1);
            }
        }
    } index;
    return _mm512_permutex2var_epi16(_mm512_castps_si512(a), _mm512_load_si512(&index), _mm512_castps_si512(b));
}

template <class LookUp>
class Avx512AdamwBlocks;

template <class LookUp>
struct Avx512Blockwise8 {
    using AdamwBlocks = Avx512AdamwBlocks<LookUp>;

    template <class T>
    static uint32_t max_abs_bits(const T* x, int64_t n) {
        return max_abs_bits_f32(x, n);
    }

    // A code is the lines' guess, or one more.
    template <bool kSigned>
    static void encode64(const float* x, __m512 scale, const Blockwise8Code& code, const Blockwise8Lines& lines,
                         uint8_t* codes) {
        __m512 v[4], threshold[4];
        __m512i word[2], guess[2];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) v[i] = _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), scale);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            word[i] = upper_halves(v[2 * i], v[2 * i + 1]);
            // Where v is unsigned, what is negative all the same is below the first bin: 0.
            guess[i] = lines.guess(kSigned ? _mm512_and_si512(word[i], _mm512_set1_epi16(0x7fff)) : word[i]);
        }
        __m512i lanes = LookUp::upper_bytes(guess[0], guess[1]);
        if (kSigned) {  // 127 + guess for positive v, 126 - guess for negative ones, and 0 for what is below it
            const __mmask64 negative = _mm512_movepi8_mask(_mm512_packs_epi16(word[0], word[1]));
            const __m512i up = _mm512_adds_epu8(lanes, _mm512_set1_epi8(127));
            lanes = _mm512_mask_subs_epu8(up, negative, _mm512_set1_epi8(126), lanes);
        }
        LookUp::look_up64(code.threshold, code.threshold_bytes, lanes, threshold);
        __mmask64 above = 0;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            above |= __mmask64{_mm512_cmp_ps_mask(v[i], threshold[i], _CMP_GT_OQ)} << 16 * i;
        }
        const __m512i found = transpose_lanes(lanes);
        _mm512_storeu_si512(codes, _mm512_mask_add_epi8(found, above, found, _mm512_set1_epi8(1)));
    }

    template <bool kSigned>
    static void encode(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        const Blockwise8Lines lines(code);
        const __m512 scales = _mm512_set1_ps(scale);
        int64_t i = 0;
        for (; i + 64 <= n; i += 64) encode64<kSigned>(x + i, scales, code, lines, codes + i);
        if (i == n) return;
        float last[64] = {};
        uint8_t last_codes[64];
        memcpy(last, x + i, 32 * sizeof *x);
        encode64<kSigned>(last, scales, code, lines, last_codes);
        memcpy(codes + i, last_codes, 32);
    }

    static void encode8(const float* x, int64_t n, float scale, const Blockwise8Code& code, uint8_t* codes) {
        if (!code.linear) {
            for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] * scale, code);
        } else if (code.is_signed) {
            encode<true>(x, n, scale, code, codes);
        } else {
            encode<false>(x, n, scale, code, codes);
        }
    }

    static void decode8(const uint8_t* codes, int64_t n, float scale, const Blockwise8Code& code, float* out) {
        const __m512 scales = _mm512_set1_ps(scale);
        int64_t i = 0;
        for (; i + 64 <= n; i += 64) {
            __m512 value[4];
            LookUp::look_up64(code.map, code.map_bytes, transpose_lanes(_mm512_loadu_si512(codes + i)), value);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) _mm512_storeu_ps(out + i + 16 * j, _mm512_mul_ps(value[j], scales));
        }
        blockwise8_decode(codes + i, n - i, scale, code, out + i);
    }
};

// The update of 16 elements is bound by the divider (a root and a quotient), coding by the two ports that permute: on
// Zen 4 0.30 and 0.74 ns an element, one after the other. So a block is updated while the one before it is coded.
template <class LookUp>
class Avx512AdamwBlocks {
    using Vec = Avx512Blockwise8<LookUp>;

  public:
    Avx512AdamwBlocks(const AdamwConstants& constants, const AdamwCodes& codes)
        : c_(constants), codes_(codes), m_lines_(*codes.exp_avg), v_lines_(*codes.exp_avg_sq), one_by_one_(constants, codes) {}

    void step(float* p, const float* g, int64_t n, const CodedBlock& block) {
        const bool lines = codes_.exp_avg->linear && codes_.exp_avg->is_signed && codes_.exp_avg_sq->linear &&
                           !codes_.exp_avg_sq->is_signed;
        if (n < kAdamwBlock || !lines) {
            finish();
            return one_by_one_.step(p, g, n, block);
        }
        if (waiting_) {
            update<true>(p, g, block);
        } else {
            update<false>(p, g, block);
        }
    }

    void finish() {
        if (!waiting_) return;
        waiting_ = false;
        for (int i = 0; i < kAdamwBlock; i += 64) code64(i);
    }

  private:
    template <bool kCode>
    void update(float* p, const float* g, const CodedBlock& block) {
        const __m512 m_scale = _mm512_set1_ps(*block.m_absmax), v_scale = _mm512_set1_ps(*block.v_absmax);
        __m512i m_largest = _mm512_setzero_si512(), v_largest = m_largest;
        const int now = 1 - before_;
        for (int i = 0; i < kAdamwBlock; i += 64) {
            __m512 m[4], v[4];
            LookUp::look_up64(codes_.exp_avg->map, codes_.exp_avg->map_bytes,
                              transpose_lanes(_mm512_loadu_si512(block.m_codes + i)), m);
            LookUp::look_up64(codes_.exp_avg_sq->map, codes_.exp_avg_sq->map_bytes,
                              transpose_lanes(_mm512_loadu_si512(block.v_codes + i)), v);
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const int at = i + 16 * j;
                __m512 mj = _mm512_mul_ps(m[j], m_scale), vj = _mm512_mul_ps(v[j], v_scale);
                update16(p + at, g + at, mj, vj);
                _mm512_store_ps(m_[now] + at, mj);
                _mm512_store_ps(v_[now] + at, vj);
                m_largest = _mm512_max_epu32(m_largest, magnitude(mj));
                v_largest = _mm512_max_epu32(v_largest, magnitude(vj));
            }
            if (kCode) code64(i);
        }
        before_ = now;
        waiting_ = true;
        block_ = block;
        *block.m_absmax = bits_float(_mm512_reduce_max_epu32(m_largest));
        *block.v_absmax = bits_float(_mm512_reduce_max_epu32(v_largest));
        m_scale_ = 1.0f / at_least(*block.m_absmax, kLeastAbsmax);
        v_scale_ = 1.0f / at_least(*block.v_absmax, kLeastAbsmax);
    }

    // adamw_update, in its order of operations.
    void update16(float* p, const float* g, __m512& m, __m512& v) const {
        const __m512 grad = _mm512_mul_ps(_mm512_loadu_ps(g), _mm512_set1_ps(c_.sign));
        m = _mm512_add_ps(m, _mm512_mul_ps(_mm512_sub_ps(grad, m), _mm512_set1_ps(c_.beta1c)));
        v = _mm512_add_ps(_mm512_mul_ps(v, _mm512_set1_ps(c_.beta2)),
                          _mm512_mul_ps(_mm512_mul_ps(grad, _mm512_set1_ps(c_.beta2c)), grad));
        const __m512 below = _mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v), _mm512_set1_ps(c_.bias2)),
                                           _mm512_set1_ps(c_.eps));
        const __m512 way = _mm512_div_ps(_mm512_mul_ps(m, _mm512_set1_ps(c_.step_size)), below);
        _mm512_storeu_ps(p, _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(p), _mm512_set1_ps(c_.decay)), way));
    }

    void code64(int i) const {
        Vec::template encode64<true>(m_[before_] + i, _mm512_set1_ps(m_scale_), *codes_.exp_avg, m_lines_,
                                     block_.m_codes + i);
        Vec::template encode64<false>(v_[before_] + i, _mm512_set1_ps(v_scale_), *codes_.exp_avg_sq, v_lines_,
                                      block_.v_codes + i);
    }

    static __m512i magnitude(__m512 x) {
        return _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    }

    const AdamwConstants& c_;
    const AdamwCodes& codes_;
    const Blockwise8Lines m_lines_, v_lines_;
    CodedBlocks<Vec> one_by_one_;
    alignas(64) float m_[2][kAdamwBlock], v_[2][kAdamwBlock];  // of the block before and of the one now
    CodedBlock block_{};                                       // the block before
    float m_scale_ = 0.0f, v_scale_ = 0.0f;
    int before_ = 0;
    bool waiting_ = false;  // its codes are still to be written
};

template <class LookUp>
constexpr Blockwise8Kernels blockwise8_kernels() {
    using Vec = Avx512Blockwise8<LookUp>;
    return {blockwise8_quantize<Vec>, blockwise8_dequantize<Vec>, adamw<Vec>};
}

}  // namespace
}  // namespace lora_ops
