// BatchNorm for CPUs in pieces, so that its normalising half can be fused with what follows it.

#include "layout.h"

namespace {

// ---- BatchNorm ---------------------------------------------------------------------------------------------------

// Mean and sum of squared deviations per channel over `rows` x inner elements, in one pass through memory: each
// block in the state's type around its own mean, blocks combined in double.
template <class I, class S>
void statistics(const I* x, int64_t rows, int64_t C, int64_t inner, double* mean, double* m2, int threads) {
    // Rows that are summed in S before they join the double: few enough for its rounding to stay small.
    const int64_t R = inner == 1 ? std::clamp<int64_t>(16384 / C, 2, 64) : 1, blocks = (rows + R - 1) / R;
    auto combine = [](double& m, double& q, double na, double mb, double qb, double nb) {
        double delta = mb - m, all = na + nb;
        m += delta * nb / all;
        q += qb + delta * delta * na * nb / all;
    };
    PerThread parts(2 * C + 1, threads);  // means, squared deviations, number of elements per channel
#pragma omp parallel num_threads(threads)
    {
        double *my_mean = parts.mine(), *my_m2 = my_mean + C, &n = my_m2[C];
        std::vector<S> sum(static_cast<size_t>(C)), dev(static_cast<size_t>(C));
#pragma omp for schedule(static)
        for (int64_t k = 0; k < blocks; k++) {
            int64_t r0 = k * R, r1 = r0 + R < rows ? r0 + R : rows;
            double here = double(r1 - r0) * double(inner);
            for (int64_t c = 0; c < C; c++) sum[size_t(c)] = dev[size_t(c)] = 0;
            S *ps = sum.data(), *pd = dev.data();
            for (int64_t r = r0; r < r1; r++) {
                const I* p = x + r * C * inner;
                if (inner == 1) {
#pragma omp simd
                    for (int64_t c = 0; c < C; c++) ps[c] += S(load(p + c));
                } else {
                    for (int64_t c = 0; c < C; c++) {
                        double total = 0;
#pragma omp simd reduction(+ : total)
                        for (int64_t i = 0; i < inner; i++) total += load(p + c * inner + i);
                        ps[c] += S(total);
                    }
                }
            }
            for (int64_t c = 0; c < C; c++) ps[c] = S(ps[c] / here);
            for (int64_t r = r0; r < r1; r++) {
                const I* p = x + r * C * inner;
                if (inner == 1) {
#pragma omp simd
                    for (int64_t c = 0; c < C; c++) {
                        S d = S(load(p + c)) - ps[c];
                        pd[c] += d * d;
                    }
                } else {
                    for (int64_t c = 0; c < C; c++) {
                        double total = 0;
                        S m = ps[c];
#pragma omp simd reduction(+ : total)
                        for (int64_t i = 0; i < inner; i++) {
                            S d = S(load(p + c * inner + i)) - m;
                            total += d * d;
                        }
                        pd[c] += S(total);
                    }
                }
            }
            for (int64_t c = 0; c < C; c++) combine(my_mean[c], my_m2[c], n, ps[c], pd[c], here);
            n += here;
        }
    }
    double seen = 0;
    for (int i = 0; i < threads; i++) {
        const double *its_mean = parts.values.data() + i * (2 * C + 1), *its_m2 = its_mean + C, n = its_m2[C];
        if (n == 0) continue;
        for (int64_t c = 0; c < C; c++) combine(mean[c], m2[c], seen, its_mean[c], its_m2[c], n);
        seen += n;
    }
}

// out = x * scale + shift (+ residual)
template <class I, class S>
void affine(const Layout& g, const I* x, const S* scale, const S* shift, const I* residual, I* out, int threads) {
    const int64_t L = block_length(g), N = g.T * g.N, blocks = (N + L - 1) / L;
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t(2 * L));
        S *sc = buffer.data(), *sh = sc + L;
        bool filled = false;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; b++) {
            int64_t first = b * L, length = N - first < L ? N - first : L;
            if (g.inner != 1 || !filled) {
                spread(g, scale, first, g.inner == 1 ? L : length, sc);
                spread(g, shift, first, g.inner == 1 ? L : length, sh);
                filled = true;
            }
            const I* xb = x + first;
            I* ob = out + first;
            if (residual) {
                const I* rb = residual + first;
#pragma omp simd
                for (int64_t i = 0; i < length; i++) store(ob + i, S(load(xb + i)) * sc[i] + sh[i] + S(load(rb + i)));
            } else {
#pragma omp simd
                for (int64_t i = 0; i < length; i++) store(ob + i, S(load(xb + i)) * sc[i] + sh[i]);
            }
        }
    }
}

// Per-channel sums of the gradient g, and of g times the centred input.
template <class I, class S>
void gradient_sums(const Layout& l, const I* x, const I* gradient, const S* center, double* sum_g, double* sum_gx,
                   int threads) {
    const int64_t L = block_length(l), N = l.T * l.N, blocks = (N + L - 1) / L;
    PerThread sums(2 * l.C, threads);
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t(3 * L));
        S *ce = buffer.data(), *a = ce + L, *b = a + L;
        double* mine = sums.mine();
        int64_t pending = 0, last = 0, last_length = 0;
        bool filled = false;
        auto flush = [&] {
            gather(l, a, last, last_length, mine);
            gather(l, b, last, last_length, mine + l.C);
            for (int64_t i = 0; i < L; i++) a[i] = b[i] = 0;
            pending = last_length = 0;
        };
#pragma omp for schedule(static)
        for (int64_t k = 0; k < blocks; k++) {
            int64_t first = k * L, length = N - first < L ? N - first : L;
            if (l.inner != 1 || !filled) {
                spread(l, center, first, l.inner == 1 ? L : length, ce);
                filled = true;
            }
            const I *xb = x + first, *gb = gradient + first;
#pragma omp simd
            for (int64_t i = 0; i < length; i++) {
                S v = load(gb + i);
                a[i] += v;
                b[i] += v * (S(load(xb + i)) - ce[i]);
            }
            last = first;
            last_length = length > last_length ? length : last_length;
            if (l.inner != 1 || ++pending == 32) flush();
        }
        if (last_length) flush();
    }
    sums.add_to(sum_g, 0, l.C);
    sums.add_to(sum_gx, l.C, l.C);
}

// gx = p * g + q * (x - center) + r, per channel: the second half of BatchNorm's backward; gx may be g.
template <class I, class S>
void gradient_apply(const Layout& l, const I* x, const I* gradient, const S* center, const S* p, const S* q, const S* r,
                    I* gx, int threads) {
    const int64_t L = block_length(l), N = l.T * l.N, blocks = (N + L - 1) / L;
#pragma omp parallel num_threads(threads)
    {
        std::vector<S> buffer(size_t(4 * L));
        S *ce = buffer.data(), *pp = ce + L, *qq = pp + L, *rr = qq + L;
        bool filled = false;
#pragma omp for schedule(static)
        for (int64_t k = 0; k < blocks; k++) {
            int64_t first = k * L, length = N - first < L ? N - first : L;
            if (l.inner != 1 || !filled) {
                int64_t whole = l.inner == 1 ? L : length;
                spread(l, center, first, whole, ce);
                spread(l, p, first, whole, pp);
                spread(l, q, first, whole, qq);
                spread(l, r, first, whole, rr);
                filled = true;
            }
            const I *xb = x + first, *gb = gradient + first;
            I* ob = gx + first;
#pragma omp simd
            for (int64_t i = 0; i < length; i++)
                store(ob + i, pp[i] * S(load(gb + i)) + qq[i] * (S(load(xb + i)) - ce[i]) + rr[i]);
        }
    }
}

}  // namespace

#define ENTRY_POINTS(NAME, I, S)                                                                                      \
    extern "C" void statistics_##NAME(int64_t rows, int64_t C, int64_t inner, const I* x, double* mean, double* m2,   \
                                      int threads) {                                                                  \
        statistics<I, S>(x, rows, C, inner, mean, m2, threads);                                                          \
    }                                                                                                                 \
    extern "C" void affine_##NAME(int64_t N, int64_t C, int64_t inner, const I* x, const S* scale, const S* shift,    \
                                  const I* residual, I* out, int threads) {                                           \
        affine<I, S>({1, N, C, inner}, x, scale, shift, residual, out, threads);                                         \
    }                                                                                                                 \
    extern "C" void gradient_sums_##NAME(int64_t N, int64_t C, int64_t inner, const I* x, const I* g,                 \
                                         const S* center, double* sum_g, double* sum_gx, int threads) {               \
        gradient_sums<I, S>({1, N, C, inner}, x, g, center, sum_g, sum_gx, threads);                                     \
    }                                                                                                                 \
    extern "C" void gradient_apply_##NAME(int64_t N, int64_t C, int64_t inner, const I* x, const I* g,                \
                                          const S* center, const S* p, const S* q, const S* r, I* gx, int threads) {  \
        gradient_apply<I, S>({1, N, C, inner}, x, g, center, p, q, r, gx, threads);                                      \
    }

ENTRY_POINTS(float32, float, float)
ENTRY_POINTS(float64, double, double)
ENTRY_POINTS(bfloat16, bf16, float)
