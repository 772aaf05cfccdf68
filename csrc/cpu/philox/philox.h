// Dropout masks by Philox 4x32-10 (Salmon et al. 2011), bit for bit those of kernels/philox/reference.py: key = seed,
// counter = (column / 8, row, offset, 0); the four words are eight 16-bit lanes, low half first, and an element is kept
// if its lane is at least the threshold.
//
// A mask is drawn for kMaskColumns columns of a row at a time, because most of the first three rounds depends on the
// column or on the row alone: c1 = row and c2, c3 are constant, so the column's share is computed once for many rows.
#pragma once

#include <stdint.h>
#include <string.h>

namespace lora_ops {
namespace {

constexpr int kMaskColumns = 256;
constexpr int kMaskBytes = kMaskColumns / 8;
constexpr int kMaskCounters = kMaskColumns / 8;

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct MaskKey {
    uint32_t key0, key1, offset, threshold;  // threshold <= 65536
    MaskKey(uint64_t seed, uint32_t offset_, uint32_t threshold_)
        : key0(static_cast<uint32_t>(seed)),
          key1(static_cast<uint32_t>(seed >> 32)),
          offset(offset_),
          threshold(threshold_) {}
    // Keys of round 1, 2, ... 10.
    uint32_t round_key0(int round) const { return key0 + static_cast<uint32_t>(round - 1) * kPhiloxW0; }
    uint32_t round_key1(int round) const { return key1 + static_cast<uint32_t>(round - 1) * kPhiloxW1; }
    bool drops_all() const { return threshold > 0xffff; }
};

// After round 2 the counter is (column, column, column ^ high, low): `high` and `low` are the row's share.
struct RowShare {
    uint32_t high, low;
    RowShare(const MaskKey& key, uint32_t row) {
        const uint64_t p1 = uint64_t{kPhiloxM1} * key.offset;
        const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ row ^ key.round_key0(1);
        const uint64_t p0 = uint64_t{kPhiloxM0} * c0;
        high = static_cast<uint32_t>(p0 >> 32);
        low = static_cast<uint32_t>(p0);
    }
};

// The column's share: what round 3 needs besides the row's.
struct ColumnShare {
    uint32_t c2;        // of round 2's output, without the row's high
    uint32_t c1_key;    // c1 of round 2's output ^ key 0 of round 3
    uint32_t high_key;  // high word of M0 * c0 ^ key 1 of round 3
    uint32_t low;       // low word of M0 * c0
    ColumnShare(const MaskKey& key, uint32_t counter) {
        const uint32_t c1_const = kPhiloxM1 * key.offset;
        const uint64_t p0 = uint64_t{kPhiloxM0} * counter;
        const uint32_t c2_first = static_cast<uint32_t>(p0 >> 32) ^ key.round_key1(1);
        c2 = static_cast<uint32_t>(p0) ^ key.round_key1(2);
        const uint64_t p1 = uint64_t{kPhiloxM1} * c2_first;
        const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ c1_const ^ key.round_key0(2);
        c1_key = static_cast<uint32_t>(p1) ^ key.round_key0(3);
        const uint64_t p0_third = uint64_t{kPhiloxM0} * c0;
        high_key = static_cast<uint32_t>(p0_third >> 32) ^ key.round_key1(3);
        low = static_cast<uint32_t>(p0_third);
    }
};

// Masks of kMaskColumns columns from a multiple of 8 on; bit i of byte j belongs to element 8 j + i.
class PortableMask {
  public:
    explicit PortableMask(const MaskKey& key) : key_(key) {}

    void start(int64_t first_column) {
        for (int i = 0; i < kMaskCounters; ++i) {
            const ColumnShare share(key_, static_cast<uint32_t>(first_column / 8 + i));
            memcpy(columns_[i], &share, sizeof share);
        }
    }

    void row(int64_t m, uint8_t* bits) const {
        const RowShare share(key_, static_cast<uint32_t>(m));
        for (int i = 0; i < kMaskCounters; ++i) {
            const uint32_t* column = columns_[i];
            const uint64_t third = uint64_t{kPhiloxM1} * (column[0] ^ share.high);
            uint32_t c0 = static_cast<uint32_t>(third >> 32) ^ column[1], c1 = static_cast<uint32_t>(third);
            uint32_t c2 = column[2] ^ share.low, c3 = column[3];
            for (int round = 4; round <= 10; ++round) {
                const uint64_t p0 = uint64_t{kPhiloxM0} * c0, p1 = uint64_t{kPhiloxM1} * c2;
                c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key_.round_key0(round);
                c1 = static_cast<uint32_t>(p1);
                c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key_.round_key1(round);
                c3 = static_cast<uint32_t>(p0);
            }
            const uint32_t words[] = {c0, c1, c2, c3};
            int kept = 0;
            for (int lane = 0; lane < 8; ++lane) {
                kept |= ((words[lane / 2] >> (16 * (lane % 2)) & 0xffffu) >= key_.threshold) << lane;
            }
            bits[i] = static_cast<uint8_t>(kept);
        }
    }

  private:
    MaskKey key_;
    uint32_t columns_[kMaskCounters][4];
};

// The whole mask of some rows: bits [rows, ceil(k / 8)].
template <class Mask>
void dropout_mask_rows(uint64_t seed, uint32_t offset, uint32_t threshold, int64_t first_row, int64_t rows, int64_t k,
                       uint8_t* bits) {
    const int64_t row_bytes = (k + 7) / 8;
    Mask mask(MaskKey(seed, offset, threshold));
    for (int64_t byte = 0; byte < row_bytes; byte += kMaskBytes) {
        mask.start(8 * byte);
        const int64_t n = row_bytes - byte < kMaskBytes ? row_bytes - byte : kMaskBytes;
        for (int64_t m = 0; m < rows; ++m) {
            uint8_t whole[kMaskBytes];
            mask.row(first_row + m, whole);
            memcpy(bits + m * row_bytes + byte, whole, static_cast<size_t>(n));
        }
    }
}

}  // namespace
}  // namespace lora_ops
