// The NF4 codec with AVX-512 F, BW, DQ, VL.
#include "nf4/avx512.h"
#include "nf4/entry.h"

namespace lora_ops {
namespace {

struct Avx512Parts {
    using V = __m512i;
    static constexpr int kParts = 4;
    static constexpr bool kStreams = true;
    static __m256i load2(const char* p, int64_t stride) {
        const auto part = [](const char* q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)); };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(part(p)), part(p + stride), 1);
    }
    // Three broadcasts under masks would need no shuffle, but on Zen 4 they take longer: it loads 512 bits every 2 cycles.
    static V load(const char* p, int64_t stride) {
        return _mm512_inserti64x4(_mm512_castsi256_si512(load2(p, stride)), load2(p + 2 * stride, stride), 1);
    }
    static void store(char* p, V v) { _mm512_storeu_si512(p, v); }
    static void stream(char* p, V v) { _mm512_stream_si512(reinterpret_cast<V*>(p), v); }
    static void finish() { _mm_sfence(); }
    template <class T>
    static V low(V a, V b) { return sizeof(T) == 2 ? _mm512_unpacklo_epi16(a, b) : _mm512_unpacklo_epi32(a, b); }
    template <class T>
    static V high(V a, V b) { return sizeof(T) == 2 ? _mm512_unpackhi_epi16(a, b) : _mm512_unpackhi_epi32(a, b); }
};

}  // namespace

const NF4Kernels kAvx512NF4 = nf4_kernels<Avx512NF4, Avx512Parts>();

}  // namespace lora_ops
