#include "pages/checksum_rows.h"

namespace lora_ops {
const ChecksumRows kAvx512ChecksumRows = checksum_rows;
}  // namespace lora_ops
