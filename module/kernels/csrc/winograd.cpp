// Winograd's convolution F(4 x 4, 3 x 3) for CPUs: what turns tiles into, and back from, the 36 matrix products that
// replace a 3 x 3 convolution (stride 1, padding 1) at a quarter of its multiplications. Channels innermost.
//
// The interpolation points are 0, +-2/3, +-4/3 and infinity: with them float32 rounds a quarter as much as with the
// usual 0, +-1, +-2. Legend: N images, H x W feature map, C channels, tiles of 4 x 4 pixels in the order N, H, W.

#include "layout.h"

namespace {

constexpr float P = 2.0f / 3.0f, Q = 4.0f / 3.0f, PP = P * P, QQ = Q * Q;
constexpr int LANES = 16;  // channels taken at once

struct Tiles {
    int64_t N, H, W, C, rows, columns;
    Tiles(int64_t N, int64_t H, int64_t W, int64_t C)
        : N(N), H(H), W(W), C(C), rows((H + 3) / 4), columns((W + 3) / 4) {}
};

// One dimension of the input's transform: six values, `step` floats apart, for LANES channels.
inline void transform(const float* d, int64_t step, float* t, int64_t to) {
    for (int l = 0; l < LANES; l++) {
        const float d0 = d[l], d1 = d[step + l], d2 = d[2 * step + l], d3 = d[3 * step + l], d4 = d[4 * step + l],
                    d5 = d[5 * step + l];
        const float even_p = d4 - QQ * d2, odd_p = P * (d3 - QQ * d1);
        const float even_q = d4 - PP * d2, odd_q = Q * (d3 - PP * d1);
        t[l] = PP * QQ * d0 - (PP + QQ) * d2 + d4;
        t[to + l] = even_p + odd_p;
        t[2 * to + l] = even_p - odd_p;
        t[3 * to + l] = even_q + odd_q;
        t[4 * to + l] = even_q - odd_q;
        t[5 * to + l] = PP * QQ * d1 - (PP + QQ) * d3 + d5;
    }
}

// One dimension of the result's transform: six products give four values.
inline void transform_back(const float* y, int64_t step, float* out, int64_t to) {
    for (int l = 0; l < LANES; l++) {
        const float y0 = y[l], y5 = y[5 * step + l];
        const float sum_p = y[step + l] + y[2 * step + l], difference_p = P * (y[step + l] - y[2 * step + l]);
        const float sum_q = y[3 * step + l] + y[4 * step + l], difference_q = Q * (y[3 * step + l] - y[4 * step + l]);
        out[l] = y0 + sum_p + sum_q;
        out[to + l] = difference_p + difference_q;
        out[2 * to + l] = PP * sum_p + QQ * sum_q;
        out[3 * to + l] = PP * difference_p + QQ * difference_q + y5;
    }
}

// The adjoint of transform_back: four values give six.
inline void transform_gradient(const float* g, int64_t step, float* t, int64_t to) {
    for (int l = 0; l < LANES; l++) {
        const float g0 = g[l], g1 = g[step + l], g2 = g[2 * step + l], g3 = g[3 * step + l];
        const float even_p = g0 + PP * g2, odd_p = P * (g1 + PP * g3);
        const float even_q = g0 + QQ * g2, odd_q = Q * (g1 + QQ * g3);
        t[l] = g0;
        t[to + l] = even_p + odd_p;
        t[2 * to + l] = even_p - odd_p;
        t[3 * to + l] = even_q + odd_q;
        t[4 * to + l] = even_q - odd_q;
        t[5 * to + l] = g3;
    }
}

// SIDE 6: a tile with the pixel around it, transformed as input; SIDE 4: a tile of gradients.
template <int SIDE>
void to_tiles(const Tiles& s, const float* x, int64_t first, int64_t count, float* V, int threads) {
    constexpr int64_t halo = SIDE == 6 ? 1 : 0;
    constexpr auto one = SIDE == 6 ? transform : transform_gradient;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < count; tile++) {
        const int64_t at = first + tile, n = at / (s.rows * s.columns);
        const int64_t y0 = at / s.columns % s.rows * 4 - halo, x0 = at % s.columns * 4 - halo;
        for (int64_t c = 0; c < s.C; c += LANES) {
            const int64_t lanes = s.C - c < LANES ? s.C - c : LANES;
            float d[SIDE * SIDE * LANES], half[6 * SIDE * LANES], t[36 * LANES];
            for (int64_t i = 0; i < SIDE * SIDE; i++) {
                const int64_t y = y0 + i / SIDE, xx = x0 + i % SIDE;
                const bool inside = y >= 0 && y < s.H && xx >= 0 && xx < s.W;
                const float* from = x + ((n * s.H + y) * s.W + xx) * s.C + c;
                if (inside && lanes == LANES) {
                    std::memcpy(d + i * LANES, from, LANES * sizeof(float));
                } else {
                    for (int64_t l = 0; l < LANES; l++) d[i * LANES + l] = inside && l < lanes ? from[l] : 0.0f;
                }
            }
            for (int64_t i = 0; i < SIDE; i++) one(d + i * LANES, SIDE * LANES, half + i * LANES, SIDE * LANES);
            for (int64_t i = 0; i < 6; i++) one(half + SIDE * i * LANES, LANES, t + 6 * i * LANES, LANES);
            for (int64_t i = 0; i < 36; i++)
                std::memcpy(V + (i * count + tile) * s.C + c, t + i * LANES, size_t(lanes) * sizeof(float));
        }
    }
}

void from_tiles(const Tiles& s, const float* Y, int64_t first, int64_t count, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t tile = 0; tile < count; tile++) {
        const int64_t at = first + tile, n = at / (s.rows * s.columns);
        const int64_t y0 = at / s.columns % s.rows * 4, x0 = at % s.columns * 4;
        for (int64_t c = 0; c < s.C; c += LANES) {
            const int64_t lanes = s.C - c < LANES ? s.C - c : LANES;
            float y[36 * LANES] = {}, half[24 * LANES], result[16 * LANES];
            for (int64_t i = 0; i < 36; i++)
                std::memcpy(y + i * LANES, Y + (i * count + tile) * s.C + c, size_t(lanes) * sizeof(float));
            for (int64_t i = 0; i < 6; i++) transform_back(y + i * LANES, 6 * LANES, half + i * LANES, 6 * LANES);
            for (int64_t i = 0; i < 4; i++) transform_back(half + 6 * i * LANES, LANES, result + 4 * i * LANES, LANES);
            for (int64_t i = 0; i < 4 && y0 + i < s.H; i++)
                for (int64_t j = 0; j < 4 && x0 + j < s.W; j++)
                    std::memcpy(out + ((n * s.H + y0 + i) * s.W + x0 + j) * s.C + c, result + (4 * i + j) * LANES,
                                size_t(lanes) * sizeof(float));
        }
    }
}

}  // namespace

// Tiles first .. first + count of x [N, H, W, C] (with the pixel around each) -> V [36, count, C].
extern "C" void winograd_to_tiles_float32(int64_t N, int64_t H, int64_t W, int64_t C, const float* x, int64_t first,
                                          int64_t count, float* V, int threads) {
    to_tiles<6>(Tiles(N, H, W, C), x, first, count, V, threads);
}

// The same tiles of gradients g [N, H, W, C] (without what is around them) -> V [36, count, C].
extern "C" void winograd_gradient_to_tiles_float32(int64_t N, int64_t H, int64_t W, int64_t C, const float* g,
                                                   int64_t first, int64_t count, float* V, int threads) {
    to_tiles<4>(Tiles(N, H, W, C), g, first, count, V, threads);
}

// Products Y [36, count, C] -> those tiles of out [N, H, W, C].
extern "C" void winograd_from_tiles_float32(int64_t N, int64_t H, int64_t W, int64_t C, const float* Y, int64_t first,
                                            int64_t count, float* out, int threads) {
    from_tiles(Tiles(N, H, W, C), Y, first, count, out, threads);
}
