// Routes with AVX2, FMA and F16C.
#include "gemm/float_dots.h"
#include "gemm/float_panels.h"
#include "gemm/float_row_sums.h"
#include "gemm/one_row_dx_avx2.h"
#include "gemm/register_dots_avx2.h"
#include "isa/avx2.h"
#include "nf4/avx2.h"
#include "nf4/groups_avx2.h"

namespace lora_ops {
namespace {

struct Avx2Floats {
    using F = __m256;
    using Codec = Avx2NF4;
    static constexpr int kLanes = 8, kRows = 6, kVectors = 2;  // 12 accumulators, 2 + 1 operands of 16 registers
    static constexpr bool kGroups = true;

    template <class T>
    static Avx2NF4::Table<float> table(float absmax) {
        Avx2NF4::Table<float> table(absmax);
        if constexpr (sizeof(T) == 2) {
            table.low = widen(to_16_bits(table.low, T{}), T{});
            table.high = widen(to_16_bits(table.high, T{}), T{});
        }
        return table;
    }
    template <class T>
    static void decode64(const uint8_t* packed, float absmax, float* out) {
        const NF4Groups<T> groups;
        typename NF4Groups<T>::Table room;
        F w[8];
        groups.decode_in_order(packed, *NF4Groups<T>::tables(&absmax, 1, &room), w);
        for (int i = 0; i < 8; ++i) _mm256_storeu_ps(out + 8 * i, w[i]);
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
    template <class T>
    static F load(const T* p) { return load8(p); }
    template <class T>
    static void store(T* p, F x) { store8(p, x); }

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

}  // namespace

const GemmRoute kAvx2RegisterDots = {serves_register_dots, plan_register_dots, prepare_register_dots,
                                     register_dots_task};
const GemmRoute kAvx2OneRowDx = {serves_one_row_dx, plan_one_row_dx, nullptr, one_row_dx_task};
const GemmRoute kAvx2Dots = float_dots<Avx2Floats>();
const GemmRoute kAvx2RowSums = float_row_sums<Avx2Floats>();
const GemmRoute kAvx2Panels = float_panels<Avx2Floats>();

}  // namespace lora_ops
