// out[i, j] += sum over p of left[i, p] right[p, j], with 32-bit elements: floats, or pairs of bfloat16 that are
// neighbours along the summed dimension. left is broadcast element by element; right and out are vectors.
#pragma once

#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <type_traits>

namespace lora_ops {
namespace {

constexpr int64_t kLanes = 16;  // the rank is padded to a multiple where it is the vector dimension
constexpr int64_t kBlock = 64;  // columns of out that a product handles at once

// Terms that a product sums before it adds them to out. In one running sum of fp32 the error would grow with the root of
// all terms; torch's own products are blocked, too.
constexpr int64_t kTerms = 64;

// The same for a whole sum of `terms`: torch sums short ones in several vectors, whose lanes then hold a few terms each.
constexpr int64_t terms_at_once(int64_t terms) { return terms <= 2 * kTerms ? kTerms / 4 : kTerms; }

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// A stride of left that the compiler knows: 16 rows need 16 addresses, more than there are registers.
template <int64_t N>
using Fixed = std::integral_constant<int64_t, N>;

// V is an instruction set: V::F holds V::kWidth floats. A tile of V::kRows x 16 sums fits its registers, with the operands.
template <class V, int I, int J, class SI, class SP>
inline __attribute__((always_inline)) void tile_sums(int64_t count, const uint32_t* left, SI stride_i, SP stride_p,
                                                     const uint32_t* right, int64_t right_row,
                                                     typename V::F (&sum)[I][J]) {
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) sum[i][j] = V::zero();
    }
    for (int64_t p = 0; p < count; ++p) {
        typename V::F right_p[J];
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) right_p[j] = V::load(right + p * right_row + j * V::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < I; ++i) {
            const typename V::F left_ip = V::broadcast(left + i * stride_i + p * stride_p);
#pragma GCC unroll 4
            for (int j = 0; j < J; ++j) sum[i][j] = V::multiply_add(sum[i][j], left_ip, right_p[j]);
        }
    }
}

template <class V, int I, int J, class SI, class SP>
inline void product_tile(int64_t count, const uint32_t* left, SI stride_i, SP stride_p, const uint32_t* right,
                         int64_t right_row, float* out, int64_t out_row, bool add) {
    typename V::F sum[I][J];
    tile_sums<V>(count, left, stride_i, stride_p, right, right_row, sum);
#pragma GCC unroll 16
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) {
            float* const to = out + i * out_row + j * V::kWidth;
            V::store(to, add ? V::load(to) + sum[i][j] : sum[i][j]);
        }
    }
}

template <class V, int I, int J, class SI, class SP>
inline void product_columns(int64_t rows, int64_t count, const uint32_t* left, SI stride_i, SP stride_p,
                            const uint32_t* right, int64_t right_row, float* out, int64_t out_row, bool add,
                            int64_t at_once) {
    for (int64_t p = 0; p < count; p += at_once) {
        for (int64_t i = 0; i < rows; i += I) {
            product_tile<V, I, J>(std::min(at_once, count - p), left + i * stride_i + p * stride_p, stride_i, stride_p,
                                  right + p * right_row, right_row, out + i * out_row, out_row, add || p > 0);
        }
    }
}

// out [rows, columns] (+)= left [rows, count] right [count, columns], at_once terms in one running sum. columns is a
// multiple of kLanes, rows one of 16, or of 4 if columns is one of kBlock. AVX-512 tiles have 16 sums or more, which
// hides the latency of the multiply-add.
template <class V, class SI, class SP>
void product(int64_t rows, int64_t columns, int64_t count, const uint32_t* left, SI stride_i, SP stride_p,
             const uint32_t* right, int64_t right_row, float* out, int64_t out_row, bool add,
             int64_t at_once = kTerms) {
    const auto run = [&](auto tile, int64_t j) {
        tile(rows, count, left, stride_i, stride_p, right + j, right_row, out + j, out_row, add, at_once);
    };
    int64_t j = 0;
    if constexpr (V::kWidth == 16) {
        for (; j + 64 <= columns; j += 64) run(product_columns<V, 4, 4, SI, SP>, j);
        if (columns - j == 48) run(product_columns<V, 8, 3, SI, SP>, j);
        if (columns - j == 32) run(product_columns<V, 8, 2, SI, SP>, j);
        if (columns - j == 16) run(product_columns<V, 16, 1, SI, SP>, j);
    } else {
        constexpr int kI = V::kRows;
        for (; j < columns; j += 16) run(product_columns<V, kI, 16 / V::kWidth, SI, SP>, j);
    }
}

// sums [n] (+)= the sum of the rows of x [rows, n], floats; rows and n are multiples of 16. The rows are taken in four
// running sums, whose errors add up less than those of one.
template <class V>
void sum_rows(const uint32_t* x, int64_t x_row, int64_t rows, int64_t n, float* sums, bool add) {
    for (int64_t c = 0; c < n; c += V::kWidth) {
        typename V::F part[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
        for (int64_t i = 0; i < rows; i += 4) {
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) part[j] = part[j] + V::load(x + (i + j) * x_row + c);
        }
        const typename V::F sum = (part[0] + part[1]) + (part[2] + part[3]);
        V::store(sums + c, add ? V::load(sums + c) + sum : sum);
    }
}

// sums [rows, n] (+)= parts [rows, n].
inline void add_rows(const float* parts, int64_t parts_row, int64_t rows, int64_t n, float* sums, int64_t sums_row,
                     bool add = true) {
    for (int64_t i = 0; i < rows; ++i) {
        float* const to = sums + i * sums_row;
        const float* const from = parts + i * parts_row;
        for (int64_t c = 0; c < n; ++c) to[c] = add ? to[c] + from[c] : from[c];
    }
}

// out [columns, rows] = in [rows, columns]; rows is a multiple of 16, and in can be read up to 16 columns further.
template <class V>
void transpose(const uint32_t* in, int64_t in_row, int64_t rows, int64_t columns, uint32_t* out, int64_t out_row) {
    for (int64_t r = 0; r < rows; r += 16) {
        for (int64_t c = 0; c < columns; c += 16) {
            const int64_t n = std::min<int64_t>(16, columns - c);
            if constexpr (V::kWidth == 16) {
                V::transpose16(in + r * in_row + c, in_row, n, out + c * out_row + r, out_row);
            } else {
                for (int64_t j = c; j < c + n; ++j) {
                    for (int64_t i = r; i < r + 16; ++i) out[j * out_row + i] = in[i * in_row + j];
                }
            }
        }
    }
}

// The sum of a [n] b [n], n a multiple of 64, as the lanes of a vector.
template <class V>
typename V::F dot(const uint32_t* a, const uint32_t* b, int64_t n) {
    typename V::F sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    for (int64_t i = 0; i < n; i += 4 * V::kWidth) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const int64_t at = i + j * V::kWidth;
            sums[j] = V::multiply_add(sums[j], V::load(a + at), V::load(b + at));
        }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class V>
float sum_of_lanes(typename V::F v) {
    float lanes[V::kWidth];
    V::store(lanes, v);
    for (int n = V::kWidth / 2; n > 0; n /= 2) {
        for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    return lanes[0];
}

}  // namespace
}  // namespace lora_ops
