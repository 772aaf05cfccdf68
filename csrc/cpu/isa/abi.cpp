// The ABI's version, and which instruction set is in use: the best that the machine has, or one that was forced.
#include <atomic>

#include "isa/isa.h"

#if defined(LORA_OPS_X86)
#include <cpuid.h>
#elif defined(LORA_OPS_ARM64) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(LORA_OPS_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace lora_ops {
namespace {

std::atomic<int> forced_isa{LORA_OPS_ISA_AUTO};

#if defined(LORA_OPS_ARM64)
bool arm_has_bf16() {
#if defined(__linux__)
    constexpr unsigned long kHwcap2Bf16 = 1ul << 14;  // older headers do not name it
    return getauxval(AT_HWCAP2) & kHwcap2Bf16;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has;
#else
    return false;
#endif
}
#endif

bool machine_has(int isa) {
    if (isa == LORA_OPS_ISA_PORTABLE) return true;
#if defined(LORA_OPS_X86)
    unsigned eax, ebx, ecx, edx;
    const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    // __builtin_cpu_supports also asks whether the operating system saves the wide registers.
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == LORA_OPS_ISA_AVX2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (isa == LORA_OPS_ISA_AVX512) return avx512;
    if (isa == LORA_OPS_ISA_AVX512_BF16) {
        return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
    }
#elif defined(LORA_OPS_ARM64)
    if (isa == LORA_OPS_ISA_NEON) return true;
    if (isa == LORA_OPS_ISA_NEON_BF16) return arm_has_bf16();
#endif
    return false;
}

int best_isa() {
    static const int best = machine_has(LORA_OPS_ISA_AVX512_BF16) ? LORA_OPS_ISA_AVX512_BF16
                            : machine_has(LORA_OPS_ISA_AVX512)    ? LORA_OPS_ISA_AVX512
                            : machine_has(LORA_OPS_ISA_AVX2)      ? LORA_OPS_ISA_AVX2
                            : machine_has(LORA_OPS_ISA_NEON_BF16) ? LORA_OPS_ISA_NEON_BF16
                            : machine_has(LORA_OPS_ISA_NEON)      ? LORA_OPS_ISA_NEON
                                                                  : LORA_OPS_ISA_PORTABLE;
    return best;
}

}  // namespace

int current_isa() {
    const int forced = forced_isa.load(std::memory_order_relaxed);
    return forced == LORA_OPS_ISA_AUTO ? best_isa() : forced;
}

}  // namespace lora_ops

using namespace lora_ops;

int lora_ops_abi_version(void) { return LORA_OPS_ABI_VERSION; }

int lora_ops_get_isa(void) { return current_isa(); }

int lora_ops_supports_isa(int isa) { return machine_has(isa); }

int lora_ops_force_isa(int isa) {
    if (isa != LORA_OPS_ISA_AUTO && !machine_has(isa)) return LORA_OPS_UNSUPPORTED_ISA;
    forced_isa.store(isa, std::memory_order_relaxed);
    return LORA_OPS_OK;
}
