// Max-pooling (3 x 3, stride 2, padding 1) for CPUs with channels innermost: [N, H, W, C] -> [N, (H+1)/2, (W+1)/2, C].
//
// Forward keeps which of the nine inputs won in one byte; backward gathers, so that every gradient is written once, by
// one thread, in a fixed order. Of equal inputs the first wins, and NaN wins over all, as in torch.

#include "layout.h"

namespace {

// The valid part of a window's three rows or columns around its centre 2 * at.
inline int64_t first_tap(int64_t at) { return at == 0 ? 1 : 0; }
inline int64_t end_tap(int64_t at, int64_t size) { return 2 * at + 1 < size ? 3 : 2; }

template <class I, class S>
void max_pool(int64_t N, int64_t H, int64_t W, int64_t C, const I* x, I* out, uint8_t* winner, int threads) {
    const int64_t h = (H + 1) / 2, w = (W + 1) / 2;
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t(2 * C));
        S *best = buffer.data(), *tap = best + C;  // taps in S: vectors of one width
#pragma omp for schedule(static)
        for (int64_t row = 0; row < N * h; row++) {
            const int64_t n = row / h, oy = row % h;
            for (int64_t ox = 0; ox < w; ox++) {
                bool first = true;
                for (int64_t ky = first_tap(oy); ky < end_tap(oy, H); ky++)
                    for (int64_t kx = first_tap(ox); kx < end_tap(ox, W); kx++) {
                        const I* in = x + ((n * H + 2 * oy - 1 + ky) * W + 2 * ox - 1 + kx) * C;
                        const S k = S(3 * ky + kx);
                        if (first) {
#pragma omp simd
                            for (int64_t c = 0; c < C; c++) best[c] = load(in + c), tap[c] = k;
                            first = false;
                            continue;
                        }
#pragma omp simd
                        for (int64_t c = 0; c < C; c++) {
                            const S v = load(in + c);
                            const bool wins = v > best[c] || v != v;
                            best[c] = wins ? v : best[c];
                            tap[c] = wins ? k : tap[c];
                        }
                    }
                const int64_t at = (row * w + ox) * C;
#pragma omp simd
                for (int64_t c = 0; c < C; c++) store(out + at + c, best[c]);
                if (winner) {
#pragma omp simd
                    for (int64_t c = 0; c < C; c++) winner[at + c] = uint8_t(tap[c]);
                }
            }
        }
    }
}

// An even row or column is the centre of one window; an odd one is the last of one window and the first of the next.
struct Windows {
    int64_t at[2], tap[2];
    int count;
    Windows(int64_t i, int64_t pooled) {
        at[0] = i / 2, tap[0] = i % 2 + 1;
        at[1] = i / 2 + 1, tap[1] = 0;
        count = i % 2 && at[1] < pooled ? 2 : 1;
    }
};

template <class I, class S>
void max_pool_backward(int64_t N, int64_t H, int64_t W, int64_t C, const I* g, const uint8_t* winner, I* gx,
                       int threads) {
    const int64_t h = (H + 1) / 2, w = (W + 1) / 2;
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> sum(static_cast<size_t>(C));
        S* total = sum.data();
#pragma omp for schedule(static)
        for (int64_t row = 0; row < N * H; row++) {
            const int64_t n = row / H;
            const Windows ys(row % H, h);
            for (int64_t x = 0; x < W; x++) {
                const Windows xs(x, w);
                for (int64_t c = 0; c < C; c++) total[c] = 0;
                for (int i = 0; i < ys.count; i++)
                    for (int j = 0; j < xs.count; j++) {
                        const int64_t from = ((n * h + ys.at[i]) * w + xs.at[j]) * C;
                        const int k = int(3 * ys.tap[i] + xs.tap[j]);
                        const I* gw = g + from;
                        const uint8_t* which = winner + from;
#pragma omp simd
                        for (int64_t c = 0; c < C; c++) total[c] += which[c] == k ? S(load(gw + c)) : S(0);
                    }
                I* to = gx + (row * W + x) * C;
#pragma omp simd
                for (int64_t c = 0; c < C; c++) store(to + c, total[c]);
            }
        }
    }
}

}  // namespace

#define ENTRY_POINTS(NAME, I, S)                                                                                      \
    extern "C" void max_pool_##NAME(int64_t N, int64_t H, int64_t W, int64_t C, const I* x, I* out, uint8_t* winner,  \
                                    int threads) {                                                                    \
        max_pool<I, S>(N, H, W, C, x, out, winner, threads);                                                          \
    }                                                                                                                 \
    extern "C" void max_pool_backward_##NAME(int64_t N, int64_t H, int64_t W, int64_t C, const I* g,                  \
                                             const uint8_t* winner, I* gx, int threads) {                             \
        max_pool_backward<I, S>(N, H, W, C, g, winner, gx, threads);                                                  \
    }

ENTRY_POINTS(float32, float, float)
ENTRY_POINTS(float64, double, double)
ENTRY_POINTS(bfloat16, bf16, float)
