// Multi-step spiking neurons for CPUs, alone or after a per-channel affine map (BatchNorm). Compiled on first use by
// module/kernels/native.py, called through ctypes by module/kernels/cpu.py.
//
// Neuron: h[t] = v[t-1] + (x[t] - v[t-1]) * decay; s[t] = h[t] >= threshold; v[t] = s[t] ? 0 : h[t].
// Gradient: surrogate alpha * sig * (1 - sig) of alpha * (h - threshold); no gradient through the reset.
//
// Nothing but the input is kept for the backward pass: each block of elements walks through time again, in cache.

#include <cmath>

#include "layout.h"
#include "surrogate.h"

namespace {

// ---- neuron, with or without a per-channel affine map before it ------------------------------------------------

// x_step is the distance between two steps of the input: N, or 0 where all steps see the same input.
template <class I, class S, bool AFFINE>
void forward_block(const Layout& g, int64_t first, int64_t length, const I* x, int64_t x_step, const S* scale,
                   const S* shift, I* s, S decay, S threshold, S* v) {
    for (int64_t i = 0; i < length; i++) v[i] = 0;
    for (int64_t t = 0; t < g.T; t++) {
        const I* xt = x + t * x_step + first;
        I* st = s + t * g.N + first;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) {
            S in = load(xt + i);
            if (AFFINE) in = in * scale[i] + shift[i];
            S h = v[i] + (in - v[i]) * decay;
            bool fires = h >= threshold;
            store(st + i, fires ? S(1) : S(0));
            v[i] = fires ? S(0) : h;
        }
    }
}

template <class I, class S, bool AFFINE>
void forward(const Layout& g, const I* x, int64_t x_step, const S* scale, const S* shift, I* s, double decay,
             double threshold, int threads) {
    const int64_t L = block_length(g), blocks = (g.N + L - 1) / L;
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t(3 * L));
        S *v = buffer.data(), *sc = v + L, *sh = sc + L;
        bool filled = false;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = b * L, length = g.N - first < L ? g.N - first : L;
            if (AFFINE && (g.inner != 1 || !filled)) {
                spread(g, scale, first, g.inner == 1 ? L : length, sc);
                spread(g, shift, first, g.inner == 1 ? L : length, sh);
                filled = true;
            }
            forward_block<I, S, AFFINE>(g, first, length, x, x_step, sc, sh, s, S(decay), S(threshold), v);
        }
    }
}

// Gradient of the (normalised) input into gx, and, per element of the block, its sums over time: of the gradient
// (sum_g), of the gradient times the raw input (sum_gx); returns the decay's gradient.
//
// That is summed per element first (decay_sum), not by a reduction over the block: GCC 12 for SVE loses the sum of a
// "simd reduction" loop that it does not vectorise.
template <class I, class S, bool AFFINE>
double backward_block(const Layout& g, int64_t first, int64_t length, const I* x, int64_t x_step, const S* scale,
                      const S* shift, const S* center, const I* gs, I* gx, S decay, S threshold, S alpha, bool want_decay,
                      S* h, S* gv, S* total, S* decay_sum, S* sum_g, S* sum_gx) {
    for (int64_t i = 0; i < length; i++) gv[i] = total[i] = decay_sum[i] = 0;
    for (int64_t t = 0; t < g.T; t++) {
        const I* xt = x + t * x_step + first;
        const S* before = h + (t ? t - 1 : 0) * length;
        S* now = h + t * length;
#pragma omp simd
        for (int64_t i = 0; i < length; i++) {
            S in = load(xt + i);
            if (AFFINE) in = in * scale[i] + shift[i];
            S v = (t == 0 || before[i] >= threshold) ? S(0) : before[i];
            now[i] = v + (in - v) * decay;
        }
    }
    for (int64_t t = g.T - 1; t >= 0; t--) {
        const I *gst = gs + t * g.N + first, *xt = x + t * x_step + first;
        const S *ht = h + t * length, *before = h + (t ? t - 1 : 0) * length;
        I* gxt = gx + t * x_step + first;
        if (want_decay) {
#pragma omp simd
            for (int64_t i = 0; i < length; i++) {
                S in = load(xt + i);
                if (AFFINE) in = in * scale[i] + shift[i];
                S v = (t == 0 || before[i] >= threshold) ? S(0) : before[i];
                S gh = load(gst + i) * surrogate(ht[i] - threshold, alpha) + (ht[i] >= threshold ? S(0) : gv[i]);
                decay_sum[i] += gh * (in - v);
            }
        }
#pragma omp simd
        for (int64_t i = 0; i < length; i++) {
            S gh = load(gst + i) * surrogate(ht[i] - threshold, alpha) + (ht[i] >= threshold ? S(0) : gv[i]);
            S gin = gh * decay;
            gv[i] = gh - gin;
            total[i] += gin;
            if (x_step) store(gxt + i, gin);
            if (AFFINE) {
                sum_g[i] += gin;
                sum_gx[i] += gin * (S(load(xt + i)) - center[i]);
            }
        }
    }
    if (!x_step)
        for (int64_t i = 0; i < length; i++) store(gx + first + i, total[i]);
    double sum = 0;
    for (int64_t i = 0; want_decay && i < length; i++) sum += decay_sum[i];
    return sum;
}

template <class I, class S, bool AFFINE>
void backward(const Layout& g, const I* x, int64_t x_step, const S* scale, const S* shift, const S* center, const I* gs,
              I* gx, double decay, double threshold, double alpha, double* g_decay, double* sum_g, double* sum_gx,
              int threads) {
    const int64_t L = block_length(g), blocks = (g.N + L - 1) / L;
    const int64_t C = AFFINE ? g.C : 0;
    PerThread sums(2 * C + 1, threads);  // of the gradient, of the gradient times the input, of the decay's gradient
#pragma omp parallel num_threads(threads)
    {
        double* mine = sums.mine();
        std::vector<S> buffer(size_t((8 + g.T) * L));
        S *gv = buffer.data(), *total = gv + L, *decay_sum = total + L, *sc = decay_sum + L, *sh = sc + L, *ce = sh + L,
          *a = ce + L, *b = a + L, *h = b + L;
        bool filled = false;
        int64_t pending = 0, last = 0, last_length = 0;
        auto flush = [&] {
            gather(g, a, last, last_length, mine);
            gather(g, b, last, last_length, mine + C);
            for (int64_t i = 0; i < L; i++) a[i] = b[i] = 0;
            pending = last_length = 0;
        };
#pragma omp for schedule(static)
        for (int64_t k = 0; k < blocks; k++) {
            int64_t first = k * L, length = g.N - first < L ? g.N - first : L;
            if (AFFINE && (g.inner != 1 || !filled)) {
                spread(g, scale, first, g.inner == 1 ? L : length, sc);
                spread(g, shift, first, g.inner == 1 ? L : length, sh);
                spread(g, center, first, g.inner == 1 ? L : length, ce);
                filled = true;
            }
            mine[2 * C] += backward_block<I, S, AFFINE>(g, first, length, x, x_step, sc, sh, ce, gs, gx, S(decay),
                                                        S(threshold), S(alpha), g_decay != nullptr, h, gv, total,
                                                        decay_sum, a, b);
            if (AFFINE) {
                last = first;
                last_length = length > last_length ? length : last_length;
                // Short sums in the state's type, long ones in double.
                if (g.inner != 1 || ++pending == 32) flush();
            }
        }
        if (AFFINE && last_length) flush();
    }
    if (AFFINE) {
        sums.add_to(sum_g, 0, C);
        sums.add_to(sum_gx, C, C);
    }
    if (g_decay) sums.add_to(g_decay, 2 * C, 1);
}

}  // namespace

#define ENTRY_POINTS(NAME, I, S)                                                                                      \
    extern "C" void lif_forward_##NAME(int64_t T, int64_t N, const I* x, int64_t x_step, I* s, double decay,          \
                                       double threshold, int threads) {                                               \
        forward<I, S, false>({T, N, 1, 1}, x, x_step, nullptr, nullptr, s, decay, threshold, threads);                \
    }                                                                                                                 \
    extern "C" void lif_backward_##NAME(int64_t T, int64_t N, const I* x, int64_t x_step, const I* gs, I* gx,         \
                                        double decay, double threshold, double alpha, double* g_decay, int threads) { \
        backward<I, S, false>({T, N, 1, 1}, x, x_step, nullptr, nullptr, nullptr, gs, gx, decay, threshold, alpha,    \
                           g_decay, nullptr, nullptr, threads);                                                       \
    }                                                                                                                 \
    extern "C" void affine_lif_forward_##NAME(int64_t T, int64_t N, int64_t C, int64_t inner, const I* x,             \
                                              int64_t x_step, const S* scale, const S* shift, I* s, double decay,     \
                                              double threshold, int threads) {                                        \
        forward<I, S, true>({T, N, C, inner}, x, x_step, scale, shift, s, decay, threshold, threads);                 \
    }                                                                                                                 \
    extern "C" void affine_lif_backward_##NAME(int64_t T, int64_t N, int64_t C, int64_t inner, const I* x,            \
                                               int64_t x_step, const S* scale, const S* shift, const S* center,       \
                                               const I* gs, I* gx, double decay, double threshold, double alpha,      \
                                               double* g_decay, double* sum_g, double* sum_gx, int threads) {         \
        backward<I, S, true>({T, N, C, inner}, x, x_step, scale, shift, center, gs, gx, decay, threshold, alpha, g_decay,\
                          sum_g, sum_gx, threads);                                                                    \
    }

ENTRY_POINTS(float32, float, float)
ENTRY_POINTS(float64, double, double)
ENTRY_POINTS(bfloat16, bf16, float)
