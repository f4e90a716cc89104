/* The weight gradient from spikes: rows of the output gradient are summed over the active inputs.
 * Legend and layouts: sparse.h. */
#include "sparse.h"

enum { PIXELS = 512 }; /* of a block: its panel of gradients is 64 KiB */

/* The gradient of one panel over a block, with its halo of zeros: [padded pixel][PANEL]. */
static void copy_gradient(const plan *s, const block *b, const void *grad, int dtype, int64_t o0, float *to) {
    const int64_t n = s->O - o0 < PANEL ? s->O - o0 : PANEL;
    memset(to, 0, (size_t)(b->images * s->height * s->width) * PANEL * sizeof(float));
    for (int64_t i = 0; i < b->images; i++)
        for (int64_t y = -s->halo; y < b->rows + s->halo; y++) {
            if (b->h0 + y < 0 || b->h0 + y >= s->H) continue;
            for (int64_t x = 0; x < s->W; x++) {
                const int64_t at = (((b->n0 + i) * s->H + b->h0 + y) * s->W + x) * s->O + o0;
                float *row = to + padded(s, i, y, x) * PANEL;
                if (dtype == DTYPE_F32) {
                    memcpy(row, (const float *)grad + at, (size_t)n * sizeof(float));
                } else {
                    uint32_t wide[PANEL];
                    for (int64_t j = 0; j < n; j++) wide[j] = (uint32_t)((const uint16_t *)grad)[at + j] << 16;
                    memcpy(row, wide, (size_t)n * sizeof(float));
                }
            }
        }
}

/* Per channel of one word: the padded positions (times PANEL) of the block's pixels at which it fires. */
static void list_pixels(const plan *s, const block *b, const uint64_t *bits, int64_t word, int64_t capacity,
                        uint32_t *lists, uint32_t *lengths) {
    memset(lengths, 0, 64 * sizeof(uint32_t));
    for (int64_t i = 0; i < b->images; i++)
        for (int64_t y = 0; y < b->rows; y++)
            for (int64_t x = 0; x < s->W; x++) {
                uint64_t left = bits[(((b->n0 + i) * s->H + b->h0 + y) * s->W + x) * s->words + word];
                const uint32_t at = (uint32_t)(padded(s, i, y, x) * PANEL);
                for (; left; left &= left - 1) {
                    const int c = __builtin_ctzll(left);
                    lists[c * capacity + lengths[c]++] = at;
                }
            }
}

/* dW [tap][C][PANEL] of one panel += the gradient rows at the active pixels, shifted by the tap. */
static void grad_panel(const plan *s, const uint32_t *lists, const uint32_t *lengths, int64_t capacity,
                               const float *gradient, float *dW) {
    for (int t = 0; t < s->taps; t++) {
        /* out(p) took the input at p + shift, so the input at q gave to out(q - shift). */
        const int64_t shift = s->halo ? (t / 3 - 1) * s->width + t % 3 - 1 : 0;
        const float *base = gradient - shift * PANEL;
        for (int64_t c = 0; c < s->C; c++, dW += PANEL) {
            const uint32_t n = lengths[c], *list = lists + c * capacity;
            if (!n) continue;
            add_rows(base, list, n, dW, PANEL);
        }
    }
}

/* dW [panel][tap][C][PANEL] = the sum over active inputs of rows of grad [N, H, W, O]. Returns 0 or ERROR_MEMORY. */
int64_t sparse_weight_grad(const uint64_t *bits, int64_t N, int64_t H, int64_t W, int64_t C, int64_t O, int taps,
                          const void *grad, int dtype, float *dW, int threads) {
    const plan s = make_plan(N, H, W, C, O, taps, PANEL, PIXELS);
    const int64_t positions = s.images * s.height * s.width, capacity = s.images * s.rows * s.W;
    uint32_t *lists = malloc((size_t)(s.words * 64 * capacity + 1) * sizeof(uint32_t)); /* add_rows reads one more */
    uint32_t *lengths = malloc((size_t)(s.words * 64) * sizeof(uint32_t));
    int failed = !(lists && lengths);
    (void)threads;
    memset(dW, 0, (size_t)(s.panels * s.taps * s.C) * PANEL * sizeof(float));
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *gradient = malloc((size_t)positions * PANEL * sizeof(float));
        failed |= !(gradient && lists && lengths);
        for (int64_t index = 0; index < s.blocks; index++) {
            const block b = block_at(&s, index);
#pragma omp for schedule(static)
            for (int64_t w = 0; w < s.words; w++)
                if (!failed) list_pixels(&s, &b, bits, w, capacity, lists + w * 64 * capacity, lengths + w * 64);
#pragma omp for schedule(dynamic)
            for (int64_t panel = 0; panel < s.panels; panel++) {
                if (failed) continue;
                copy_gradient(&s, &b, grad, dtype, panel * PANEL, gradient);
                grad_panel(&s, lists, lengths, capacity, gradient, dW + panel * s.taps * s.C * PANEL);
            }
        }
        free(gradient);
    }
    free(lists), free(lengths);
    return failed ? ERROR_MEMORY : 0;
}

/* [panel][tap][C][PANEL] -> [O, C, taps]. */
void sparse_unpack_weights(const float *packed, int64_t O, int64_t C, int taps, float *weights, int threads) {
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t o = 0; o < O; o++)
        for (int64_t c = 0; c < C; c++)
            for (int t = 0; t < taps; t++)
                weights[(o * C + c) * taps + t] = packed[((o / PANEL * taps + t) * C + c) * PANEL + o % PANEL];
}
