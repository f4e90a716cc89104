/* Layers without weights: neurons whose input is at hand as floats, pooling, self-attention, means. Legend and layouts:
 * sparse.h. All threads come to each function. */
#include "layer.h"

/* T steps of the neurons of up to 32 channels, whose inputs are n <= 32 floats; returns how many fired. */
static uint32_t step(const float *x, int64_t n, vec *v, const result *to) {
    float lanes[PANEL] = {0};
    ivec fires[PANEL / VEC];
    memcpy(lanes, x, (size_t)n * sizeof(float));
    for (int j = 0; j < PANEL / VEC; j++) fires[j] = lif(AT(lanes + j * VEC), v + j, to->decay, to->threshold);
    return bits_of(fires, PANEL / VEC);
}

static void write_half(uint32_t *word, uint32_t set, int64_t c, int64_t C) {
    word[c / PANEL] = set;
    if (c + PANEL >= C && c / PANEL % 2 == 0) word[c / PANEL + 1] = 0; /* the half that has no channels */
}

/* Currents [T, P, C] -> spikes. */
void run_fire(const layer *l, char *memory, outcome *done) {
    const int64_t P = l->N * l->H * l->W, halves = (l->C + 63) / 64 * 2;
    const float *x = at(memory, l->input);
    uint32_t *spikes = at(memory, l->to->spikes);
    int64_t fired = 0;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < P; p++)
        for (int64_t c = 0; c < l->C; c += PANEL) {
            vec v[PANEL / VEC] = {{0}};
            for (int64_t t = 0; t < l->T; t++) {
                const uint32_t set = step(x + (t * P + p) * l->C + c, l->C - c < PANEL ? l->C - c : PANEL, v, l->to);
                write_half(spikes + (t * P + p) * halves, set, c, l->C);
                fired += __builtin_popcount(set);
            }
        }
    count(done, fired, 0);
}

/* Max-pool 3x3, stride 2, padding 1 on spikes is an OR. */
void run_pool_spikes(const layer *l, char *memory, outcome *done) {
    const int64_t height = (l->H + 1) / 2, width = (l->W + 1) / 2, words = (l->C + 63) / 64;
    const uint64_t *bits = at(memory, l->input);
    uint64_t *out = at(memory, l->to->spikes);
    int64_t fired = 0;
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < l->T * l->N * height; row++) {
        const int64_t n = row / height, y = row % height;
        for (int64_t x = 0; x < width; x++) {
            uint64_t *to = out + (row * width + x) * words;
            memset(to, 0, (size_t)words * sizeof(uint64_t));
            for (int64_t v = y > 0 ? 2 * y - 1 : 0; v <= 2 * y + 1 && v < l->H; v++)
                for (int64_t u = x > 0 ? 2 * x - 1 : 0; u <= 2 * x + 1 && u < l->W; u++)
                    for (int64_t w = 0; w < words; w++) to[w] |= bits[((n * l->H + v) * l->W + u) * words + w];
            for (int64_t w = 0; w < words; w++) fired += __builtin_popcountll(to[w]);
        }
    }
    count(done, fired, 0);
}

/* The largest of up to nine pixels, for n channels. */
static void largest(const float *image, int64_t H, int64_t W, int64_t C, int64_t y, int64_t x, int64_t n,
                    float *restrict to) {
    memcpy(to, image + (2 * y * W + 2 * x) * C, (size_t)n * sizeof(float));
    for (int64_t v = y > 0 ? 2 * y - 1 : 0; v <= 2 * y + 1 && v < H; v++)
        for (int64_t u = x > 0 ? 2 * x - 1 : 0; u <= 2 * x + 1 && u < W; u++) {
            const float *row = image + (v * W + u) * C;
            if (n == PANEL) /* a constant count, for the vectoriser */
                for (int64_t j = 0; j < PANEL; j++) to[j] = to[j] > row[j] ? to[j] : row[j];
            else
                for (int64_t j = 0; j < n; j++) to[j] = to[j] > row[j] ? to[j] : row[j];
        }
}

/* The same pool on values [T*N, H, W, C], which are kept, and the neurons that they drive. */
void run_pool_values(const layer *l, char *memory, outcome *done) {
    const int64_t height = (l->H + 1) / 2, width = (l->W + 1) / 2, halves = (l->C + 63) / 64 * 2;
    const int64_t P = l->N * height * width;
    const float *x = at(memory, l->input);
    float *values = at(memory, l->to->values);
    uint32_t *spikes = at(memory, l->to->spikes);
    int64_t fired = 0;
#pragma omp for schedule(static) nowait
    for (int64_t p = 0; p < P; p++)
        for (int64_t c = 0; c < l->C; c += PANEL) {
            const int64_t n = l->C - c < PANEL ? l->C - c : PANEL, image = p / (height * width);
            vec v[PANEL / VEC] = {{0}};
            for (int64_t t = 0; t < l->T; t++) {
                float *to = values + (t * P + p) * l->C + c;
                largest(x + (t * l->N + image) * l->H * l->W * l->C + c, l->H, l->W, l->C, p / width % height,
                        p % width, n, to);
                const uint32_t set = step(to, n, v, l->to);
                write_half(spikes + (t * P + p) * halves, set, c, l->C);
                fired += __builtin_popcount(set);
            }
        }
    count(done, fired, 0);
}

/* Spike-driven self-attention (paper, equations 5 to 7): q, in place, masked per channel by the neurons that the token sum
 * of k AND v drives. */
void run_attend(const layer *l, char *memory, outcome *done, scratch *m) {
    const int64_t words = (l->C + 63) / 64, tokens = l->H * l->W;
    uint64_t *q = at(memory, l->queries);
    const uint64_t *k = at(memory, l->keys), *v = at(memory, l->input);
    int64_t additions = 0, left = 0;
#pragma omp for schedule(static) nowait
    for (int64_t b = 0; b < l->N; b++) {
        float *sums = m->sums, *state = sums + words * 64;
        memset(state, 0, (size_t)(words * 64) * sizeof(float));
        for (int64_t t = 0; t < l->T; t++) {
            const int64_t first = (t * l->N + b) * tokens * words;
            memset(sums, 0, (size_t)(words * 64) * sizeof(float));
            for (int64_t i = 0; i < tokens; i++)
                for (int64_t w = 0; w < words; w++)
                    for (uint64_t both = k[first + i * words + w] & v[first + i * words + w]; both; both &= both - 1)
                        sums[64 * w + __builtin_ctzll(both)] += 1.0f, additions++;
            for (int64_t w = 0; w < words; w++) {
                uint32_t halves[2];
                for (int h = 0; h < 2; h++)
                    halves[h] = step(sums + 64 * w + PANEL * h, PANEL, (vec *)(state + 64 * w + PANEL * h), l->to);
                const uint64_t mask = halves[0] | (uint64_t)halves[1] << 32;
                for (int64_t i = 0; i < tokens; i++) {
                    q[first + i * words + w] &= mask;
                    left += __builtin_popcountll(q[first + i * words + w]);
                }
            }
        }
    }
    count(done, left, additions);
}

/* Values [T*N, H*W, C] -> [T*N, C]. */
void run_mean(const layer *l, char *memory) {
    const int64_t pixels = l->H * l->W;
    const float *x = at(memory, l->input);
    float *out = at(memory, l->to->values);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < l->T * l->N; n++) {
        float *restrict to = out + n * l->C;
        memset(to, 0, (size_t)l->C * sizeof(float));
        for (int64_t p = 0; p < pixels; p++)
            for (int64_t c = 0; c < l->C; c++) to[c] += x[(n * pixels + p) * l->C + c];
        for (int64_t c = 0; c < l->C; c++) to[c] /= (float)pixels;
    }
}
