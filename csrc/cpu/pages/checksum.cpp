// The checksum of lora_ops/paging/checksum.py, and its C ABI.
#include "pages/checksum.h"

#include <string.h>

#include "isa/isa.h"

namespace lora_ops {

Checksum::Checksum() {
    for (int i = 0; i < kChecksumLanes; ++i) lanes_[i] = (i + uint64_t{1}) * kChecksumFactor;
}

void Checksum::add(const void* bytes, int64_t n) {
    const char* const data = static_cast<const char*>(bytes);
    const ChecksumRows add_rows =
        for_current_isa<kPortableChecksumRows, kAvx2ChecksumRows, kAvx512ChecksumRows, kAvx512ChecksumRows,
                        kPortableChecksumRows, kPortableChecksumRows>();
    const int64_t whole = n / kChecksumRow * kChecksumRow;
    add_rows(lanes_, data, whole / kChecksumRow);
    if (whole < n) {
        char last[kChecksumRow] = {};
        memcpy(last, data + whole, static_cast<size_t>(n - whole));
        add_rows(lanes_, last, 1);
    }
    total_ += static_cast<uint64_t>(n);
}

uint64_t Checksum::value() const {
    uint64_t total = total_;
    for (const uint64_t lane : lanes_) total = checksum_mix(total, lane);
    return total ^ total >> 32;
}

}  // namespace lora_ops

int lora_ops_checksum(const void* bytes, int64_t n, uint64_t* checksum) {
    if (n < 0 || !checksum || (n && !bytes)) return LORA_OPS_BAD_ARGUMENT;
    lora_ops::Checksum sum;
    sum.add(bytes, n);
    *checksum = sum.value();
    return LORA_OPS_OK;
}
