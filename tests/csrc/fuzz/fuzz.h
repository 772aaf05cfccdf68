// What the fuzz cases share: random draws, and buffers that end exactly where an operand ends.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <initializer_list>
#include <random>
#include <vector>

#include "lora_ops.h"

#define FUZZ_CHECK(condition)                                                       \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
            abort();                                                                \
        }                                                                           \
    } while (0)

namespace fuzz {

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    uint64_t bits() { return engine_(); }
    // Uniform in [low, high].
    int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
    bool coin() { return engine_() & 1; }
    float normal() { return normal_(engine_); }
    template <class T>
    T one_of(std::initializer_list<T> choices) {
        return choices.begin()[integer(0, static_cast<int64_t>(choices.size()) - 1)];
    }
    // Mostly small, sometimes large enough for several tiles; often beside a multiple of a vector or a tile.
    int64_t length(int64_t most) {
        const int64_t near = one_of<int64_t>({1, 8, 16, 32, 64, 256}) * integer(0, 4) + integer(-1, 1);
        return std::min(most, std::max<int64_t>(1, coin() ? near : integer(1, most)));
    }

  private:
    std::mt19937_64 engine_;
    std::normal_distribution<float> normal_;
};

inline int64_t size_of(int dtype) { return dtype == LORA_OPS_F32 ? 4 : 2; }

// `rows` rows of `columns` elements, `stride` apart, that start a few elements after an allocation's aligned begin and
// end with it: the address sanitizer sees every byte too far, and nothing is better aligned than its element.
class Matrix {
  public:
    Matrix(Random& random, int dtype, int64_t rows, int64_t columns, bool contiguous = false)
        : stride(columns + (contiguous ? 0 : random.integer(0, 5))),
          element_(size_of(dtype)),
          offset_(element_ * random.integer(0, 9)),
          memory_(static_cast<size_t>(offset_ + element_ * (rows ? (rows - 1) * stride + columns : 0))) {
        for (int64_t i = 0; offset_ + (i + 1) * element_ <= static_cast<int64_t>(memory_.size()); ++i) {
            const float v = random.normal();
            uint32_t bits;
            memcpy(&bits, &v, sizeof bits);
            // Any finite number of 16 bits will do: the upper half of a float, its exponent cut for fp16.
            const uint16_t half = static_cast<uint16_t>(dtype == LORA_OPS_F16 ? (bits >> 16 & 0xbbff) : bits >> 16);
            char* const to = memory_.data() + offset_ + i * element_;
            if (dtype == LORA_OPS_F32) memcpy(to, &v, sizeof v);
            if (dtype != LORA_OPS_F32) memcpy(to, &half, sizeof half);
        }
        memory_.shrink_to_fit();
    }
    void* data() { return memory_.data() + offset_; }
    float* floats() { return static_cast<float*>(data()); }
    uint8_t* bytes() { return static_cast<uint8_t*>(data()); }
    bool operator==(const Matrix& other) const { return memory_ == other.memory_; }

    const int64_t stride;

  private:
    int64_t element_, offset_;
    std::vector<char> memory_;
};

// Bytes, not floats.
class Bytes {
  public:
    Bytes(Random& random, int64_t n) : offset_(random.integer(0, 9)), memory_(static_cast<size_t>(offset_ + n)) {
        for (char& c : memory_) c = static_cast<char>(random.bits());
    }
    uint8_t* data() { return reinterpret_cast<uint8_t*>(memory_.data()) + offset_; }
    bool operator==(const Bytes& other) const { return memory_ == other.memory_; }

  private:
    int64_t offset_;
    std::vector<char> memory_;
};

inline int any_dtype(Random& random) { return random.one_of<int>({LORA_OPS_F32, LORA_OPS_F16, LORA_OPS_BF16}); }

// The dynamic map of quant/blockwise8/reference.py, but for the last bits of its values.
inline std::vector<float> dynamic_map(bool is_signed) {
    std::vector<float> map = {0.0f, 1.0f};
    double decade = 1e-6;
    for (int d = 0; d < 7; ++d, decade *= 10) {
        const int values = is_signed ? 1 << d : 2 << d;
        for (int i = 0; i < values; ++i) {
            map.push_back(static_cast<float>(decade * (0.1 + 0.9 * (i + 0.5) / values)));
            if (is_signed) map.push_back(-map.back());
        }
    }
    std::sort(map.begin(), map.end());
    return map;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace fuzz
