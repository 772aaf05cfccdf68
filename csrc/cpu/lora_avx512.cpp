// AVX-512 F, BW, DQ, VL.
#include "lora_avx512.inl"

namespace lora_ops {

const LoraKernels kAvx512Lora = {LoraEntry<Avx512Float, Avx512Float>::forward,
                                 LoraEntry<Avx512Float, Avx512Float>::backward, dropout_mask_rows<Avx512Mask>};

}  // namespace lora_ops
