// Products with an NF4 weight in fp32 multiply-adds, for activations of type T; written once for every instruction set.
//
// The weight is code * absmax rounded to T, as dense torch holds it, and widened; x is widened a tile at a time.
//
// V supplies vectors of kLanes floats of type F and what the blocking needs to know:
//   Codec, table<T>(absmax)            of nf4.inl, and a Table<float> of values rounded to T
//   kRows, kVectors                    the tile of the micro-kernel
//   F zero(), set1(float), load(const T*), fma(a, b, c); store(float* or T*, F); float sum(F)
//   transpose(const float* const rows[kLanes], int64_t at, float* out, int64_t stride)

namespace lora_ops {
namespace {

// As decode_span of avx512bf16.cpp, to fp32: the address of element begin within out, which has room for n + 62.
template <class V, class T>
const float* decode_span_f32(const Gemm& g, int64_t begin, int64_t n, float* out) {
    const int64_t first = begin / 32 * 32, last = begin + n;
    const int64_t n_bytes = (g.n * g.k + 1) / 2;
    int64_t block = first / g.w.block_size;
    for (int64_t i = first; i < last; ++block) {
        const int64_t block_end = lesser((block + 1) * g.w.block_size, last);
        const auto table = V::template table<T>(nf4_absmax(g.w, block));
        for (; i < block_end; i += 32) {
            if (n_bytes - i / 2 >= 16) {
                V::Codec::template decode32<float>(table, g.w.packed + i / 2, out + i - first);
            } else {  // the tensor ends here
                uint8_t bytes[16] = {};
                memcpy(bytes, g.w.packed + i / 2, static_cast<size_t>(n_bytes - i / 2));
                V::Codec::template decode32<float>(table, bytes, out + i - first);
            }
        }
    }
    return out + (begin - first);
}

// A panel is [kParts, depth, kWidth].
template <class V, class T>
struct F32Engine {
    static constexpr int kRows = V::kRows, kWidth = V::kVectors * V::kLanes, kColumns = 64, kParts = kColumns / kWidth;
    static constexpr bool kFuses = false;
    static constexpr int64_t kDepth = 1024;
    // Terms that are added one after the other before they join the total. A chain over all of K = 4096 is 4 times as
    // wrong as torch; chains of 64 are less wrong than torch from K = 256 to 14336.
    static constexpr int64_t kChain = 64;
    static constexpr int64_t kPanelBytes = kDepth * kColumns * 4;
    static constexpr int64_t kTileBytes = kRows * kDepth * 4;

    static void panel(const Gemm& g, int64_t column, int64_t begin, int64_t depth, void* panel) {
        for (int part = 0; part < kParts; ++part) {
            float* const to = static_cast<float*>(panel) + part * depth * kWidth;
            if (g.dx) {
                part_of_columns(g, column + part * kWidth, begin, depth, to);
            } else {
                part_of_rows(g, column + part * kWidth, begin, depth, to);
            }
        }
    }

    static void part_of_rows(const Gemm& g, int64_t column, int64_t begin, int64_t depth, float* panel) {
        constexpr int64_t kSpan = 128, kRoom = kSpan + 64;
        alignas(64) float rows[V::kLanes * kRoom] = {};
        for (int64_t k = 0; k < depth; k += kSpan) {
            const int64_t n = lesser(kSpan, depth - k);
            for (int vector = 0; vector < V::kVectors; ++vector) {
                const float* row[V::kLanes];
                for (int i = 0; i < V::kLanes; ++i) {
                    const int64_t at = column + V::kLanes * vector + i;
                    row[i] = rows + i * kRoom;
                    if (at < g.n) {
                        row[i] = decode_span_f32<V, T>(g, at * g.k + begin + k, n, rows + i * kRoom);
                    } else {
                        memset(rows + i * kRoom, 0, sizeof(float) * kRoom);
                    }
                }
                float* const to = panel + k * kWidth + V::kLanes * vector;
                int64_t i = 0;
                for (; i + V::kLanes <= n; i += V::kLanes) V::transpose(row, i, to + i * kWidth, kWidth);
                for (; i < n; ++i) {
                    for (int lane = 0; lane < V::kLanes; ++lane) to[i * kWidth + lane] = row[lane][i];
                }
            }
        }
    }

    static void part_of_columns(const Gemm& g, int64_t column, int64_t begin, int64_t depth, float* panel) {
        alignas(64) float row[kWidth + 64] = {};
        const int64_t n = lesser(kWidth, g.k - column);
        if (n <= 0) return static_cast<void>(memset(panel, 0, sizeof(float) * depth * kWidth));
        for (int64_t i = 0; i < depth; ++i) {
            const float* from = decode_span_f32<V, T>(g, (begin + i) * g.k + column, n, row);
            memcpy(panel + i * kWidth, from, sizeof(float) * kWidth);
        }
    }

    template <int rows>
    static void tile(const Tile<T>& t, void* scratch) {
        const float* a;
        int64_t stride_a;
        if constexpr (sizeof(T) == sizeof(float)) {
            a = t.a;
            stride_a = t.stride_a;
        } else {
            float* const wide = static_cast<float*>(scratch);
            for (int i = 0; i < rows; ++i) widen(t.a + i * t.stride_a, t.depth, wide + i * kDepth);
            a = wide;
            stride_a = kDepth;
        }
        for (int part = 0; part < kParts && part * kWidth < t.columns; ++part) {
            part_of_tile<rows>(t, a, stride_a, part * kWidth);
        }
    }

    static void widen(const T* from, int64_t n, float* to) {
        int64_t i = 0;
        for (; i + V::kLanes <= n; i += V::kLanes) V::store(to + i, V::load(from + i));
        for (; i < n; ++i) to[i] = to_float(from[i]);
    }

    template <int rows>
    static void part_of_tile(const Tile<T>& t, const float* a, int64_t stride_a, int64_t column) {
        using F = typename V::F;
        const float* const panel = static_cast<const float*>(t.panel) + column * t.depth;
        alignas(64) float total[rows][kWidth];
        for (int i = 0; i < rows; ++i) {
            for (int j = 0; j < kWidth; ++j) total[i][j] = t.first ? 0.0f : t.sums[i * kColumns + column + j];
        }
        for (int64_t begin = 0; begin < t.depth; begin += kChain) {
            const int64_t end = lesser(begin + kChain, t.depth);
            F sum[rows][V::kVectors];
            for (auto& row : sum) {
                for (F& s : row) s = V::zero();
            }
            for (int64_t k = begin; k < end; ++k) {
                F b[V::kVectors];
                for (int j = 0; j < V::kVectors; ++j) b[j] = V::load(panel + k * kWidth + j * V::kLanes);
                for (int i = 0; i < rows; ++i) {
                    const F x = V::set1(a[i * stride_a + k]);
                    for (int j = 0; j < V::kVectors; ++j) sum[i][j] = V::fma(x, b[j], sum[i][j]);
                }
            }
            for (int i = 0; i < rows; ++i) {
                for (int j = 0; j < V::kVectors; ++j) {
                    float* const at = total[i] + j * V::kLanes;
                    V::store(at, V::add(V::load(at), sum[i][j]));
                }
            }
        }
        for (int i = 0; i < rows; ++i) {
            if (t.last) {
                write(total[i], t.bias ? t.bias + column : nullptr, lesser(kWidth, t.columns - column),
                      t.out + i * t.stride_out + column);
            } else {
                memcpy(t.sums + i * kColumns + column, total[i], sizeof total[i]);
            }
        }
    }

    static void write(const float* sums, const T* bias, int64_t n, T* out) {
        int64_t i = 0;
        for (; i + V::kLanes <= n; i += V::kLanes) {
            V::store(out + i, V::add(V::load(sums + i), bias ? V::load(bias + i) : V::zero()));
        }
        for (; i < n; ++i) out[i] = round_to<T>(sums[i] + (bias ? to_float(bias[i]) : 0.0f));
    }
};

// A few rows of x: rows of W are decoded to L1 and multiplied along K.
constexpr int kMostF32DotRows = 4;
constexpr int64_t kF32DotColumns = 32;

template <class V, class T, int m>
void f32_dot_task(const Gemm& g, int64_t task) {
    using F = typename V::F;
    constexpr int64_t kSpan = 512;
    constexpr int kUnroll = 2;
    alignas(64) float buffer[kSpan + 64];
    const T* const x = static_cast<const T*>(g.a);
    const int64_t end = lesser((task + 1) * kF32DotColumns, g.n);
    for (int64_t column = task * kF32DotColumns; column < end; ++column) {
        F sum[m][kUnroll];
        float rest[m] = {};
        for (auto& row : sum) {
            for (F& s : row) s = V::zero();
        }
        for (int64_t begin = 0; begin < g.k; begin += kSpan) {
            const int64_t n = lesser(kSpan, g.k - begin);
            const float* const w = decode_span_f32<V, T>(g, column * g.k + begin, n, buffer);
            int64_t k = 0;
            for (; k + kUnroll * V::kLanes <= n; k += kUnroll * V::kLanes) {
                for (int u = 0; u < kUnroll; ++u) {
                    const F b = V::load(w + k + u * V::kLanes);
                    for (int i = 0; i < m; ++i) {
                        sum[i][u] = V::fma(V::load(x + i * g.stride_a + begin + k + u * V::kLanes), b, sum[i][u]);
                    }
                }
            }
            for (; k < n; ++k) {
                for (int i = 0; i < m; ++i) rest[i] += to_float(x[i * g.stride_a + begin + k]) * w[k];
            }
        }
        for (int i = 0; i < m; ++i) {
            float y = V::sum(V::add(sum[i][0], sum[i][1])) + rest[i];
            if (g.bias) y += to_float(static_cast<const T*>(g.bias)[column]);
            static_cast<T*>(g.out)[i * g.stride_out + column] = round_to<T>(y);
        }
    }
}

template <class V, class T>
void f32_task_of(const Gemm& g, const GemmPlan& plan, int64_t task, char* scratch) {
    if (!plan.dot) return panel_task<F32Engine<V, T>, T>(g, plan, task, scratch);
    switch (g.m) {
        case 1: return f32_dot_task<V, T, 1>(g, task);
        case 2: return f32_dot_task<V, T, 2>(g, task);
        case 3: return f32_dot_task<V, T, 3>(g, task);
        case 4: return f32_dot_task<V, T, 4>(g, task);
    }
}

template <class V>
GemmPlan f32_plan(const Gemm& g, int n_threads) {
    if (g.dx || g.m > kMostF32DotRows) return panel_plan<F32Engine<V, float>>(g, n_threads);
    GemmPlan plan = {};
    plan.tasks = ceil_div(g.n, kF32DotColumns);
    plan.dot = true;
    return plan;
}

template <class V>
void f32_task(const Gemm& g, const GemmPlan& plan, int64_t task, const char*, char* scratch) {
    switch (g.dtype) {
        case LORA_OPS_F32: return f32_task_of<V, float>(g, plan, task, scratch);
        case LORA_OPS_F16: return f32_task_of<V, F16>(g, plan, task, scratch);
        case LORA_OPS_BF16: return f32_task_of<V, BF16>(g, plan, task, scratch);
    }
}

}  // namespace
}  // namespace lora_ops
