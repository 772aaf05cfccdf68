#include "pages/checksum_rows.h"

namespace lora_ops {
const ChecksumRows kAvx2ChecksumRows = checksum_rows;
}  // namespace lora_ops
