#include "blockwise8/portable.h"

#include "blockwise8/blockwise8.h"

namespace lora_ops {
const Blockwise8Kernels kPortableBlockwise8 = {blockwise8_quantize<PortableBlockwise8>,
                                               blockwise8_dequantize<PortableBlockwise8>};
}  // namespace lora_ops
