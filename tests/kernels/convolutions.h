// The checks of convolutions, and of spikes as bits, which are what a convolution of spikes keeps.
//
// Legend: N images, H x W feature map, C channels, O output channels, K x K taps; I the type in memory, S the type that
// is computed in.
#pragma once

#include "common.h"

namespace {

extern "C" {
void winograd_to_tiles_float32(i64, i64, i64, i64, const float*, i64, i64, float*, int);
void winograd_gradient_to_tiles_float32(i64, i64, i64, i64, const float*, i64, i64, float*, int);
void winograd_from_tiles_float32(i64, i64, i64, i64, const float*, i64, i64, float*, int);
}

// The transform of gradients is the adjoint of the way back from tiles: <back(Y), g> = <Y, transform(g)> per channel.
void check_adjoint(i64 N, i64 H, i64 W, i64 C, int threads) {
    const i64 tiles = N * ((H + 3) / 4) * ((W + 3) / 4);
    const auto Y = eighths<float>(36 * tiles * C, 16), g = eighths<float>(N * H * W * C, 16);
    std::vector<float> back(g.size()), transformed(Y.size()), left(static_cast<size_t>(C));
    std::vector<double> right(static_cast<size_t>(C)), sums(static_cast<size_t>(C));
    winograd_from_tiles_float32(N, H, W, C, Y.data(), 0, tiles, back.data(), threads);
    winograd_gradient_to_tiles_float32(N, H, W, C, g.data(), 0, tiles, transformed.data(), threads);
    for (size_t i = 0; i < g.size(); i++) sums[i % size_t(C)] += double(back[i]) * double(g[i]);
    for (size_t i = 0; i < Y.size(); i++) right[i % size_t(C)] += double(Y[i]) * double(transformed[i]);
    for (size_t c = 0; c < left.size(); c++) left[c] = float(sums[c]);
    compare("winograd gradient", left, right, 1e-5);
}

// A 3 x 3 convolution through both transforms, in two portions of tiles, with the products between them made here. The
// transform of the weights is Toom and Cook's for the points 0, 2/3, -2/3, 4/3, -4/3 and infinity: row j has the powers
// of its point over the product of its distances to the other finite ones.
void check_winograd(i64 N, i64 H, i64 W, i64 C, i64 O, int threads) {
    const double points[5] = {0, 2.0 / 3, -2.0 / 3, 4.0 / 3, -4.0 / 3};
    double G[6][3] = {};
    for (int j = 0; j < 5; j++) {
        double distances = 1;
        for (int k = 0; k < 5; k++) distances *= k == j ? 1 : points[j] - points[k];
        for (int power = 0; power < 3; power++) G[j][power] = std::pow(points[j], power) / distances;
    }
    G[5][2] = 1;
    const auto x = eighths<float>(N * H * W * C, 16), weight = eighths<float>(O * C * 9, 16);
    const i64 tiles = N * ((H + 3) / 4) * ((W + 3) / 4), portion = (tiles + 1) / 2;
    std::vector<float> out(size_t(N * H * W * O));
    for (i64 first = 0; first < tiles; first += portion) {
        const i64 count = std::min(portion, tiles - first);
        std::vector<float> V(size_t(36 * count * C)), Y(size_t(36 * count * O));
        winograd_to_tiles_float32(N, H, W, C, x.data(), first, count, V.data(), threads);
        for (i64 i = 0; i < 36 * count * O; i++) {
            const i64 o = i % O, r = i / O / count / 6, s = i / O / count % 6;
            double sum = 0;
            for (i64 c = 0; c < C; c++)
                for (int t = 0; t < 9; t++)
                    sum += G[r][t / 3] * G[s][t % 3] * weight[size_t((o * C + c) * 9 + t)] * V[size_t(i / O * C + c)];
            Y[size_t(i)] = float(sum);
        }
        winograd_from_tiles_float32(N, H, W, O, Y.data(), first, count, out.data(), threads);
    }
    std::vector<double> expected(out.size());
    for (i64 i = 0; i < N * H * W * O; i++)
        for (int t = 0; t < 9; t++) {
            const i64 n = i / O / W / H, y = i / O / W % H + t / 3 - 1, u = i / O % W + t % 3 - 1;
            if (y < 0 || y >= H || u < 0 || u >= W) continue;
            const float *w = weight.data() + (i % O * C * 9 + t), *in = x.data() + ((n * H + y) * W + u) * C;
            for (i64 c = 0; c < C; c++) expected[size_t(i)] += w[9 * c] * in[c];
        }
    compare("winograd", out, expected, 1e-5);
    check_adjoint(N, H, W, O, threads);
}

template <class I> struct Convolutions;
#define CONVOLUTIONS(NAME, I, S, TOLERANCE)                                                                           \
    extern "C" {                                                                                                      \
    void depthwise_##NAME(i64, i64, i64, i64, i64, const I*, const S*, const S*, const S*, const S*, I*, int);        \
    void depthwise_weight_gradient_##NAME(i64, i64, i64, i64, i64, const I*, const S*, const S*, const S*, const I*,  \
                                          double*, int);                                                              \
    void pack_bits_##NAME(i64, const I*, uint8_t*, int);                                                              \
    void unpack_bits_##NAME(i64, const uint8_t*, I*, int);                                                            \
    }                                                                                                                 \
    template <> struct Convolutions<I> {                                                                              \
        using State = S;                                                                                              \
        static constexpr double tolerance = TOLERANCE;                                                                \
        static constexpr auto depthwise = depthwise_##NAME;                                                           \
        static constexpr auto depthwise_weight_gradient = depthwise_weight_gradient_##NAME;                           \
        static constexpr auto pack_bits = pack_bits_##NAME;                                                           \
        static constexpr auto unpack_bits = unpack_bits_##NAME;                                                       \
    };
// Of the largest value: sums of these inputs have no rounding, but 16 bits hold the results with 8 binary digits.
CONVOLUTIONS(float32, float, float, 0)
CONVOLUTIONS(float64, double, double, 0)
CONVOLUTIONS(bfloat16, bf16, float, 1.0 / 256)

// With `affine`: of the input times scale plus shift, with a border of its own for each channel; else of the input, with
// zeros around it.
template <class I> void check_depthwise(i64 N, i64 H, i64 W, i64 C, i64 K, bool affine, int threads) {
    using F = Convolutions<I>;
    using S = typename F::State;
    const auto x = eighths<I>(N * H * W * C, 16), g = eighths<I>(N * H * W * C, 16);
    const auto scale = eighths<S>(C, 8), shift = eighths<S>(C, 8), border = eighths<S>(C, 8);
    const auto weight = eighths<S>(K * K * C, 8);
    std::vector<I> out(x.size());
    auto expected = zeros(N * H * W * C), sums = zeros(K * K * C), wanted = zeros(K * K * C);
    for (i64 i = 0; i < N * H * W * C; i++) {
        const i64 c = i % C, column = i / C % W, row = i / C / W % H, n = i / C / W / H;
        for (i64 t = 0; t < K * K; t++) {
            const i64 y = row + t / K - K / 2, u = column + t % K - K / 2;
            const bool inside = y >= 0 && y < H && u >= 0 && u < W;
            double v = inside ? value(x[size_t(((n * H + y) * W + u) * C + c)]) : 0;
            if (affine) v = inside ? v * value(scale[size_t(c)]) + value(shift[size_t(c)]) : value(border[size_t(c)]);
            expected[size_t(i)] += v * value(weight[size_t(t * C + c)]);
            wanted[size_t(t * C + c)] += v * value(g[size_t(i)]);
        }
    }
    const S *a = affine ? scale.data() : nullptr, *b = affine ? shift.data() : nullptr,
            *e = affine ? border.data() : nullptr;
    F::depthwise(N, H, W, C, K, x.data(), a, b, e, weight.data(), out.data(), threads);
    compare("depthwise", out, expected, F::tolerance);
    F::depthwise_weight_gradient(N, H, W, C, K, x.data(), a, b, e, g.data(), sums.data(), threads);
    compare("depthwise_weight_gradient", sums, wanted);
}

template <class I> void check_bits(i64 n, int threads) {
    using F = Convolutions<I>;
    auto x = spikes<I>(n, 0.4), back = spikes<I>(n, 0.5);
    std::vector<uint8_t> bits(size_t((n + 7) / 8)), expected(bits.size());
    for (i64 i = 0; i < n; i++) expected[size_t(i / 8)] |= uint8_t((value(x[size_t(i)]) != 0) << i % 8);
    F::pack_bits(n, x.data(), bits.data(), threads);
    compare("pack_bits", std::vector<float>(bits.begin(), bits.end()), std::vector<float>(expected.begin(), expected.end()));
    F::unpack_bits(n, bits.data(), back.data(), threads);
    compare("unpack_bits", back, x);
}

}  // namespace
