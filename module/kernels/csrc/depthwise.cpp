// Depthwise k x k convolution that keeps the size of the map, and the gradient of its weight; channels innermost.
//
// The input is copied once, some channels at a time, with a border around it: zeros, or (RepConv) a normalised input
// with a border value of its own for each channel. So the sums know no edges.
//
// Legend: N images, H x W feature map, C channels, K x K taps, I the type in memory, S the type that is computed in.

#include "layout.h"

namespace {

constexpr int LANES = 16;  // channels taken at once
constexpr int ACROSS = 4;  // pixels of a row taken at once
constexpr int HALF = 8;    // channels whose sums over all taps of a row fit the registers

struct Maps {
    int64_t N, H, W, C;
};

// What the input goes through on its way in; all null: nothing, and zeros around it.
template <class S> struct Affine {
    const S *scale, *shift, *border;
};

inline int64_t wide(const Maps& m, int K) { return (m.W + ACROSS - 1) / ACROSS * ACROSS + K - 1; }

// Image n, channels c to c + LANES, with its border -> room [H + K - 1, wide, LANES].
template <int K, class I, class S>
void fill(const Maps& m, const I* x, const Affine<S>& affine, int64_t n, int64_t c, S* room) {
    const int64_t row = wide(m, K), lanes = std::min<int64_t>(m.C - c, LANES);
    S scale[LANES] = {}, shift[LANES] = {}, border[LANES] = {};
    for (int64_t l = 0; l < lanes; l++) {
        scale[l] = affine.scale ? affine.scale[c + l] : S(1);
        if (affine.shift) shift[l] = affine.shift[c + l];
        if (affine.border) border[l] = affine.border[c + l];
    }
    for (int64_t y = 0; y < m.H + K - 1; y++) {
        const int64_t from = y - K / 2;
        for (int64_t i = 0; i < row; i++) {
            const int64_t at = i - K / 2;
            S* to = room + (y * row + i) * LANES;
            if (from < 0 || from >= m.H || at < 0 || at >= m.W) {
                std::memcpy(to, border, sizeof border);
                continue;
            }
            const I* pixel = x + ((n * m.H + from) * m.W + at) * m.C + c;
            if (lanes == LANES) {
#pragma omp simd
                for (int l = 0; l < LANES; l++) to[l] = S(load(pixel + l)) * scale[l] + shift[l];
            } else {
                for (int l = 0; l < LANES; l++) to[l] = l < lanes ? S(load(pixel + l)) * scale[l] + shift[l] : S(0);
            }
        }
    }
}

// out = sum over taps of the input there times weight [K * K, C].
template <int K, class I, class S>
void convolve(const Maps& m, const I* x, const Affine<S>& affine, const S* weight, I* out, int threads) {
    const int64_t blocks = (m.C + LANES - 1) / LANES, row = wide(m, K);
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t((m.H + K - 1) * row * LANES));
        S *room = buffer.data(), taps[K * K * LANES];
#pragma omp for schedule(static)
        for (int64_t item = 0; item < m.N * blocks; item++) {
            const int64_t n = item / blocks, c = item % blocks * LANES, lanes = std::min<int64_t>(m.C - c, LANES);
            fill<K>(m, x, affine, n, c, room);
            for (int t = 0; t < K * K; t++)
                for (int l = 0; l < LANES; l++) taps[t * LANES + l] = l < lanes ? weight[t * m.C + c + l] : S(0);
            for (int64_t y = 0; y < m.H; y++) {
                for (int64_t left = 0; left < m.W; left += ACROSS) {
                    S sums[ACROSS * LANES] = {};
                    for (int i = 0; i < K; i++) {
                        const S* from = room + ((y + i) * row + left) * LANES;
                        for (int j = 0; j < K; j++) {
                            const S* tap = taps + (i * K + j) * LANES;
#pragma GCC unroll 4
                            for (int p = 0; p < ACROSS; p++)
#pragma omp simd
                                for (int l = 0; l < LANES; l++)
                                    sums[p * LANES + l] += from[(j + p) * LANES + l] * tap[l];
                        }
                    }
                    I* to = out + ((n * m.H + y) * m.W + left) * m.C + c;
                    for (int64_t p = 0; p < ACROSS && left + p < m.W; p++)
                        for (int64_t l = 0; l < lanes; l++) store(to + p * m.C + l, sums[p * LANES + l]);
                }
            }
        }
    }
}

// sums [K * K, C] += over all pixels, the gradient g of the result times the input at each tap.
template <int K, class I, class S>
void weight_gradient(const Maps& m, const I* x, const Affine<S>& affine, const I* g, double* sums, int threads) {
    const int64_t blocks = (m.C + LANES - 1) / LANES, row = wide(m, K);
    PerThread parts(K * K * m.C, threads);
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t(((m.H + K - 1) * row + m.W) * LANES));
        S *room = buffer.data(), *gradient = room + (m.H + K - 1) * row * LANES;
        double* mine = parts.mine();
#pragma omp for schedule(static)
        for (int64_t item = 0; item < m.N * blocks; item++) {
            const int64_t n = item / blocks, c = item % blocks * LANES, lanes = std::min<int64_t>(m.C - c, LANES);
            fill<K>(m, x, affine, n, c, room);
            S total[K * K * LANES] = {};
            for (int64_t y = 0; y < m.H; y++) {
                const I* from = g + (n * m.H + y) * m.W * m.C + c;
                for (int64_t i = 0; i < m.W; i++)
                    for (int l = 0; l < LANES; l++) gradient[i * LANES + l] = l < lanes ? load(from + i * m.C + l) : S(0);
                for (int i = 0; i < K; i++) {
                    const S* line = room + (y + i) * row * LANES;
                    for (int half = 0; half < LANES; half += HALF) {
                        S line_sums[K * HALF] = {};
                        for (int64_t left = 0; left < m.W; left++) {
                            const S *gs = gradient + left * LANES + half, *xs = line + left * LANES + half;
#pragma GCC unroll 7
                            for (int j = 0; j < K; j++)
#pragma omp simd
                                for (int l = 0; l < HALF; l++) line_sums[j * HALF + l] += gs[l] * xs[j * LANES + l];
                        }
                        for (int j = 0; j < K; j++)
                            for (int l = 0; l < HALF; l++)
                                total[(i * K + j) * LANES + half + l] += line_sums[j * HALF + l];
                    }
                }
            }
            for (int t = 0; t < K * K; t++)
                for (int64_t l = 0; l < lanes; l++) mine[t * m.C + c + l] += total[t * LANES + l];
        }
    }
    parts.add_to(sums, 0, K * K * m.C);
}

}  // namespace

// K is 3 or 7; scale, shift and border are all null or all [C].
#define ENTRY_POINTS(NAME, I, S)                                                                                       \
    extern "C" void depthwise_##NAME(int64_t N, int64_t H, int64_t W, int64_t C, int64_t K, const I* x, const S* scale, \
                                     const S* shift, const S* border, const S* weight, I* out, int threads) {          \
        auto run = K == 3 ? convolve<3, I, S> : convolve<7, I, S>;                                                     \
        run({N, H, W, C}, x, {scale, shift, border}, weight, out, threads);                                            \
    }                                                                                                                  \
    extern "C" void depthwise_weight_gradient_##NAME(int64_t N, int64_t H, int64_t W, int64_t C, int64_t K,            \
                                                     const I* x, const S* scale, const S* shift, const S* border,      \
                                                     const I* g, double* sums, int threads) {                          \
        auto run = K == 3 ? weight_gradient<3, I, S> : weight_gradient<7, I, S>;                                       \
        run({N, H, W, C}, x, {scale, shift, border}, g, sums, threads);                                                \
    }

ENTRY_POINTS(float32, float, float)
ENTRY_POINTS(float64, double, double)
ENTRY_POINTS(bfloat16, bf16, float)
