#include "blockwise8/avx512.h"

#include "blockwise8/blockwise8.h"

namespace lora_ops {
const Blockwise8Kernels kAvx512Blockwise8 = {blockwise8_quantize<Avx512Blockwise8<Avx512LookUp>>,
                                             blockwise8_dequantize<Avx512Blockwise8<Avx512LookUp>>};
}  // namespace lora_ops
