// The surrogate gradient of a spike: the derivative of a sigmoid.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

// exp(x) for x <= 0, in a form the compiler can vectorise: 2^n times the Taylor series of the remainder, whose
// first dropped term, r^8 / 8! with |r| <= ln(2) / 2, is below a tenth of float's rounding.
inline float exp_negative(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = std::nearbyint(x * 1.44269504089f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t u = uint32_t(int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &u, 4);
    return p * scale;
}
inline double exp_negative(double x) { return std::exp(x); }

template <class S> inline S surrogate(S z, S alpha) {
    S a = alpha * z;
    S e = exp_negative(a < 0 ? a : -a);
    return alpha * e / ((1 + e) * (1 + e));
}

}  // namespace
