/* Convolution of spikes by additions only: the weight rows of the active inputs are summed, nothing is multiplied.
 *
 * Legend: T time steps, N images at each step, P = N*H*W pixels, C input channels, O output channels, taps = 1 (1x1) or 9
 * (3x3, stride 1, padding 1). Spikes are bits: one row of ceil(C/64) words per pixel, channel c in bit c%64 of word c/64.
 * A panel is `lanes` consecutive output channels. Packed weights are [panel][tap][C][lanes], zeros beyond O, so that the
 * rows one inner loop chooses from lie close together.
 *
 * Every output value is summed by one thread in an order that depends on the shapes and the input alone: results do not
 * depend on the number of threads.
 */
#ifndef SPARSE_H
#define SPARSE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bit packing below needs a little-endian machine"
#endif

/* A vector is one register: wider ones are kept in memory by some compilers. Unaligned: gradients need not be. */
#if defined(__AVX512F__)
enum { VEC = 16 };
#elif defined(__AVX__)
enum { VEC = 8 };
#else
enum { VEC = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * VEC), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * VEC), aligned(4), may_alias));
#define AT(p) (*(vec *)(p))

enum { PANEL = 32 }; /* the most lanes: long enough to pay for reading an index, short enough to stay in registers */

/* Lanes of the panels of O output channels: narrow stages do not fill 32. */
static inline int lanes_of(int64_t O) { return O <= 8 && VEC <= 8 ? 8 : O <= 16 ? 16 : PANEL; }

/* A constant for the compiler where it is one of three: CALL(8), CALL(16) or CALL(32). */
#define WITH_LANES(lanes, CALL)                                                                                        \
    switch (lanes) {                                                                                                   \
    case 8: CALL(8); break;                                                                                            \
    case 16: CALL(16); break;                                                                                          \
    default: CALL(32);                                                                                                 \
    }
#define INLINE static inline __attribute__((always_inline))

enum { DTYPE_F32 = 0, DTYPE_BF16 = 1, DTYPE_F16 = 2, DTYPE_U8 = 3 };
enum { ERROR_NOT_SPIKES = -1, ERROR_MEMORY = -2 };

/* A block is `rows` image rows of one image, or several whole small images; with a halo of one pixel for 3x3. */
typedef struct {
    int64_t N, H, W, C, O, words, panels, rows, images, row_blocks, blocks, width, height;
    int taps, halo, lanes;
} plan;

static inline plan make_plan(int64_t N, int64_t H, int64_t W, int64_t C, int64_t O, int taps, int lanes,
                             int64_t pixels) {
    plan s;
    s.halo = taps == 9;
    s.taps = taps, s.lanes = lanes;
    if (!s.halo) { N *= H * W, H = W = 1; } /* pixels are independent: an image each */
    s.N = N, s.H = H, s.W = W, s.C = C, s.O = O;
    s.words = (C + 63) / 64;
    s.panels = (O + lanes - 1) / lanes;
    s.rows = pixels / W < 1 ? 1 : pixels / W > H ? H : pixels / W;
    s.images = s.rows < H || pixels / (H * W) < 1 ? 1 : pixels / (H * W);
    s.row_blocks = (H + s.rows - 1) / s.rows;
    s.blocks = (N + s.images - 1) / s.images * s.row_blocks;
    s.width = W + 2 * s.halo;
    s.height = s.rows + 2 * s.halo;
    return s;
}

typedef struct {
    int64_t n0, images, h0, rows, pixels, p0; /* p0: its first pixel of all at one step */
} block;

static inline block block_at(const plan *s, int64_t index) {
    block b;
    b.n0 = index / s->row_blocks * s->images;
    b.images = s->N - b.n0 < s->images ? s->N - b.n0 : s->images;
    b.h0 = index % s->row_blocks * s->rows;
    b.rows = s->H - b.h0 < s->rows ? s->H - b.h0 : s->rows;
    b.pixels = b.images * b.rows * s->W;
    b.p0 = (b.n0 * s->H + b.h0) * s->W;
    return b;
}

static inline int64_t padded(const plan *s, int64_t image, int64_t row, int64_t column) {
    return (image * s->height + row + s->halo) * s->width + column + s->halo;
}

/* `row` where it is there, else zeros: chosen without a branch, which would be guessed wrong every other time. */
INLINE const float *row_or_zeros(int there, const float *row) {
    static const float zeros[PANEL] = {0};
    const float *chosen = there ? row : zeros;
    __asm__("" : "+r"(chosen)); /* without it the compiler makes a branch */
    return chosen;
}

/* to[lanes] += the rows of a list; two chains, so that additions overlap. One entry beyond the list is read. */
INLINE void add_rows(const float *base, const uint32_t *list, uint32_t n, float *to, const int lanes) {
    vec a[PANEL / VEC], b[PANEL / VEC];
    for (int j = 0; j < lanes / VEC; j++) a[j] = AT(to + j * VEC), b[j] = (vec){0};
    for (uint32_t i = 0; i < n; i += 2) {
        const float *u = base + list[i], *w = row_or_zeros(i + 1 < n, base + list[i + 1]);
        for (int j = 0; j < lanes / VEC; j++) a[j] += AT(u + j * VEC), b[j] += AT(w + j * VEC);
    }
    for (int j = 0; j < lanes / VEC; j++) AT(to + j * VEC) = a[j] + b[j];
}

/* One step of a leaky integrate-and-fire neuron with hard reset to 0: charges *v with x, returns all bits set where it
 * fires. decay is 1/tau. */
INLINE ivec lif(vec x, vec *v, float decay, float threshold) {
    const vec h = *v + (x - *v) * decay;
    const ivec fires = (ivec)(h >= threshold);
    *v = (vec)(~fires & (ivec)h);
    return fires;
}

/* Bit i set where lane i of the vectors fires. */
INLINE uint32_t bits_of(const ivec *fires, int vectors) {
    static const int32_t bit[PANEL] = {
#define EIGHT(n) 1 << (n), 2 << (n), 4 << (n), 8 << (n), 16 << (n), 32 << (n), 64 << (n), (int32_t)(128u << (n))
        EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24)
#undef EIGHT
    };
    ivec set = fires[0] & *(const ivec *)bit;
    for (int j = 1; j < vectors; j++) set |= fires[j] & *(const ivec *)(bit + j * VEC);
    uint64_t pairs[VEC / 2], all = 0;
    memcpy(pairs, &set, sizeof pairs);
    for (int j = 0; j < VEC / 2; j++) all |= pairs[j];
    return (uint32_t)(all | all >> 32);
}

#endif
