#include "blockwise8/avx2.h"

#include "blockwise8/blockwise8.h"

namespace lora_ops {
const Blockwise8Kernels kAvx2Blockwise8 = {blockwise8_quantize<Avx2Blockwise8>, blockwise8_dequantize<Avx2Blockwise8>};
}  // namespace lora_ops
