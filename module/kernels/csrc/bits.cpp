// Spikes as bits: what a backward pass needs of them, in a thirty-second of the memory.

#include "layout.h"

namespace {

template <class I> void pack(int64_t n, const I* x, uint8_t* bits, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t byte = 0; byte < (n + 7) / 8; byte++) {
        const int64_t first = byte * 8, count = n - first < 8 ? n - first : 8;
        unsigned value = 0;
        for (int64_t i = 0; i < count; i++) value |= unsigned(load(x + first + i) != 0) << i;
        bits[byte] = uint8_t(value);
    }
}

template <class I> void unpack(int64_t n, const uint8_t* bits, I* x, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t byte = 0; byte < (n + 7) / 8; byte++) {
        const int64_t first = byte * 8, count = n - first < 8 ? n - first : 8;
        const unsigned value = bits[byte];
        for (int64_t i = 0; i < count; i++) store(x + first + i, float(value >> i & 1));
    }
}

}  // namespace

// n values in the order of memory.
#define ENTRY_POINTS(NAME, I)                                                                          \
    extern "C" void pack_bits_##NAME(int64_t n, const I* x, uint8_t* bits, int threads) {              \
        pack<I>(n, x, bits, threads);                                                                  \
    }                                                                                                  \
    extern "C" void unpack_bits_##NAME(int64_t n, const uint8_t* bits, I* x, int threads) {            \
        unpack<I>(n, bits, x, threads);                                                                \
    }

ENTRY_POINTS(float32, float)
ENTRY_POINTS(float64, double)
ENTRY_POINTS(bfloat16, bf16)
