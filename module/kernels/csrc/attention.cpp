// Spike-driven self-attention for CPUs on q, k, v spikes with channels innermost: [T, B, N, 3 D], q first, then k, v.
//
// y[t,b,n,d] = q * mask, mask = spikes of a neuron fed with sum over tokens of k * v (paper, equations 5 to 7).

#include "layout.h"
#include "surrogate.h"

namespace {

// kv receives the token sums [T, B, D]: all that the backward pass needs besides the spikes.
template <class I, class S>
void attend(int64_t T, int64_t B, int64_t N, int64_t D, const I* qkv, S* kv, I* y, S decay, S threshold, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t(2 * D));
        S *v = buffer.data(), *mask = v + D;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t d = 0; d < D; d++) v[d] = 0;
            for (int64_t t = 0; t < T; t++) {
                const I* in = qkv + (t * B + b) * N * 3 * D;
                S* sum = kv + (t * B + b) * D;
                I* out = y + (t * B + b) * N * D;
                for (int64_t d = 0; d < D; d++) sum[d] = 0;
                for (int64_t n = 0; n < N; n++) {
                    const I *pk = in + n * 3 * D + D, *pv = pk + D;
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) sum[d] += S(load(pk + d)) * S(load(pv + d));
                }
                for (int64_t d = 0; d < D; d++) {
                    S h = v[d] + (sum[d] - v[d]) * decay;
                    mask[d] = h >= threshold ? S(1) : S(0);
                    v[d] = h >= threshold ? S(0) : h;
                }
                for (int64_t n = 0; n < N; n++) {
                    const I* pq = in + n * 3 * D;
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) store(out + n * D + d, S(load(pq + d)) * mask[d]);
                }
            }
        }
    }
}

template <class I, class S>
void attend_backward(int64_t T, int64_t B, int64_t N, int64_t D, const I* qkv, const S* kv, const I* gy, I* gqkv,
                     S decay, S threshold, S alpha, double* g_decay, int threads) {
    PerThread decay_sum(1, threads);
#pragma omp parallel num_threads(threads)
    {
        double& decay_total = *decay_sum.mine();
        std::vector<S> buffer(size_t((3 + T) * D));
        S *gv = buffer.data(), *gmask = gv + D, *gkv = gmask + D, *h = gkv + D;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            for (int64_t t = 0; t < T; t++)
                for (int64_t d = 0; d < D; d++) {
                    S past = t ? h[(t - 1) * D + d] : S(0);
                    S v = past >= threshold ? S(0) : past;
                    h[t * D + d] = v + (kv[(t * B + b) * D + d] - v) * decay;
                }
            for (int64_t d = 0; d < D; d++) gv[d] = 0;
            for (int64_t t = T - 1; t >= 0; t--) {
                const I *in = qkv + (t * B + b) * N * 3 * D, *gout = gy + (t * B + b) * N * D;
                I* gin = gqkv + (t * B + b) * N * 3 * D;
                const S *ht = h + t * D, *sum = kv + (t * B + b) * D;
                for (int64_t d = 0; d < D; d++) gmask[d] = 0;
                for (int64_t n = 0; n < N; n++) {
                    const I *pq = in + n * 3 * D, *pg = gout + n * D;
                    I* gq = gin + n * 3 * D;
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) {
                        S g = load(pg + d);
                        gmask[d] += g * S(load(pq + d));
                        store(gq + d, ht[d] >= threshold ? g : S(0));
                    }
                }
                for (int64_t d = 0; d < D; d++) {
                    S past = t ? h[(t - 1) * D + d] : S(0);
                    S v = past >= threshold ? S(0) : past;
                    S gh = gmask[d] * surrogate(ht[d] - threshold, alpha) + (ht[d] >= threshold ? S(0) : gv[d]);
                    decay_total += gh * (sum[d] - v);
                    gkv[d] = gh * decay;
                    gv[d] = gh - gkv[d];
                }
                for (int64_t n = 0; n < N; n++) {
                    const I *pk = in + n * 3 * D + D, *pv = pk + D;
                    I *gk = gin + n * 3 * D + D, *gvv = gk + D;
#pragma omp simd
                    for (int64_t d = 0; d < D; d++) {
                        store(gk + d, gkv[d] * S(load(pv + d)));
                        store(gvv + d, gkv[d] * S(load(pk + d)));
                    }
                }
            }
        }
    }
    decay_sum.add_to(g_decay, 0, 1);
}

}  // namespace

#define ENTRY_POINTS(NAME, I, S)                                                                                      \
    extern "C" void attend_##NAME(int64_t T, int64_t B, int64_t N, int64_t D, const I* qkv, S* kv, I* y,              \
                                  double decay, double threshold, int threads) {                                      \
        attend<I, S>(T, B, N, D, qkv, kv, y, S(decay), S(threshold), threads);                                        \
    }                                                                                                                 \
    extern "C" void attend_backward_##NAME(int64_t T, int64_t B, int64_t N, int64_t D, const I* qkv, const S* kv,     \
                                           const I* gy, I* gqkv, double decay, double threshold, double alpha,        \
                                           double* g_decay, int threads) {                                            \
        attend_backward<I, S>(T, B, N, D, qkv, kv, gy, gqkv, S(decay), S(threshold), S(alpha), g_decay, threads);     \
    }

ENTRY_POINTS(float32, float, float)
ENTRY_POINTS(float64, double, double)
ENTRY_POINTS(bfloat16, bf16, float)
