/* Convolution of spikes by additions only: the weight rows of the active inputs are summed, nothing is multiplied.
 *
 * Legend: P = N*H*W pixels, C input channels, O output channels, taps = 1 (1x1) or 9 (3x3, stride 1, padding 1).
 * Spikes arrive as bits: one row of ceil(C/64) words per pixel, channel c in bit c%64 of word c/64.
 * A panel is PANEL consecutive output channels. Packed weights are [panel][tap][C][PANEL], zeros beyond O, so that
 * the rows one inner loop chooses from lie close together.
 *
 * Every output value is summed by one thread in an order that depends on the shapes alone: results do not depend
 * on the number of threads.
 */
#ifndef SPARSE_H
#define SPARSE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bit packing below needs a little-endian machine"
#endif

enum { PANEL = 32 }; /* floats: long enough to pay for reading an index, short enough to stay in cache */

enum { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2, DTYPE_U8 = 3 };
enum { ERROR_NOT_SPIKES = -1, ERROR_MEMORY = -2 };

/* A register of floats: of a wider vector, GCC keeps sums in memory. Unaligned: panels start on 64 bytes, gradients need
 * not. */
#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(LANES * sizeof(float)), aligned(4), may_alias));

/* A block is `rows` image rows of one image, or several whole small images; with a halo of one pixel for 3x3. */
typedef struct {
    int64_t N, H, W, C, O, words, panels, rows, images, row_blocks, blocks, width, height;
    int taps, halo;
} plan;

static inline plan make_plan(int64_t N, int64_t H, int64_t W, int64_t C, int64_t O, int taps, int64_t pixels) {
    plan s;
    s.halo = taps == 9;
    s.taps = taps;
    if (!s.halo) { N *= H * W, H = W = 1; } /* pixels are independent: an image each */
    s.N = N, s.H = H, s.W = W, s.C = C, s.O = O;
    s.words = (C + 63) / 64;
    s.panels = (O + PANEL - 1) / PANEL;
    s.rows = pixels / W < 1 ? 1 : pixels / W > H ? H : pixels / W;
    s.images = s.rows < H || pixels / (H * W) < 1 ? 1 : pixels / (H * W);
    s.row_blocks = (H + s.rows - 1) / s.rows;
    s.blocks = (N + s.images - 1) / s.images * s.row_blocks;
    s.width = W + 2 * s.halo;
    s.height = s.rows + 2 * s.halo;
    return s;
}

typedef struct {
    int64_t n0, images, h0, rows;
} block;

static inline block block_at(const plan *s, int64_t index) {
    block b;
    b.n0 = index / s->row_blocks * s->images;
    b.images = s->N - b.n0 < s->images ? s->N - b.n0 : s->images;
    b.h0 = index % s->row_blocks * s->rows;
    b.rows = s->H - b.h0 < s->rows ? s->H - b.h0 : s->rows;
    return b;
}

static inline int64_t padded(const plan *s, int64_t image, int64_t row, int64_t column) {
    return (image * s->height + row + s->halo) * s->width + column + s->halo;
}

/* to += the listed rows of a panel; two chains of additions for each register, so that they overlap. */
static inline void add_rows(const float *base, const uint32_t *list, uint32_t n, float *to) {
    enum { REGISTERS = PANEL / LANES };
    vec a[REGISTERS] = {{0}}, b[REGISTERS] = {{0}};
    uint32_t i = 0;
    for (; i + 2 <= n; i += 2) {
        const vec *u = (const vec *)(base + list[i]), *v = (const vec *)(base + list[i + 1]);
#pragma GCC unroll 8
        for (int r = 0; r < REGISTERS; r++) a[r] += u[r], b[r] += v[r];
    }
    if (i < n) {
        const vec *u = (const vec *)(base + list[i]);
#pragma GCC unroll 8
        for (int r = 0; r < REGISTERS; r++) a[r] += u[r];
    }
#pragma GCC unroll 8
    for (int r = 0; r < REGISTERS; r++) ((vec *)to)[r] += a[r] + b[r];
}

/* One step of a leaky integrate-and-fire neuron with hard reset to 0, for n <= 32 neighbours: charges *v with the
 * input *x, returns the spikes as bits. decay is 1/tau. */
static inline uint32_t lif_step(const float *restrict x, float *restrict v, int64_t n, float decay, float threshold) {
    uint32_t spikes = 0;
#define LIF_LOOP(COUNT)                                                                                                \
    for (int64_t j = 0; j < (COUNT); j++) {                                                                            \
        const float h = v[j] + (x[j] - v[j]) * decay;                                                                  \
        const uint32_t fires = h >= threshold;                                                                         \
        spikes |= fires << j;                                                                                          \
        v[j] = fires ? 0.0f : h;                                                                                       \
    }
    if (n == PANEL) { /* a constant count, for the vectoriser */
        LIF_LOOP(PANEL)
    } else {
        LIF_LOOP(n)
    }
#undef LIF_LOOP
    return spikes;
}

#endif
