// The NF4 codec with AVX2, FMA and F16C.
#include "nf4/avx2.h"
#include "nf4/entry.h"
#include "nf4/groups_avx2.h"

namespace lora_ops {
namespace {

struct Avx2Parts {
    using V = __m256i;
    static constexpr int kParts = 2;
    static constexpr bool kStreams = true;
    static V load(const char* p, int64_t stride) {
        const auto part = [](const char* q) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(q)); };
        return _mm256_inserti128_si256(_mm256_castsi128_si256(part(p)), part(p + stride), 1);
    }
    static void store(char* p, V v) { _mm256_storeu_si256(reinterpret_cast<V*>(p), v); }
    static void stream(char* p, V v) { _mm256_stream_si256(reinterpret_cast<V*>(p), v); }
    static void finish() { _mm_sfence(); }
    template <class T>
    static V low(V a, V b) { return sizeof(T) == 2 ? _mm256_unpacklo_epi16(a, b) : _mm256_unpacklo_epi32(a, b); }
    template <class T>
    static V high(V a, V b) { return sizeof(T) == 2 ? _mm256_unpackhi_epi16(a, b) : _mm256_unpackhi_epi32(a, b); }
};

constexpr NF4Kernels kernels() {
    NF4Kernels kernels = nf4_kernels<Avx2NF4, Avx2Parts>();
    kernels.dequantize = [](const lora_ops_nf4_weight& w, int64_t begin, int64_t end, void* out, lora_ops_dtype dtype) {
        with_dtype(dtype, [&](auto type) {
            using T = decltype(type);
            nf4_dequantize_groups(w, begin, end, static_cast<T*>(out), [&](int64_t from, int64_t to, T* target) {
                nf4_dequantize<Avx2NF4>(w, from / w.block_size, from, to, target);
            });
        });
    };
    return kernels;
}

}  // namespace

const NF4Kernels kAvx2NF4 = kernels();

}  // namespace lora_ops
