// How codes are searched: the tables that a map needs, made once for every map in use.
#include "blockwise8/code.h"

#include <math.h>
#include <string.h>

#include <algorithm>
#include <mutex>

#include "common/scalar.h"

namespace lora_ops {
namespace {

void make_search(Blockwise8Code& code) {
    for (int i = 0; i < 255; ++i) {
        // Exact: neighbours of a map are close enough in magnitude for their sum to fit a double.
        const double midpoint = (double{code.map[i]} + double{code.map[i + 1]}) / 2;
        const float nearest = static_cast<float>(midpoint);
        code.threshold[i] = double{nearest} > midpoint ? nextafterf(nearest, -INFINITY) : nearest;
    }
    code.threshold[255] = INFINITY;

    // One sweep over the bins from -1 to 1; below counts the thresholds under a rising v.
    int below = 0;
    const auto fill = [&](uint8_t& start, float least, float most) {
        while (code.threshold[below] < least) ++below;
        start = static_cast<uint8_t>(below);
        while (code.threshold[below] < most) ++below;
        code.most_steps = std::max(code.most_steps, below - start);
    };
    const auto least = [](int bin) { return bits_float(bin ? uint32_t(Blockwise8Code::kFirstKey + bin) << 16 : 0); };
    const auto most = [](int bin) { return bits_float((uint32_t(Blockwise8Code::kFirstKey + bin + 1) << 16) - 1); };
    for (int bin = code.kBins - 1; bin >= 0; --bin) fill(code.start[code.kBins + bin], -most(bin), -least(bin));
    for (int bin = 0; bin < code.kBins; ++bin) fill(code.start[bin], least(bin), most(bin));
}

// A bin shares the upper half of its bits; of the lower 24 an entry holds those that a |v| has to exceed.
void make_settled(Blockwise8Code& code) {
    constexpr int kFirst = Blockwise8Code::kFirstKey, kBins = Blockwise8Code::kBins;
    const auto entry = [](uint32_t low24, int found) { return static_cast<int32_t>(low24 << 8 | static_cast<uint32_t>(found)); };
    int32_t* const middle = code.settled + kBins - 1;
    code.settles = code.most_steps <= 1 && code.start[0] == code.start[kBins] && code.start[0] == code.start[1];
    middle[0] = entry(0x7fffff, code.start[0]);  // nothing exceeds it
    for (int bin = 1; bin < kBins; ++bin) {
        const uint32_t upper = static_cast<uint32_t>(kFirst + bin), last = (upper << 16 | 0xffff) & 0xffffff;
        const int above = code.start[bin], below = code.start[kBins + bin];
        const uint32_t up = float_bits(code.threshold[above]), down = float_bits(code.threshold[below]);
        middle[bin] = entry(up >> 16 == upper ? up & 0xffffff : last, above);
        // v > threshold is |v| < |threshold|: the code falls where |v| > the number below it.
        const bool falls = down >> 16 == (upper | 0x8000) && down & 0xffff;
        middle[-bin] = falls ? entry((down - 1) & 0xffffff, below + 1) : entry(last, below);
    }
}

// What avx512.h computes from the upper half of the bits of 2 |v|, not below those of the first bin.
int line_guess(const Blockwise8Code& code, uint32_t half) {
    const uint32_t e = half >> 8, swapped = (half << 8 & 0xff00) | e;
    const int line = swapped > code.bend[e & 31] ? 0 : 1;
    return static_cast<int>(((swapped * code.rise[line][e & 31] >> 16) + code.base[line][e & 31]) >> 8);
}

// Decade d of a dynamic map, from 10^(d - 7) to 10^(d - 6), holds 2^d values of each sign, or 2^(d + 1) of one, so its
// line rises by as many: half a code above the number of thresholds where it crosses one.
void make_lines(Blockwise8Code& code) {
    code.is_signed = code.map[0] < 0;
    const int zero = code.is_signed ? 127 : 0, last = 31;
    const auto values = [&](int d) { return code.is_signed ? 1 << d : 2 << d; };
    const auto line = [&](int d, double a) {
        const int before = values(d) - values(0);
        return zero + before + 0.5 + values(d) * (a / pow(10, d - 6) - 0.1) / 0.9;
    };
    for (int e = 0; e < last; ++e) {
        const double low = ldexp(1, e - last), high = 2 * low;
        int decade[2];  // in which the binade ends, and begins
        for (int i = 0; i < 2; ++i) {
            int& d = decade[i] = 0;
            while (d < 6 && (i ? low : high) > pow(10, d - 6)) ++d;
            const double rise = lround(256 * (line(d, high) - line(d, low)));
            code.rise[i][e] = static_cast<uint16_t>(rise);
            // The factor of the rise is the fraction and, below it, the exponent.
            const double below = rise * (code.kFirstExponent + e) / 65536;
            code.base[i][e] = static_cast<uint16_t>(lround(256 * line(d, low) - below));
        }
        const double bend = decade[0] == decade[1] ? low : pow(10, decade[1] - 6);
        code.bend[e] = static_cast<uint16_t>(static_cast<int>(256 * (bend / low - 1)) << 8 | 0xff);
    }
    for (int i = 0; i < 2; ++i) {  // 1 and, with the same low bits of the exponent, inf and NaN: the last code but one
        code.bend[last] = 0;
        code.rise[i][last] = 0;
        code.base[i][last] = 254 << 8;
    }

    // The search starts at the guess and goes on by one at most: that must do for all values of every bin.
    int below = zero;
    const auto count = [&](float v) {  // thresholds below a rising v
        while (code.threshold[below] < v) ++below;
        return below;
    };
    code.linear = code.threshold[zero] >= ldexp(1, -last);  // smaller values are taken for that
    for (uint32_t half = code.kFirstExponent << 8; half < 127 << 8; ++half) {
        const int guess = line_guess(code, half);
        code.linear &= guess <= count(bits_float(half << 15)) && count(bits_float((half << 15) + 0x7fff)) <= guess + 1;
    }
    code.linear &= count(1) == 255;

    for (int i = 0; i < 255; ++i) code.doubled[i] = 2 * float_bits(code.threshold[i]);
    if (!code.is_signed) return;
    code.linear &= float_bits(code.map[zero]) == 0;
    for (int i = 0; i < zero; ++i) {
        code.linear &= code.map[zero + 1 + i] == -code.map[zero - 1 - i];
        // Where the midpoint is no fp32 number, its double is odd: v and -v are both above it or both below it.
        code.doubled[zero + i] += code.threshold[zero + i] != -code.threshold[zero - 1 - i];
    }
    code.doubled[255] = code.doubled[zero];
}

Blockwise8Code make_code(const float* map) {
    Blockwise8Code code = {};
    memcpy(code.map, map, sizeof code.map);
    make_search(code);
    make_settled(code);
    make_lines(code);
    for (int i = 0; i < 256; ++i) {
        for (int byte = 0; byte < 4; ++byte) {
            code.map_bytes[byte][i] = static_cast<uint8_t>(float_bits(code.map[i]) >> 8 * byte);
            code.doubled_bytes[byte][i] = static_cast<uint8_t>(code.doubled[i] >> 8 * byte);
        }
    }
    return code;
}

}  // namespace

// A code costs 60 µs to make, as much as the step of a small model; nearly every call brings one of the same two maps.
std::shared_ptr<const Blockwise8Code> code_of(const float* map) {
    static std::mutex mutex;
    static std::shared_ptr<const Blockwise8Code> kept[2];
    const std::lock_guard<std::mutex> hold(mutex);
    auto& last = kept[map[0] < 0];
    if (!last || memcmp(last->map, map, sizeof last->map)) last = std::make_shared<const Blockwise8Code>(make_code(map));
    return last;
}

}  // namespace lora_ops
