// What the checks of both libraries share: random values, comparisons, and the neuron from its definition.
//
// Inputs are small multiples of a power of two: sums of them have no rounding, in whatever order, so that results of
// additions and spikes must be equal. What goes through an exponential or a division has a tolerance.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

struct bf16 {
    uint16_t bits;
};

namespace {

using i64 = int64_t;
std::mt19937 random_bits(1);
int comparisons = 0, failures = 0;
std::string context;

inline uint16_t to_bits(float v) {  // bfloat16, to nearest even
    uint32_t u;
    std::memcpy(&u, &v, 4);
    return uint16_t((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}
template <class I> I make(double v) { return I(v); }
template <> inline bf16 make(double v) { return {to_bits(float(v))}; }
inline double value(float v) { return v; }
inline double value(double v) { return v; }
inline double value(bf16 v) {
    uint32_t u = uint32_t(v.bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

inline std::vector<double> zeros(i64 n) { return std::vector<double>(size_t(n)); }
inline double eighth(int limit) { return (int(random_bits() % uint32_t(2 * limit + 1)) - limit) / 8.0; }
inline bool fires(double rate) { return random_bits() % 1000 < rate * 1000; }
template <class I> std::vector<I> eighths(i64 n, int limit) {
    std::vector<I> x;
    for (i64 i = 0; i < n; i++) x.push_back(make<I>(eighth(limit)));
    return x;
}
template <class I> std::vector<I> spikes(i64 n, double rate) {
    std::vector<I> x;
    for (i64 i = 0; i < n; i++) x.push_back(make<I>(fires(rate)));
    return x;
}

// Equal, or within `tolerance` of the largest expected value or of `size`: a sum that cancels has the rounding of its
// terms.
template <class I, class E>
void compare(const char* what, const std::vector<I>& actual, const std::vector<E>& expected, double tolerance = 0,
             double size = 0) {
    double largest = size, difference = 0;
    for (E e : expected) largest = std::fmax(largest, std::fabs(value(e)));
    for (size_t i = 0; i < expected.size(); i++) {
        double d = std::fabs(value(actual[i]) - value(expected[i]));
        difference = d <= difference ? difference : d;  // NaN stays
    }
    comparisons++;
    if (actual.size() == expected.size() && difference <= tolerance * largest) return;
    failures++;
    std::printf("%s: %s differs by %g of at most %g\n", context.c_str(), what, difference, largest);
}
inline void compare_counts(const char* what, i64 actual, i64 expected) {
    comparisons++;
    if (actual == expected) return;
    failures++;
    std::printf("%s: %s is %lld instead of %lld\n", context.c_str(), what, (long long)actual, (long long)expected);
}
struct Sum {
    double value = 0, size = 0;
    void add(double term) { value += term, size += std::fabs(term); }
};

// One neuron through time: spikes, potentials h, states before each step.
struct Neuron {
    std::vector<double> h, before, spike;
    Neuron(const std::vector<double>& x, double decay, double threshold) {
        double v = 0;
        for (double in : x) {
            before.push_back(v);
            h.push_back(v + (in - v) * decay);
            spike.push_back(h.back() >= threshold);
            v = spike.back() ? 0 : h.back();
        }
    }
    // The gradient of each input for the gradient of each spike; adds that of the decay to a sum.
    std::vector<double> backward(const std::vector<double>& x, const std::vector<double>& g, double decay,
                                 double threshold, double alpha, Sum& g_decay) const {
        std::vector<double> gx(x.size());
        double gv = 0;
        for (size_t t = x.size(); t-- > 0;) {
            double sigmoid = 1 / (1 + std::exp(-alpha * (h[t] - threshold)));
            double gh = g[t] * alpha * sigmoid * (1 - sigmoid) + (spike[t] ? 0 : gv);
            gx[t] = gh * decay;
            gv = gh * (1 - decay);
            g_decay.add(gh * (x[t] - before[t]));
        }
        return gx;
    }
};

// Masks q in place by the neurons that the token sums of k and v drive; [T, B, N, D]. Returns the sums [T, B, D].
inline std::vector<double> mask(std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v, i64 T,
                                i64 B, i64 N, i64 D) {
    std::vector<double> sums(size_t(T * B * D));
    for (size_t i = 0; i < k.size(); i++) sums[i / size_t(N * D) * size_t(D) + i % size_t(D)] += k[i] * v[i];
    for (i64 i = 0; i < B * D; i++) {
        std::vector<double> current;
        for (i64 t = 0; t < T; t++) current.push_back(sums[size_t(t * B * D + i)]);
        const Neuron neuron(current, 0.5, 1.0);
        for (i64 t = 0; t < T; t++)
            for (i64 n = 0; n < N; n++)
                q[size_t(((t * B + i / D) * N + n) * D + i % D)] *= float(neuron.spike[size_t(t)]);
    }
    return sums;
}

// The last line and the exit code.
inline int report() {
    std::printf("%d comparisons, %d failures\n", comparisons, failures);
    return failures != 0;
}

}  // namespace
