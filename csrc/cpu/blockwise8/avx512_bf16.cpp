#include "blockwise8/avx512_bf16.h"

#include "blockwise8/blockwise8.h"

namespace lora_ops {
const Blockwise8Kernels kAvx512Bf16Blockwise8 = {blockwise8_quantize<Avx512Blockwise8<VbmiLookUp>>,
                                                 blockwise8_dequantize<Avx512Blockwise8<VbmiLookUp>>};
}  // namespace lora_ops
