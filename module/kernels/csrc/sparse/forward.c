/* Convolution of spikes forward, with the neuron on top where one follows. Legend and layouts: sparse.h.
 *
 * A block of pixels is taken through all panels, and each panel through all T steps, so that the currents of a
 * neuron never leave the cache.
 */
#include "sparse.h"

enum {
    PIXELS = 256,            /* of a block, over all its steps: their lists and sums stay in the second-level cache */
    CHUNK_BYTES = 64 * 1024, /* of weights that one inner loop chooses from */
};

/* Lists of active channels at one step. Per padded pixel of a block (length 0 in the halo), and joined over the taps
 * of a chunk per output pixel: short lists would cost a mispredicted branch each. */
typedef struct {
    uint32_t *start, *length, *channel; /* channel: c * PANEL, the offset of its row in a panel */
    int64_t *end;                       /* [chunks * pixels + 1]: where the joined lists end */
    uint32_t *joined;                   /* (tap * C + c) * PANEL */
} lists;

/* What is done with the sums of one layer. Of `out` and `spikes` one is set. */
typedef struct {
    const float *bias;     /* [O] or null */
    const float *residual; /* [T*N*H*W, O] or null: added to the sums */
    void *out;             /* [T*N*H*W, O] */
    int dtype;             /* of out */
    uint32_t *spikes;      /* bits [T*N*H*W, 2 * ceil(O/64)], zeroed by the caller: out of a neuron with */
    float decay, threshold;
} target;

static void list_active(const plan *s, const block *b, const uint64_t *bits, lists *m) {
    uint32_t n = 0;
    memset(m->length, 0, (size_t)(b->images * s->height * s->width) * sizeof(uint32_t));
    for (int64_t i = 0; i < b->images; i++)
        for (int64_t y = -s->halo; y < b->rows + s->halo; y++) {
            if (b->h0 + y < 0 || b->h0 + y >= s->H) continue;
            for (int64_t x = 0; x < s->W; x++) {
                const uint64_t *row = bits + (((b->n0 + i) * s->H + b->h0 + y) * s->W + x) * s->words;
                const int64_t at = padded(s, i, y, x);
                m->start[at] = n;
                for (int64_t w = 0; w < s->words; w++)
                    for (uint64_t left = row[w]; left; left &= left - 1)
                        m->channel[n++] = (uint32_t)((64 * w + __builtin_ctzll(left)) * PANEL);
                m->length[at] = n - m->start[at];
            }
        }
}

static uint32_t *copy_shifted(const uint32_t *restrict list, uint32_t n, uint32_t shift,
                                      uint32_t *restrict to) {
    for (uint32_t i = 0; i < n; i++) to[i] = list[i] + shift;
    return to + n;
}

/* Fills `joined` and `end`; returns the number of (spike, tap) pairs of the block. */
static int64_t join_taps(const plan *s, const block *b, int per_chunk, lists *m) {
    uint32_t *to = m->joined;
    int64_t *end = m->end;
    *end++ = 0;
    for (int t0 = 0; t0 < s->taps; t0 += per_chunk) {
        const int t1 = t0 + per_chunk < s->taps ? t0 + per_chunk : s->taps;
        for (int64_t i = 0; i < b->images; i++)
            for (int64_t y = 0; y < b->rows; y++)
                for (int64_t x = 0; x < s->W; x++) {
                    for (int t = t0; t < t1; t++) {
                        const int64_t at = padded(s, i, y + (s->halo ? t / 3 - 1 : 0), x + (s->halo ? t % 3 - 1 : 0));
                        to = copy_shifted(m->channel + m->start[at], m->length[at], (uint32_t)(t * s->C * PANEL), to);
                    }
                    *end++ = to - m->joined;
                }
    }
    return to - m->joined;
}

/* sums[pixel] += the rows of one chunk of taps, for one panel. */
static void sum_panel(const uint32_t *joined, const int64_t *end, int64_t pixels, const float *base,
                              float *sums) {
    for (int64_t p = 0; p < pixels; p++, sums += PANEL) {
        const uint32_t *list = joined + end[p], n = (uint32_t)(end[p + 1] - end[p]);
        add_rows(base, list, n, sums);
    }
}

static inline uint16_t to_bf16(float value) { /* round to nearest even, as torch does; NaN stays NaN */
    uint32_t u;
    memcpy(&u, &value, 4);
    return (u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0 : (uint16_t)((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

/* The sums that a panel of a block at one step starts from; p0 is the first pixel of all. */
static void start_sums(const target *to, int64_t p0, int64_t pixels, int64_t O, int64_t o0, float *sums) {
    const int64_t n = O - o0 < PANEL ? O - o0 : PANEL;
    float bias[PANEL] = {0};
    if (to->bias) memcpy(bias, to->bias + o0, (size_t)n * sizeof(float));
    for (int64_t p = 0; p < pixels; p++, sums += PANEL) {
        memcpy(sums, bias, sizeof bias);
        if (to->residual)
            for (int64_t j = 0; j < n; j++) sums[j] += to->residual[(p0 + p) * O + o0 + j];
    }
}

static void finish_sums(const target *to, int64_t p0, int64_t pixels, int64_t O, int64_t o0, const float *sums,
                                float *v) {
    const int64_t n = O - o0 < PANEL ? O - o0 : PANEL, halves = (O + 63) / 64 * 2;
    for (int64_t p = p0; p < p0 + pixels; p++, sums += PANEL, v += PANEL) {
        if (to->spikes) {
            to->spikes[p * halves + o0 / PANEL] = lif_step(sums, v, n, to->decay, to->threshold);
        } else if (to->dtype == DTYPE_F32) {
            memcpy((float *)to->out + p * O + o0, sums, (size_t)n * sizeof(float));
        } else {
            uint16_t *row = (uint16_t *)to->out + p * O + o0;
            for (int64_t j = 0; j < n; j++) row[j] = to_bf16(sums[j]);
        }
    }
}

/* One block through all panels and steps; returns its (spike, tap) pairs. */
static int64_t forward_block(const plan *s, int64_t index, int64_t T, int per_chunk, const uint64_t *bits,
                             const float *weights, const target *to, lists *m, float *sums, float *v) {
    const block b = block_at(s, index);
    const int64_t image = s->H * s->W, pixels = b.images * b.rows * s->W, p0 = b.n0 * image + b.h0 * s->W;
    const int chunks = (s->taps + per_chunk - 1) / per_chunk;
    int64_t pairs = 0;
    for (int64_t t = 0; t < T; t++) {
        list_active(s, &b, bits + t * s->N * image * s->words, &m[t]);
        pairs += join_taps(s, &b, per_chunk, &m[t]);
    }
    for (int64_t o0 = 0; o0 < s->O; o0 += PANEL) {
        if (to->spikes) memset(v, 0, (size_t)(pixels * PANEL) * sizeof(float));
        for (int64_t t = 0; t < T; t++) {
            start_sums(to, t * s->N * image + p0, pixels, s->O, o0, sums);
            for (int chunk = 0; chunk < chunks; chunk++)
                sum_panel(m[t].joined, m[t].end + chunk * pixels, pixels, weights + o0 * s->taps * s->C, sums);
            finish_sums(to, t * s->N * image + p0, pixels, s->O, o0, sums, v);
        }
    }
    return pairs;
}

/* Memory for the lists of T steps; 0 if there is none. */
static int allocate(lists *m, int64_t T, const plan *s, int chunks) {
    const size_t positions = (size_t)(s->images * s->height * s->width), pixels = (size_t)(s->images * s->rows * s->W);
    int complete = 1;
    for (int64_t t = 0; t < T; t++) {
        m[t].start = malloc(positions * sizeof(uint32_t));
        m[t].length = malloc(positions * sizeof(uint32_t));
        m[t].channel = malloc(positions * (size_t)s->C * sizeof(uint32_t));
        m[t].end = malloc((pixels * (size_t)chunks + 1) * sizeof(int64_t));
        m[t].joined = malloc(pixels * (size_t)s->taps * (size_t)s->C * sizeof(uint32_t));
        complete &= m[t].start && m[t].length && m[t].channel && m[t].end && m[t].joined;
    }
    return complete;
}

static void release(lists *m, int64_t T) {
    for (int64_t t = 0; m && t < T; t++)
        free(m[t].start), free(m[t].length), free(m[t].channel), free(m[t].end), free(m[t].joined);
    free(m);
}

/* Spikes [T, N, H, W] as bits -> what `target` describes: bias + residual + the sum of the weight rows of the active
 * inputs, or the spikes of a neuron driven by that over T steps (T is 1 without neuron: then steps are independent).
 * Returns the additions of weights done (bias and residual not counted), or ERROR_MEMORY. */
int64_t sparse_forward(const uint64_t *bits, int64_t T, int64_t N, int64_t H, int64_t W, int64_t C, int64_t O, int taps,
                      const float *weights, const float *bias, const float *residual, void *out, int dtype,
                      uint64_t *spikes, float decay, float threshold, int threads) {
    const plan s = make_plan(N, H, W, C, O, taps, PIXELS / T < 16 ? 16 : PIXELS / T);
    const target to = {bias, residual, out, dtype, (uint32_t *)spikes, decay, threshold};
    const size_t pixels = (size_t)(s.images * s.rows * s.W);
    const int64_t fitting = CHUNK_BYTES / (C * PANEL * (int64_t)sizeof(float));
    const int per_chunk = (int)(fitting < 1 ? 1 : fitting > taps ? taps : fitting);
    int64_t pairs = 0;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) reduction(+ : pairs) reduction(| : failed)
    {
        lists *m = calloc((size_t)T, sizeof(lists));
        float *sums = malloc(pixels * PANEL * sizeof(float)), *v = malloc(pixels * PANEL * sizeof(float));
        failed = !(m && sums && v && allocate(m, T, &s, (taps + per_chunk - 1) / per_chunk));
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < s.blocks; index++)
            if (!failed) pairs += forward_block(&s, index, T, per_chunk, bits, weights, &to, m, sums, v);
        release(m, T);
        free(sums), free(v);
    }
    return failed ? ERROR_MEMORY : pairs * O;
}

static void pack_panel_row(const float *w, int64_t stride, int64_t n, float *restrict to) {
    for (int64_t j = 0; j < n; j++) to[j] = w[j * stride];
}

/* Weights [O, C, taps] -> [panel][tap][C][PANEL], zeros beyond O. */
void sparse_pack_weights(const float *weights, int64_t O, int64_t C, int taps, float *packed, int threads) {
    const int64_t panels = (O + PANEL - 1) / PANEL;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < panels * taps * C; row++) {
        const int64_t panel = row / (taps * C), tap = row / C % taps, c = row % C, o0 = panel * PANEL;
        float *to = packed + row * PANEL;
        memset(to, 0, PANEL * sizeof(float));
        pack_panel_row(weights + (o0 * C + c) * taps + tap, C * taps, O - o0 < PANEL ? O - o0 : PANEL, to);
    }
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
