/* Spikes to bits and back, and weights to panels. Legend and layouts: sparse.h. */
#include "sparse.h"

/* 8 bytes of 0/1 -> 8 bits: byte i moves to bit 56 + i. */
static inline uint64_t bits_of_bytes(const uint8_t *b) {
    uint64_t eight, word = 0;
    for (int j = 0; j < 8; j++) {
        memcpy(&eight, b + 8 * j, 8);
        word |= ((eight * 0x0102040810204080ULL) >> 56) << (8 * j);
    }
    return word;
}

#define DEFINE_PACK(NAME, TYPE, ONE)                                                                               \
    static int NAME(const TYPE *restrict x, int64_t n, uint64_t *restrict bits) {                          \
        TYPE bad = 0;                                                                                              \
        int64_t c = 0;                                                                                             \
        for (; c + 64 <= n; c += 64) {                                                                             \
            uint8_t b[64];                                                                                         \
            for (int i = 0; i < 64; i++) {                                                                         \
                b[i] = x[c + i] == (TYPE)(ONE);                                                                    \
                bad |= (TYPE)((x[c + i] != 0) & (x[c + i] != (TYPE)(ONE)));                                        \
            }                                                                                                      \
            *bits++ = bits_of_bytes(b);                                                                            \
        }                                                                                                          \
        if (c < n) {                                                                                               \
            uint8_t b[64] = {0};                                                                                   \
            for (int i = 0; i < n - c; i++) {                                                                      \
                b[i] = x[c + i] == (TYPE)(ONE);                                                                    \
                bad |= (TYPE)((x[c + i] != 0) & (x[c + i] != (TYPE)(ONE)));                                        \
            }                                                                                                      \
            *bits = bits_of_bytes(b);                                                                              \
        }                                                                                                          \
        return bad != 0;                                                                                           \
    }

DEFINE_PACK(pack_row_32, uint32_t, 0x3F800000u)
DEFINE_PACK(pack_row_bf16, uint16_t, 0x3F80u)
DEFINE_PACK(pack_row_f16, uint16_t, 0x3C00u)
DEFINE_PACK(pack_row_u8, uint8_t, 1u)

static int pack_row(const char *x, int dtype, int64_t n, uint64_t *bits) {
    switch (dtype) {
    case DTYPE_F32: return pack_row_32((const uint32_t *)x, n, bits);
    case DTYPE_BF16: return pack_row_bf16((const uint16_t *)x, n, bits);
    case DTYPE_F16: return pack_row_f16((const uint16_t *)x, n, bits);
    default: return pack_row_u8((const uint8_t *)x, n, bits);
    }
}

static int64_t size_of(int dtype) { return dtype == DTYPE_F32 ? 4 : dtype == DTYPE_U8 ? 1 : 2; }

/* In place: bit j of word i <-> bit i of word j. */
static void transpose_64x64(uint64_t a[64]) {
    uint64_t mask = 0x00000000FFFFFFFFULL;
    for (int j = 32; j; j >>= 1, mask ^= mask << j)
        for (int k = 0; k < 64; k = ((k | j) + 1) & ~j) {
            uint64_t t = ((a[k] >> j) ^ a[k | j]) & mask;
            a[k] ^= t << j;
            a[k | j] ^= t;
        }
}

/* Spikes [N, H*W, C] (channels_last) or [N, C, H*W] -> bits [N*H*W, ceil(C/64)].
 * Returns the number of spikes, or ERROR_NOT_SPIKES if a value is neither 0 nor 1. */
int64_t sparse_pack(const void *x, int dtype, int channels_last, int64_t N, int64_t HW, int64_t C, uint64_t *bits,
                   int threads) {
    const int64_t words = (C + 63) / 64, size = size_of(dtype), tiles = (HW + 63) / 64;
    int64_t spikes = 0;
    int bad = 0;
    (void)threads; /* unused without OpenMP */
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : spikes) reduction(| : bad)
    for (int64_t tile = 0; tile < N * tiles; tile++) {
        const int64_t n = tile / tiles, p0 = tile % tiles * 64, pixels = HW - p0 < 64 ? HW - p0 : 64;
        uint64_t *out = bits + (n * HW + p0) * words;
        if (channels_last) {
            for (int64_t p = 0; p < pixels; p++)
                bad |= pack_row((const char *)x + (n * HW + p0 + p) * C * size, dtype, C, out + p * words);
        } else {
            for (int64_t w = 0; w < words; w++) {
                uint64_t square[64] = {0};
                const int64_t channels = C - 64 * w < 64 ? C - 64 * w : 64;
                for (int64_t c = 0; c < channels; c++) {
                    const char *row = (const char *)x + ((n * C + 64 * w + c) * HW + p0) * size;
                    bad |= pack_row(row, dtype, pixels, square + c);
                }
                transpose_64x64(square);
                for (int64_t p = 0; p < pixels; p++) out[p * words + w] = square[p];
            }
        }
        for (int64_t i = 0; i < pixels * words; i++) spikes += __builtin_popcountll(out[i]);
    }
    return bad ? ERROR_NOT_SPIKES : spikes;
}

static void unpack_row(const uint64_t *restrict bits, int64_t C, float *restrict out) {
    for (int64_t c = 0; c < C; c++) out[c] = (float)((bits[c / 64] >> (c % 64)) & 1);
}

/* Bits [P, ceil(C/64)] -> floats 0 and 1 [P, C]. */
void sparse_unpack(const uint64_t *bits, int64_t P, int64_t C, float *out, int threads) {
    const int64_t words = (C + 63) / 64;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < P; p++) unpack_row(bits + p * words, C, out + p * C);
}

static void pack_panel_row(const float *w, int64_t stride, int64_t n, float *restrict to) {
    for (int64_t j = 0; j < n; j++) to[j] = w[j * stride];
}

/* Weights [O, C, taps] -> [panel][tap][C][lanes], zeros beyond O. */
void sparse_pack_weights(const float *weights, int64_t O, int64_t C, int taps, float *packed, int threads) {
    const int64_t lanes = lanes_of(O), panels = (O + lanes - 1) / lanes;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < panels * taps * C; row++) {
        const int64_t panel = row / (taps * C), tap = row / C % taps, c = row % C, o0 = panel * lanes;
        float *to = packed + row * lanes;
        memset(to, 0, (size_t)lanes * sizeof(float));
        pack_panel_row(weights + (o0 * C + c) * taps + tap, C * taps, O - o0 < lanes ? O - o0 : lanes, to);
    }
}
