// AVX-512 F, BW, DQ, VL.
#include "lora/avx512.h"

namespace lora_ops {

const LoraKernels kAvx512Lora = Entry<Avx512Float, Avx512Float>::kernels();

}  // namespace lora_ops
