// 8-bit blockwise codes (arXiv 2110.02861), written once for every instruction set.
//
// Vec supplies the parts that differ, on n elements, n a multiple of 32:
//   uint32_t max_abs_bits<float>(const float* x, int64_t n)
//   void encode8(const float* x, int64_t n, float scale, const Blockwise8Search&, uint8_t* codes)
//   void decode8(const uint8_t* codes, int64_t n, float absmax, const float* map, float* out)

namespace lora_ops {
namespace {

inline uint8_t blockwise8_encode(float v, const Blockwise8Search& search) {
    const float clamped = v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v;
    // A NaN (the caller reports it) would index past the bins.
    const int key = clamped == clamped ? static_cast<int>(abs_bits(clamped) >> 16) : 0;
    const int bin = key > search.kFirstKey ? key - search.kFirstKey : 0;
    int code = search.start[float_bits(clamped) >> 31 ? search.kBins + bin : bin];
    while (clamped > search.threshold[code]) ++code;
    return static_cast<uint8_t>(code);
}

template <class Vec>
bool blockwise8_quantize(const float* x, int64_t n, int64_t block_size, const Blockwise8Search& search,
                         uint8_t* codes, float* absmax) {
    uint32_t largest = 0;
    for (; n >= block_size; n -= block_size) {
        const int64_t vector_end = block_size / 32 * 32;
        uint32_t bits = Vec::template max_abs_bits<float>(x, vector_end);
        for (int64_t i = vector_end; i < block_size; ++i) bits = bits < abs_bits(x[i]) ? abs_bits(x[i]) : bits;
        largest = largest < bits ? bits : largest;
        *absmax = bits_float(bits);
        const float scale = 1.0f / at_least(*absmax, kLeastAbsmax);
        Vec::encode8(x, vector_end, scale, search, codes);
        for (int64_t i = vector_end; i < block_size; ++i) codes[i] = blockwise8_encode(x[i] * scale, search);
        x += block_size;
        codes += block_size;
        ++absmax;
    }
    if (n > 0) {  // as in NF4, the partial block divides by the clamped absmax, and stores it
        uint32_t bits = 0;
        for (int64_t i = 0; i < n; ++i) bits = bits < abs_bits(x[i]) ? abs_bits(x[i]) : bits;
        largest = largest < bits ? bits : largest;
        *absmax = at_least(bits_float(bits), kLeastAbsmax);
        for (int64_t i = 0; i < n; ++i) codes[i] = blockwise8_encode(x[i] / *absmax, search);
    }
    return largest < kInfBits<float>;
}

template <class Vec>
void blockwise8_dequantize(const uint8_t* codes, const float* absmax, int64_t n, int64_t block_size, const float* map,
                           float* out) {
    for (int64_t begin = 0; begin < n; begin += block_size, ++absmax) {
        const int64_t size = n - begin < block_size ? n - begin : block_size;
        const int64_t vector_end = size / 32 * 32;
        Vec::decode8(codes + begin, vector_end, *absmax, map, out + begin);
        for (int64_t i = begin + vector_end; i < begin + size; ++i) out[i] = map[codes[i]] * *absmax;
    }
}

}  // namespace
}  // namespace lora_ops
