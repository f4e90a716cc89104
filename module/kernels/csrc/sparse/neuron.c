/* Neurons whose input is at hand as floats, and self-attention on bits, for evaluation. Legend and layouts: sparse.h. */
#include "sparse.h"

static void lif_row(const float *x, int64_t step, int64_t C, int64_t T, float decay, float threshold,
                            uint32_t *spikes, int64_t spike_step) {
    for (int64_t c = 0; c < C; c += PANEL) {
        float v[PANEL] = {0};
        const int64_t n = C - c < PANEL ? C - c : PANEL;
        for (int64_t t = 0; t < T; t++)
            spikes[t * spike_step + c / PANEL] = lif_step(x + t * step + c, v, n, decay, threshold);
    }
}

/* Currents [T, P, C], `step` floats from one time step to the next (0: the same at each) -> bits [T, P, ceil(C/64)],
 * zeroed by the caller. */
void sparse_lif(const float *x, int64_t step, int64_t T, int64_t P, int64_t C, float decay, float threshold,
               uint64_t *spikes, int threads) {
    const int64_t halves = (C + 63) / 64 * 2;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t p = 0; p < P; p++)
        lif_row(x + p * C, step, C, T, decay, threshold, (uint32_t *)spikes + p * halves, P * halves);
}

/* Spike-driven self-attention (paper, equations 5 to 7): q masked per channel by the neurons that the token sum of
 * k AND v drives. Bits [T, B, tokens, words] -> the same in q. Returns the additions done, or ERROR_MEMORY. */
int64_t sparse_attention(uint64_t *q, const uint64_t *k, const uint64_t *v, int64_t T, int64_t B, int64_t tokens,
                        int64_t C, float decay, float threshold, int threads) {
    const int64_t words = (C + 63) / 64;
    int64_t additions = 0;
    int failed = 0;
    (void)threads;
#pragma omp parallel for schedule(static) num_threads(threads) reduction(+ : additions) reduction(| : failed)
    for (int64_t b = 0; b < B; b++) {
        float *state = calloc((size_t)(2 * words * 64), sizeof(float)), *sums = state ? state + words * 64 : 0;
        uint32_t *mask = calloc((size_t)(2 * words), sizeof(uint32_t));
        failed |= !(state && mask);
        for (int64_t t = 0; t < T && state && mask; t++) {
            const int64_t at = (t * B + b) * tokens * words;
            memset(sums, 0, (size_t)(words * 64) * sizeof(float));
            for (int64_t i = 0; i < tokens * words; i++)
                for (uint64_t both = k[at + i] & v[at + i]; both; both &= both - 1, additions++)
                    sums[i % words * 64 + __builtin_ctzll(both)] += 1.0f;
            for (int64_t c = 0; c < C; c += PANEL)
                mask[c / PANEL] = lif_step(sums + c, state + c, C - c < PANEL ? C - c : PANEL, decay, threshold);
            for (int64_t i = 0; i < tokens * words; i++)
                q[at + i] &= mask[i % words * 2] | (uint64_t)mask[i % words * 2 + 1] << 32;
        }
        free(state), free(mask);
    }
    return failed ? ERROR_MEMORY : additions;
}
