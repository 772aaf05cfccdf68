// Calls every function of the C ABI with random shapes, offsets, strides, thread counts and instruction sets; built with
// the address and undefined-behaviour sanitizers by `make sanitize`. A case also checks what needs no reference: that a
// result does not depend on the number of threads.
//
//     fuzz [seconds = 60] [seed = 1]
//
// To cover a new function, write a case below and add it to `cases`.
#include "fuzz.h"
#include "pages.h"

#include <time.h>

#include <algorithm>

namespace fuzz {
namespace {

// 256 ascending values from -1 to 1.
std::vector<float> code_map() {
    std::vector<float> map;
    for (int i = 0; i < 256; ++i) map.push_back(static_cast<float>(2 * i - 255) / 255.0f);
    return map;
}

int64_t any_block_size(Random& random) { return 32 * random.one_of<int64_t>({1, 2, 3, 4, 32, 128}); }

void nf4_codec(Random& random) {
    const int dtype = any_dtype(random);
    const int64_t n = random.length(5000), block = any_block_size(random), blocks = ceil_div(n, block);
    Matrix w(random, dtype, 1, n);
    Bytes packed(random, (n + 1) / 2);
    Matrix absmax(random, LORA_OPS_F32, 1, blocks);
    const int threads = static_cast<int>(random.integer(1, 3));
    FUZZ_CHECK(lora_ops_nf4_quantize(w.data(), dtype, n, block, packed.data(), absmax.floats(), threads) ==
               LORA_OPS_OK);

    // Decode some range, with plain or nested scales.
    Bytes codes(random, blocks);
    Matrix nested(random, LORA_OPS_F32, 1, ceil_div(blocks, 256));
    const std::vector<float> map = code_map();
    lora_ops_nf4_weight weight = {packed.data(), absmax.floats(), nullptr, nullptr, nullptr, 0.0f, block};
    if (random.coin()) weight = {packed.data(), nullptr, codes.data(), map.data(), nested.floats(), 0.5f, block};
    const int64_t begin = random.integer(0, n), end = random.integer(begin, n);
    const int out_dtype = any_dtype(random);
    Matrix out(random, out_dtype, 1, end - begin);
    FUZZ_CHECK(lora_ops_nf4_dequantize(&weight, begin, end, out.data(), out_dtype, threads) == LORA_OPS_OK);
}

void nf4_transposed(Random& random) {
    const int dtype = any_dtype(random), out_dtype = any_dtype(random);
    // At times large enough to be streamed past the caches, where the lines allow it.
    const bool large = random.integer(0, 30) == 0;
    const int64_t n = large ? 32 * random.integer(30, 70) : random.length(400);
    const int64_t k = large ? random.integer(1000, 1200) : random.length(400);
    const int64_t block = any_block_size(random), blocks = ceil_div(n * k, block);
    Matrix w(random, dtype, k, n, true), absmax(random, LORA_OPS_F32, 1, blocks), absmax2 = absmax;
    Bytes packed(random, (n * k + 1) / 2), packed2 = packed;
    const int threads = static_cast<int>(random.integer(2, 3));
    FUZZ_CHECK(lora_ops_nf4_quantize_transposed(w.data(), dtype, n, k, block, packed.data(), absmax.floats(), 1) ==
               LORA_OPS_OK);
    FUZZ_CHECK(lora_ops_nf4_quantize_transposed(w.data(), dtype, n, k, block, packed2.data(), absmax2.floats(),
                                                threads) == LORA_OPS_OK);
    FUZZ_CHECK(packed == packed2 && absmax == absmax2);

    Bytes codes(random, blocks);
    Matrix nested(random, LORA_OPS_F32, 1, ceil_div(blocks, 256));
    const std::vector<float> map = code_map();
    lora_ops_nf4_weight weight = {packed.data(), absmax.floats(), nullptr, nullptr, nullptr, 0.0f, block};
    if (random.coin()) weight = {packed.data(), nullptr, codes.data(), map.data(), nested.floats(), 0.5f, block};
    Matrix out(random, out_dtype, k, n, true), out2 = out;
    FUZZ_CHECK(lora_ops_nf4_dequantize_transposed(&weight, n, k, out.data(), out_dtype, 1) == LORA_OPS_OK);
    FUZZ_CHECK(lora_ops_nf4_dequantize_transposed(&weight, n, k, out2.data(), out_dtype, threads) == LORA_OPS_OK);
    FUZZ_CHECK(out == out2);
}

void linear(Random& random) {
    const int dtype = any_dtype(random), w_dtype = any_dtype(random);
    const int64_t m = random.coin() ? random.integer(0, 9) : random.integer(0, 150);
    const int64_t n = random.length(400), k = random.length(400), block = any_block_size(random);
    Matrix w(random, w_dtype, 1, n * k), absmax(random, LORA_OPS_F32, 1, ceil_div(n * k, block));
    Bytes packed(random, (n * k + 1) / 2);
    FUZZ_CHECK(lora_ops_nf4_quantize(w.data(), w_dtype, n * k, block, packed.data(), absmax.floats(), 1) ==
               LORA_OPS_OK);
    const bool transposed = random.coin();
    Matrix dense(random, dtype, transposed ? k : n, transposed ? n : k);
    const lora_ops_weight weight = {random.coin() ? dense.data() : nullptr, dense.stride, transposed,
                                    {packed.data(), absmax.floats(), nullptr, nullptr, nullptr, 0.0f, block}};
    Matrix x(random, dtype, m, k), y(random, dtype, m, n), bias(random, dtype, 1, n);
    Matrix dx = x, y2 = y, dx2 = x, dy = y;
    void* const b = random.coin() ? bias.data() : nullptr;
    const auto run = [&](int threads, Matrix& y_, Matrix& dx_) {
        FUZZ_CHECK(lora_ops_linear(&weight, n, k, x.data(), m, x.stride, b, y_.data(), y_.stride, dtype, threads) ==
                   LORA_OPS_OK);
        FUZZ_CHECK(lora_ops_linear_dx(&weight, n, k, dy.data(), m, dy.stride, dx_.data(), dx_.stride, dtype,
                                      threads) == LORA_OPS_OK);
    };
    run(1, y, dx);
    run(static_cast<int>(random.integer(2, 3)), y2, dx2);
    FUZZ_CHECK(y == y2 && dx == dx2);
}

void blockwise8(Random& random) {
    const int64_t n = random.length(5000), block = random.length(600);
    const std::vector<float> map = random.coin() ? code_map() : dynamic_map(random.coin());
    Matrix x(random, LORA_OPS_F32, 1, n), out(random, LORA_OPS_F32, 1, n);
    Matrix absmax(random, LORA_OPS_F32, 1, ceil_div(n, block));
    Bytes codes(random, n);
    const int threads = static_cast<int>(random.integer(1, 3));
    FUZZ_CHECK(lora_ops_blockwise8_quantize(x.floats(), n, block, map.data(), codes.data(), absmax.floats(), threads) ==
               LORA_OPS_OK);
    FUZZ_CHECK(lora_ops_blockwise8_dequantize(codes.data(), absmax.floats(), n, block, map.data(), out.floats(),
                                              threads) == LORA_OPS_OK);
}

void dropout_mask(Random& random) {
    const int64_t rows = random.integer(0, 20), k = random.length(700);
    Bytes bits(random, rows * ceil_div(k, 8));
    const uint32_t threshold = static_cast<uint32_t>(random.integer(0, 65536));
    FUZZ_CHECK(lora_ops_dropout_mask(random.bits(), static_cast<uint32_t>(random.bits()), threshold,
                                     random.integer(0, 1 << 30), rows, k, bits.data()) == LORA_OPS_OK);
}

void lora(Random& random) {
    const int dtype = any_dtype(random), a_dtype = any_dtype(random), b_dtype = any_dtype(random);
    const bool large = random.integer(0, 20) == 0;  // several super-rows and groups of tiles
    const int64_t m = large ? random.integer(250, 600) : random.integer(0, 70);
    const int64_t n = large ? random.integer(1, 2600) : random.length(400);
    const int64_t k = random.length(large ? 600 : 400), r = random.length(large ? 20 : 130);
    Matrix a(random, a_dtype, r, k, true), b(random, b_dtype, n, r, true);
    const uint32_t threshold = random.coin() ? 0 : static_cast<uint32_t>(random.integer(0, 65536));
    const lora_ops_adapter adapter = {a.data(), b.data(), a_dtype, b_dtype, n, k, r, 2.0f, threshold, random.bits(), 0};
    Matrix x(random, dtype, m, k), dy(random, dtype, m, n), s(random, LORA_OPS_F32, m, r, true);
    Matrix y(random, dtype, m, n), dx(random, dtype, m, k);
    Matrix dlora_a(random, a_dtype, r, k, true), dlora_b(random, b_dtype, n, r, true), dbias(random, dtype, 1, n);
    const int wanted = static_cast<int>(random.integer(0, 15));

    // Without a weight, over NF4, or over a dense one.
    const bool transposed = random.coin();
    Matrix w(random, dtype, transposed ? k : n, transposed ? n : k);
    Matrix flat(random, dtype, 1, n * k), bias(random, dtype, 1, n);
    const int64_t block = any_block_size(random);
    Matrix absmax(random, LORA_OPS_F32, 1, ceil_div(n * k, block));
    Bytes packed(random, (n * k + 1) / 2);
    FUZZ_CHECK(lora_ops_nf4_quantize(flat.data(), dtype, n * k, block, packed.data(), absmax.floats(), 1) ==
               LORA_OPS_OK);
    const bool dense = random.coin();
    const lora_ops_weight over = {dense ? w.data() : nullptr, w.stride, transposed,
                                  {packed.data(), absmax.floats(), nullptr, nullptr, nullptr, 0.0f, block}};
    const lora_ops_weight* const weight = random.coin() ? &over : nullptr;
    void* const bias_ = random.coin() ? bias.data() : nullptr;

    const auto run = [&](int threads, Matrix& y_, Matrix& s_, Matrix& dx_, Matrix& dlora_a_, Matrix& dlora_b_,
                         Matrix& dbias_) {
        FUZZ_CHECK(lora_ops_lora_forward(&adapter, weight, bias_, x.data(), m, x.stride, s_.floats(), y_.data(),
                                         y_.stride, dtype, threads) == LORA_OPS_OK);
        FUZZ_CHECK(lora_ops_lora_backward(
                       &adapter, weight, dy.data(), m, dy.stride, wanted & 2 ? x.data() : nullptr, x.stride,
                       wanted & 4 ? s_.floats() : nullptr, wanted & 1 ? dx_.data() : nullptr, dx_.stride,
                       wanted & 2 ? dlora_a_.data() : nullptr, wanted & 4 ? dlora_b_.data() : nullptr,
                       wanted & 8 ? dbias_.data() : nullptr, dtype, threads) == LORA_OPS_OK);
    };
    Matrix y2 = y, s2 = s, dx2 = dx, dlora_a2 = dlora_a, dlora_b2 = dlora_b, dbias2 = dbias;
    run(1, y, s, dx, dlora_a, dlora_b, dbias);
    run(static_cast<int>(random.integer(2, 3)), y2, s2, dx2, dlora_a2, dlora_b2, dbias2);
    FUZZ_CHECK(y == y2 && s == s2 && dx == dx2 && dlora_a == dlora_a2 && dlora_b == dlora_b2 && dbias == dbias2);
}

void adamw(Random& random) {
    struct Operands {
        Matrix p, g, m, v, m_absmax, v_absmax;
        Bytes m_codes, v_codes;
        lora_ops_adamw_slice slice(int64_t n, int p_dtype, int g_dtype, bool coded) {
            void *m_ = coded ? static_cast<void*>(m_codes.data()) : m.data();
            void *v_ = coded ? static_cast<void*>(v_codes.data()) : v.data();
            float *ma = coded ? m_absmax.floats() : nullptr, *va = coded ? v_absmax.floats() : nullptr;
            return {p.data(), g.data(), m_, v_, ma, va, n, p_dtype, g_dtype, 0, 1, 2, 256};
        }
    };
    std::vector<Operands> once;
    std::vector<lora_ops_adamw_slice> first, second;
    const int64_t count = random.integer(1, 4);
    struct Shape { int64_t n; int p, g; bool coded; };
    std::vector<Shape> shapes;
    for (int64_t i = 0; i < count; ++i) {
        const Shape s = {random.length(random.coin() ? 900 : 70000), any_dtype(random), any_dtype(random), random.coin()};
        const int64_t blocks = ceil_div(s.n, 256);
        shapes.push_back(s);
        once.push_back({Matrix(random, s.p, 1, s.n), Matrix(random, s.g, 1, s.n), Matrix(random, LORA_OPS_F32, 1, s.n),
                        Matrix(random, LORA_OPS_F32, 1, s.n), Matrix(random, LORA_OPS_F32, 1, blocks),
                        Matrix(random, LORA_OPS_F32, 1, blocks), Bytes(random, s.n), Bytes(random, s.n)});
    }
    std::vector<Operands> twice = once;
    for (int64_t i = 0; i < count; ++i) {
        first.push_back(once[i].slice(shapes[i].n, shapes[i].p, shapes[i].g, shapes[i].coded));
        second.push_back(twice[i].slice(shapes[i].n, shapes[i].p, shapes[i].g, shapes[i].coded));
    }
    const float constants[8] = {0.999f, 0.1f, 0.999f, 0.001f, 1e-8f, 1e-3f, 30.0f, 1.0f};
    const std::vector<float> signed_map = dynamic_map(true), unsigned_map = dynamic_map(false);
    const uint64_t seed = random.bits();
    const uint64_t* const rounding = random.coin() ? &seed : nullptr;
    const auto run = [&](std::vector<lora_ops_adamw_slice>& slices, int threads) {
        FUZZ_CHECK(lora_ops_adamw(slices.data(), count, constants, 1, signed_map.data(), unsigned_map.data(), rounding,
                                  threads) == LORA_OPS_OK);
    };
    run(first, 1);
    run(second, static_cast<int>(random.integer(2, 3)));
    for (int64_t i = 0; i < count; ++i) {
        const Operands &a = once[i], &b = twice[i];
        FUZZ_CHECK(a.p == b.p && a.m == b.m && a.v == b.v && a.m_absmax == b.m_absmax && a.v_absmax == b.v_absmax);
        FUZZ_CHECK(a.m_codes == b.m_codes && a.v_codes == b.v_codes);
    }
}

struct Case {
    const char* name;
    void (*run)(Random& random);
    int64_t calls;
};

Case cases[] = {{"nf4 codec", nf4_codec, 0},
                {"nf4 transposed", nf4_transposed, 0},
                {"linear", linear, 0},
                {"blockwise8", blockwise8, 0},
                {"dropout mask", dropout_mask, 0},
                {"lora", lora, 0},
                {"adamw", adamw, 0},
                {"adamw pages", adamw_pages, 0}};

double seconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

}  // namespace
}  // namespace fuzz

int main(int argc, char** argv) {
    using namespace fuzz;
    const double budget = argc > 1 ? atof(argv[1]) : 60.0;
    Random random(argc > 2 ? strtoull(argv[2], nullptr, 10) : 1);
    std::vector<int> isas;
    for (int isa = LORA_OPS_ISA_PORTABLE; isa <= LORA_OPS_ISA_NEON_BF16; ++isa) {
        if (lora_ops_supports_isa(isa)) isas.push_back(isa);
    }
    for (const double end = seconds() + budget; seconds() < end;) {
        for (const int isa : isas) {
            FUZZ_CHECK(lora_ops_force_isa(isa) == LORA_OPS_OK);
            for (Case& c : cases) {
                c.run(random);
                ++c.calls;
            }
        }
    }
    printf("clean on %zu instruction sets:", isas.size());
    for (const Case& c : cases) printf(" %s %lld", c.name, static_cast<long long>(c.calls));
    printf("\n");
}
