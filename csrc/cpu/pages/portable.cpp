#include "pages/checksum_rows.h"

namespace lora_ops {
const ChecksumRows kPortableChecksumRows = checksum_rows;
}  // namespace lora_ops
