// The C++ kernels against loops written from their definitions, without Python: for sanitizers, and for CPUs
// that are only emulated. tests/test_kernels_alone.py compiles and runs this.
//
// Legend: T time steps, N elements of a step or tokens, B batch, C channels, D channels of the attention; I the type in
// memory, S the type that is computed in.
#include "convolutions.h"

namespace {

template <class I> struct Kernels;
#define KERNELS(NAME, I, S, TOLERANCE)                                                                                \
    extern "C" {                                                                                                      \
    void lif_forward_##NAME(i64, i64, const I*, i64, I*, double, double, int);                                        \
    void lif_backward_##NAME(i64, i64, const I*, i64, const I*, I*, double, double, double, double*, int);            \
    void affine_lif_forward_##NAME(i64, i64, i64, i64, const I*, i64, const S*, const S*, I*, double, double, int);   \
    void affine_lif_backward_##NAME(i64, i64, i64, i64, const I*, i64, const S*, const S*, const S*, const I*, I*,    \
                                    double, double, double, double*, double*, double*, int);                          \
    void statistics_##NAME(i64, i64, i64, const I*, double*, double*, int);                                           \
    void affine_##NAME(i64, i64, i64, const I*, const S*, const S*, const I*, I*, int);                               \
    void gradient_sums_##NAME(i64, i64, i64, const I*, const I*, const S*, double*, double*, int);                    \
    void gradient_apply_##NAME(i64, i64, i64, const I*, const I*, const S*, const S*, const S*, const S*, I*, int);   \
    void attend_##NAME(i64, i64, i64, i64, const I*, S*, I*, double, double, int);                                    \
    void attend_backward_##NAME(i64, i64, i64, i64, const I*, const S*, const I*, I*, double, double, double,         \
                                double*, int);                                                                        \
    void max_pool_##NAME(i64, i64, i64, i64, const I*, I*, uint8_t*, int);                                            \
    void max_pool_backward_##NAME(i64, i64, i64, i64, const I*, const uint8_t*, I*, int);                             \
    }                                                                                                                 \
    template <> struct Kernels<I> {                                                                                   \
        using State = S;                                                                                              \
        static constexpr double tolerance = TOLERANCE;                                                                \
        static constexpr auto lif_forward = lif_forward_##NAME;                                                       \
        static constexpr auto lif_backward = lif_backward_##NAME;                                                     \
        static constexpr auto affine_lif_forward = affine_lif_forward_##NAME;                                         \
        static constexpr auto affine_lif_backward = affine_lif_backward_##NAME;                                       \
        static constexpr auto statistics = statistics_##NAME;                                                         \
        static constexpr auto affine = affine_##NAME;                                                                 \
        static constexpr auto gradient_sums = gradient_sums_##NAME;                                                   \
        static constexpr auto gradient_apply = gradient_apply_##NAME;                                                 \
        static constexpr auto attend = attend_##NAME;                                                                 \
        static constexpr auto attend_backward = attend_backward_##NAME;                                               \
        static constexpr auto max_pool = max_pool_##NAME;                                                             \
        static constexpr auto max_pool_backward = max_pool_backward_##NAME;                                           \
    };
// Roundings of the type that is stored, relative to the largest value.
KERNELS(float32, float, float, 1e-5)
KERNELS(float64, double, double, 1e-13)
KERNELS(bfloat16, bf16, float, 1e-2)

constexpr double DECAY = 0.5, THRESHOLD = 1.0, ALPHA = 4.0;

void compare_sums(const char* what, const std::vector<double>& actual, const std::vector<Sum>& expected,
                  double tolerance) {
    std::vector<double> values;
    double size = 0;
    for (const Sum& sum : expected) {
        values.push_back(sum.value);
        size = std::fmax(size, sum.size);
    }
    compare(what, actual, values, tolerance, size);
}

// Elements of a step lie as [rows, C, inner]; `moving`: another input at each step.
template <class I> void check_neurons(i64 T, i64 rows, i64 C, i64 inner, bool moving, int threads) {
    using K = Kernels<I>;
    using S = typename K::State;
    const i64 N = rows * C * inner, given = moving ? T : 1;
    const auto x = eighths<I>(given * N, 24), g = eighths<I>(T * N, 16);
    const auto scale = eighths<S>(C, 12), shift = eighths<S>(C, 8), center = eighths<S>(C, 8);
    for (int affine = 0; affine < 2; affine++) {
        std::vector<I> fired(size_t(T * N)), expected(size_t(T * N)), gx(x.size());
        std::vector<double> wanted(x.size());
        auto decay_gradient = zeros(1), sum_g = zeros(C), sum_gx = zeros(C);
        std::vector<Sum> sums(sum_g.size()), sums_x(sum_g.size());
        Sum wanted_decay;
        for (i64 i = 0; i < N; i++) {
            const size_t c = size_t(i / inner % C);
            std::vector<double> current, gradient;
            for (i64 t = 0; t < T; t++) {
                const double v = value(x[size_t((moving ? t * N : 0) + i)]);
                current.push_back(affine ? v * value(scale[c]) + value(shift[c]) : v);
                gradient.push_back(value(g[size_t(t * N + i)]));
            }
            const Neuron neuron(current, DECAY, THRESHOLD);
            const auto back = neuron.backward(current, gradient, DECAY, THRESHOLD, ALPHA, wanted_decay);
            for (i64 t = 0; t < T; t++) {
                const size_t at = size_t((moving ? t * N : 0) + i);
                expected[size_t(t * N + i)] = make<I>(neuron.spike[size_t(t)]);
                wanted[at] += back[size_t(t)];
                sums[c].add(back[size_t(t)]);
                sums_x[c].add(back[size_t(t)] * (value(x[at]) - value(center[c])));
            }
        }
        const i64 step = moving ? N : 0;
        if (affine) {
            K::affine_lif_forward(T, N, C, inner, x.data(), step, scale.data(), shift.data(), fired.data(), DECAY,
                                  THRESHOLD, threads);
            K::affine_lif_backward(T, N, C, inner, x.data(), step, scale.data(), shift.data(), center.data(), g.data(),
                                   gx.data(), DECAY, THRESHOLD, ALPHA, decay_gradient.data(), sum_g.data(),
                                   sum_gx.data(), threads);
            const double tolerance = std::fmin(K::tolerance, 1e-4);  // summed before rounding to 16 bits
            compare_sums("sums of affine_lif_backward", sum_g, sums, tolerance);
            compare_sums("sums with x of affine_lif_backward", sum_gx, sums_x, tolerance);
        } else {
            K::lif_forward(T, N, x.data(), step, fired.data(), DECAY, THRESHOLD, threads);
            K::lif_backward(T, N, x.data(), step, g.data(), gx.data(), DECAY, THRESHOLD, ALPHA, decay_gradient.data(),
                            threads);
        }
        compare(affine ? "affine_lif_forward" : "lif_forward", fired, expected);
        compare(affine ? "affine_lif_backward" : "lif_backward", gx, wanted, K::tolerance);
        compare_sums("gradient of the decay", decay_gradient, {wanted_decay}, std::fmin(K::tolerance, 1e-4));
    }
}

template <class I> void check_batchnorm(i64 rows, i64 C, i64 inner, int threads) {
    using K = Kernels<I>;
    using S = typename K::State;
    const i64 N = rows * C * inner;
    const auto x = eighths<I>(N, 24), other = eighths<I>(N, 16);
    const auto a = eighths<S>(C, 8), b = eighths<S>(C, 8), c = eighths<S>(C, 8), d = eighths<S>(C, 8);
    auto mean = zeros(C), m2 = zeros(C), sum = zeros(C), sum_x = zeros(C);
    auto wanted_mean = zeros(C), wanted_m2 = zeros(C), wanted_sum = zeros(C), wanted_x = zeros(C);
    std::vector<I> out(x.size()), added, plain, applied;
    for (i64 i = 0; i < N; i++) wanted_mean[size_t(i / inner % C)] += value(x[size_t(i)]) / double(rows * inner);
    for (i64 i = 0; i < N; i++) {
        const size_t at = size_t(i), ch = size_t(i / inner % C);
        const double v = value(x[at]), g = value(other[at]), away = v - value(c[ch]);
        wanted_m2[ch] += (v - wanted_mean[ch]) * (v - wanted_mean[ch]);
        wanted_sum[ch] += g;
        wanted_x[ch] += g * away;
        plain.push_back(make<I>(v * value(a[ch]) + value(b[ch])));
        added.push_back(make<I>(v * value(a[ch]) + value(b[ch]) + g));
        applied.push_back(make<I>(value(a[ch]) * g + value(b[ch]) * away + value(d[ch])));
    }
    const double tolerance = std::fmin(K::tolerance, 1e-5);  // in float even for 16-bit input
    K::statistics(rows, C, inner, x.data(), mean.data(), m2.data(), threads);
    compare("means of statistics", mean, wanted_mean, tolerance);
    compare("squared deviations of statistics", m2, wanted_m2, tolerance);
    K::affine(N, C, inner, x.data(), a.data(), b.data(), nullptr, out.data(), threads);
    compare("affine", out, plain);
    K::affine(N, C, inner, x.data(), a.data(), b.data(), other.data(), out.data(), threads);
    compare("affine with shortcut", out, added);
    K::gradient_sums(N, C, inner, x.data(), other.data(), c.data(), sum.data(), sum_x.data(), threads);
    compare("gradient_sums", sum, wanted_sum);
    compare("gradient_sums with x", sum_x, wanted_x);
    K::gradient_apply(N, C, inner, x.data(), other.data(), c.data(), a.data(), b.data(), d.data(), out.data(), threads);
    compare("gradient_apply", out, applied);
}

template <class I> void check_attention(i64 T, i64 B, i64 N, i64 D, double rate, int threads) {
    using K = Kernels<I>;
    const i64 rows = T * B * N;
    auto q = spikes<float>(rows * D, 0.6), masked = q;
    const auto k = spikes<float>(rows * D, rate), v = spikes<float>(rows * D, rate);
    const auto gy = eighths<I>(rows * D, 16);
    const std::vector<double> sums = mask(masked, k, v, T, B, N, D);
    std::vector<I> qkv(size_t(rows * 3 * D)), y(size_t(rows * D)), g_qkv(qkv.size());
    std::vector<typename K::State> kv(sums.size());
    std::vector<double> wanted(qkv.size()), g_decay(1);
    Sum wanted_decay;
    for (i64 r = 0; r < rows; r++)
        for (i64 d = 0; d < D; d++) {
            const std::vector<float>* parts[] = {&q, &k, &v};
            for (i64 j = 0; j < 3; j++)
                qkv[size_t((r * 3 + j) * D + d)] = make<I>((*parts[j])[size_t(r * D + d)]);
        }
    for (i64 b = 0; b < B; b++)
        for (i64 d = 0; d < D; d++) {
            std::vector<double> current, gradient;
            auto at = [&](i64 t, i64 n) { return size_t(((t * B + b) * N + n) * D + d); };
            for (i64 t = 0; t < T; t++) {
                current.push_back(sums[size_t((t * B + b) * D + d)]);
                gradient.push_back(0);
                for (i64 n = 0; n < N; n++) gradient.back() += value(gy[at(t, n)]) * q[at(t, n)];
            }
            const Neuron neuron(current, DECAY, THRESHOLD);
            const auto back = neuron.backward(current, gradient, DECAY, THRESHOLD, ALPHA, wanted_decay);
            for (i64 t = 0; t < T; t++)
                for (i64 n = 0; n < N; n++) {
                    const size_t row = size_t(((t * B + b) * N + n) * 3 * D + d), w = size_t(D);
                    wanted[row] = value(gy[at(t, n)]) * neuron.spike[size_t(t)];
                    wanted[row + w] = back[size_t(t)] * v[at(t, n)];
                    wanted[row + 2 * w] = back[size_t(t)] * k[at(t, n)];
                }
        }
    K::attend(T, B, N, D, qkv.data(), kv.data(), y.data(), DECAY, THRESHOLD, threads);
    compare("token sums of attend", kv, sums);
    compare("attend", y, masked);
    K::attend_backward(T, B, N, D, qkv.data(), kv.data(), gy.data(), g_qkv.data(), DECAY, THRESHOLD, ALPHA,
                       g_decay.data(), threads);
    compare("attend_backward", g_qkv, wanted, K::tolerance);
    compare_sums("gradient of the decay of attend", g_decay, {wanted_decay}, std::fmin(K::tolerance, 1e-4));
}

// 3 x 3, stride 2, padding 1; of equal values, which are frequent here, the first takes the gradient.
template <class I> void check_pool(i64 N, i64 H, i64 W, i64 C, int threads) {
    using K = Kernels<I>;
    const i64 h = (H + 1) / 2, w = (W + 1) / 2;
    const auto x = eighths<I>(N * H * W * C, 4), g = eighths<I>(N * h * w * C, 4);
    std::vector<I> out(g.size()), again(g.size()), gx(x.size());
    std::vector<double> expected(g.size()), wanted(x.size());
    std::vector<uint8_t> winner(g.size());
    for (i64 i = 0; i < N * h * w * C; i++) {
        const i64 c = i % C, ox = i / C % w, oy = i / C / w % h, n = i / C / w / h;
        i64 best = -1;
        for (i64 y = 2 * oy - 1; y <= 2 * oy + 1; y++)
            for (i64 u = 2 * ox - 1; u <= 2 * ox + 1; u++) {
                if (y < 0 || y >= H || u < 0 || u >= W) continue;
                const i64 at = ((n * H + y) * W + u) * C + c;
                if (best < 0 || value(x[size_t(at)]) > value(x[size_t(best)])) best = at;
            }
        expected[size_t(i)] = value(x[size_t(best)]);
        wanted[size_t(best)] += value(g[size_t(i)]);
    }
    K::max_pool(N, H, W, C, x.data(), out.data(), winner.data(), threads);
    compare("max_pool", out, expected);
    K::max_pool(N, H, W, C, x.data(), again.data(), nullptr, threads);
    compare("max_pool without winners", again, expected);
    K::max_pool_backward(N, H, W, C, g.data(), winner.data(), gx.data(), threads);
    compare("max_pool_backward", gx, wanted);
}

template <class I> void check_type(const char* name) {
    for (int threads : {1, 3}) {
        for (i64 inner : {i64(1), i64(12)}) {
            context = std::string(name) + ", inner " + std::to_string(inner) + ", threads " + std::to_string(threads);
            check_neurons<I>(1, 1, 1, inner, true, threads);
            check_neurons<I>(4, 3, 37, inner, true, threads);
            check_neurons<I>(5, 90, 37, inner, false, threads);
            check_neurons<I>(3, 3, 1500, inner, true, threads);
            check_batchnorm<I>(1, 1, inner, threads);
            check_batchnorm<I>(50, 37, inner, threads);
            check_batchnorm<I>(5, 9000, inner, threads);
        }
        context = std::string(name) + ", threads " + std::to_string(threads);
        check_attention<I>(1, 1, 1, 1, 0.9, threads);
        check_attention<I>(4, 3, 16, 40, 0.3, threads);
        check_pool<I>(1, 1, 1, 1, threads);
        check_pool<I>(2, 7, 8, 37, threads);
        check_pool<I>(3, 6, 5, 64, threads);
        for (int affine = 0; affine < 2; affine++) {
            check_depthwise<I>(1, 1, 1, 1, 3, affine, threads);
            check_depthwise<I>(2, 5, 6, 37, 3, affine, threads);
            check_depthwise<I>(3, 4, 9, 16, 7, affine, threads);
        }
        for (i64 n : {1, 8, 1003}) check_bits<I>(n, threads);
    }
}

}  // namespace

int main() {
    check_type<float>("float32");
    check_type<double>("float64");
    check_type<bf16>("bfloat16");
    for (int threads : {1, 3}) {
        context = "threads " + std::to_string(threads);
        check_winograd(1, 1, 1, 1, 1, threads);
        check_winograd(2, 5, 7, 19, 33, threads);
        check_winograd(1, 8, 4, 32, 16, threads);
    }
    return report();
}
