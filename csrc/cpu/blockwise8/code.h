// A map of 8-bit codes, with what finds the code of a value.
#pragma once

#include <stdint.h>

#include <memory>

namespace lora_ops {

// 256 ascending values, and what finds the nearest of them to a v, |v| <= 1: the number of thresholds below v.
//
// Any map: v falls in a bin by its sign, exponent and 7 bits of mantissa (everything below 2^-23 in one); start[bin]
// counts the thresholds below the whole bin, and the search goes on from there. Both dynamic maps have at most one
// threshold a bin, so one comparison settles it.
//
// Any map whose bins hold one threshold at most, and the lowest of both signs none: of a bin, signed by v, an entry holds the
// code of its lowest |v| and the |v| beyond which that rises by one, or falls by one if v < 0: one look-up and one comparison.
//
// The dynamic maps: each decade is a straight line, and no binade meets more than two of them. So in the bin of 8 bits of
// mantissa that holds |v|, the number of thresholds below |v| is the integer part of one of two lines, or one more, which
// one comparison settles. Lines are by exponent, 16-bit fixed point. Values are compared as the integers 2 |v| + (v < 0),
// in which a byte is the exponent, and whose lowest bit tells apart what the same midpoint decides of v and of -v.
struct Blockwise8Code {
    static constexpr int kFirstKey = (127 - 23) << 7;
    static constexpr int kBins = (127 << 7) - kFirstKey + 1;
    static constexpr int kFirstExponent = 127 - 31;  // biased; the lowest of 32, in whose first bin smaller values fall

    alignas(64) float map[256];
    alignas(64) float threshold[256];         // largest fp32 <= midpoint of values i and i + 1; the last is +inf
    alignas(64) uint8_t map_bytes[4][256];    // byte i of each value: a permute of bytes looks up 64 codes at once
    // Of the positive values, what 2 |v| + (v < 0) has to exceed. That of code 127, if the map is signed, is the last: the
    // other 128 are then found by 7 bits of a code.
    alignas(64) uint32_t doubled[256];
    alignas(64) uint8_t doubled_bytes[4][256];
    alignas(64) uint16_t bend[32];     // fraction << 8 | exponent of the last bin of a binade that the first line serves
    alignas(64) uint16_t rise[2][32];  // second and first line's, over a binade, in 1 / 256; by the exponent's low 5 bits
    alignas(64) uint16_t base[2][32];  // their codes where the binade begins
    alignas(64) int32_t settled[2 * kBins - 1];  // bin -b of a negative v at kBins - 1 - b: bits 0-23 of |v|, then the code
    bool settles;                                // whether they were found to serve this map
    // linear: the lines were found to serve this map in every bin, and if it is signed, it is that of positive values
    // mirrored, with 0 as code 127 and one value more at the end.
    bool is_signed, linear;
    int most_steps;            // comparisons that settle any v
    uint8_t start[2 * kBins];  // bins of positive v, then of negative v
    uint8_t padding[3];        // a vector gather reads 4 bytes at each start
};

// The code of a map of 256 ascending values.
std::shared_ptr<const Blockwise8Code> code_of(const float* map);

}  // namespace lora_ops
