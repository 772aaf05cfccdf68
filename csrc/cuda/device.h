// What kernels use of the GPU, a line or two each: loads, shuffles, byte permutes, matrix instructions, conversions.
//
// The tests compile the kernels with the host's compiler against tests/gpu_proof/emulator.h, which defines the same
// names: a kernel that keeps to them runs there thread by thread, with every address checked.
#pragma once

#include <stdint.h>

#if !defined(__CUDACC__)
#include "emulator.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lora_ops {

struct F16 {
    uint16_t bits;
};
struct BF16 {
    uint16_t bits;
};

__device__ __forceinline__ float to_float(F16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ float to_float(BF16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }

// To nearest even.
template <class T>
__device__ __forceinline__ T round_to(float x);
template <>
__device__ __forceinline__ F16 round_to<F16>(float x) {
    return F16{__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ BF16 round_to<BF16>(float x) {
    return BF16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }  // not to be fused
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }

// Global memory that no kernel writes.
template <class T>
__device__ __forceinline__ T load(const T* p) {
    return __ldg(p);
}
__device__ __forceinline__ F16 load(const F16* p) { return F16{__ldg(&p->bits)}; }
__device__ __forceinline__ BF16 load(const BF16* p) { return BF16{__ldg(&p->bits)}; }
__device__ __forceinline__ uint4 load16(const void* p) { return __ldg(static_cast<const uint4*>(p)); }
// Read once: does not push what is read again out of L1.
__device__ __forceinline__ uint4 stream16(const void* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}
template <class T>
__device__ __forceinline__ void store(T* p, T value) {
    *p = value;
}

// The block's shared memory, by byte offset.
struct Shared {
    __device__ __forceinline__ static char* base() {
        extern __shared__ __align__(16) char memory[];
        return memory;
    }
    template <class T>
    __device__ __forceinline__ static T get(uint32_t offset) {
        return *reinterpret_cast<const T*>(base() + offset);
    }
    template <class T>
    __device__ __forceinline__ static void put(uint32_t offset, T value) {
        *reinterpret_cast<T*>(base() + offset) = value;
    }
};

__device__ __forceinline__ int thread_index() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int64_t block_x() { return blockIdx.x; }
__device__ __forceinline__ int64_t block_y() { return blockIdx.y; }
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// By whole warps.
template <class T>
__device__ __forceinline__ T shuffle(T value, int lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// A value that all lanes of the warp have: lets the compiler keep what follows from it in uniform registers.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Byte i of the result is byte (nibble i of the selector) of b:a.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

// c [16, 8] += a [16, 16] b [16, 8], spread over the warp as PTX says for mma.m16n8k16.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<BF16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Launches kernel on the stream; 0 or a cudaError_t.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), dim3 grid, int threads, int shared, void* stream, Arguments... arguments) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) return error;
    kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
    return cudaGetLastError();
}

}  // namespace lora_ops

#endif
