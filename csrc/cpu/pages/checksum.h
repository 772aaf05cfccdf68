// A checksum of bytes that come in pieces; lora_ops/paging/checksum.py defines it.
#pragma once

#include <stdint.h>

namespace lora_ops {

constexpr int kChecksumLanes = 512;
constexpr int64_t kChecksumRow = 8 * kChecksumLanes;
constexpr uint64_t kChecksumFactor = 0x9E3779B97F4A7C15u;

inline uint64_t checksum_mix(uint64_t sum, uint64_t word) {
    sum += word;
    return (sum << 29 | sum >> 35) * kChecksumFactor;
}

// Adds rows of kChecksumRow bytes to the lanes, with each instruction set.
using ChecksumRows = void (*)(uint64_t* lanes, const char* data, int64_t rows);
extern const ChecksumRows kPortableChecksumRows, kAvx2ChecksumRows, kAvx512ChecksumRows;

class Checksum {
  public:
    Checksum();
    // Every piece but the last is of whole rows.
    void add(const void* bytes, int64_t n);
    uint64_t value() const;

  private:
    alignas(64) uint64_t lanes_[kChecksumLanes];
    uint64_t total_ = 0;
};

}  // namespace lora_ops
