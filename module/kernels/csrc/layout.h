// Types in memory, and how elements map to channels. Shared by the CPU kernels.
//
// Legend: T time steps, N elements per step, C channels, I the type in memory, S the type that is computed in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_thread_num() { return 0; }
#endif

namespace {

// One row of doubles per thread, added up in the order of the threads, so that a sum comes out the same each time.
struct PerThread {
    int64_t width;
    int threads;
    std::vector<double> values;
    PerThread(int64_t width, int threads)
        : width(width), threads(threads), values(static_cast<size_t>(width) * static_cast<size_t>(threads)) {}
    double* mine() { return values.data() + width * omp_get_thread_num(); }
    void add_to(double* out, int64_t from, int64_t n) const {
        for (int i = 0; i < threads; i++)
            for (int64_t k = 0; k < n; k++) out[k] += values[static_cast<size_t>(i * width + from + k)];
    }
};

// ---- types in memory -------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const bf16* p) {
    uint32_t u = uint32_t(p->bits) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}
inline void store(float* p, float v) { *p = v; }
inline void store(double* p, double v) { *p = v; }
inline void store(bf16* p, float v) {
    uint32_t u;
    std::memcpy(&u, &v, 4);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;  // to nearest, ties to even
    uint32_t nan = (u >> 16) | 0x40u;                           // stays a NaN
    p->bits = uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
}

// ---- how elements map to channels ------------------------------------------------------------------------------

// Elements of one step lie as [rows, C, inner]: inner = 1 when channels are innermost, H * W when they are not.
struct Layout {
    int64_t T, N, C, inner;
};

// Blocks are short enough for their state to stay in the innermost caches, and (channels innermost) whole rows, so
// that one pattern of per-channel values fits every block.
inline int64_t block_length(const Layout& g) {
    const int64_t aim = 1024;
    if (g.inner != 1) return aim;
    return g.C >= aim ? g.C : g.C * (aim / g.C);
}

// Per-channel values spread over a block that starts at element `first`.
template <class S> void spread(const Layout& g, const S* per_channel, int64_t first, int64_t length, S* out) {
    if (g.inner == 1) {
        for (int64_t i = 0; i < length; i += g.C) std::memcpy(out + i, per_channel, size_t(g.C) * sizeof(S));
        return;
    }
    for (int64_t i = 0; i < length;) {
        int64_t at = first + i, c = at / g.inner % g.C;
        int64_t end = i + (g.inner - at % g.inner);
        if (end > length) end = length;
        for (; i < end; i++) out[i] = per_channel[c];
    }
}

// The reverse: add a block's values to double sums per channel.
template <class S> void gather(const Layout& g, const S* values, int64_t first, int64_t length, double* per_channel) {
    if (g.inner == 1) {
        for (int64_t i = 0; i < length; i += g.C)
            for (int64_t c = 0; c < g.C; c++) per_channel[c] += values[i + c];
        return;
    }
    for (int64_t i = 0; i < length;) {
        int64_t at = first + i, c = at / g.inner % g.C;
        int64_t end = i + (g.inner - at % g.inner);
        if (end > length) end = length;
        double sum = 0;
        for (; i < end; i++) sum += values[i];
        per_channel[c] += sum;
    }
}

}  // namespace
