// The event-driven kernels against loops written from their definitions, without Python: for sanitizers, and for CPUs
// that are only emulated. tests/test_kernels_alone.py compiles and runs this.
//
// Legend: T time steps, N images or tokens, B batch, H x W feature map, P = N*H*W pixels, C input and O output
// channels, k x k kernel, D channels of the attention.
#include "common.h"

extern "C" {
#include "../../module/kernels/csrc/sparse/layer.h"

int64_t sparse_pack(const void*, int, int, int64_t, int64_t, int64_t, uint64_t*, int);
void sparse_unpack(const uint64_t*, int64_t, int64_t, float*, int);
void sparse_pack_weights(const float*, int64_t, int64_t, int, float*, int);
void sparse_unpack_weights(const float*, int64_t, int64_t, int, float*, int);
int64_t sparse_weight_grad(const uint64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, int, const void*, int, float*,
                          int);
int64_t sparse_run(const layer*, int64_t, char*, outcome*, int);
}

namespace {

void compare_bits(const char* what, const std::vector<uint64_t>& actual, const std::vector<uint64_t>& expected) {
    comparisons++;
    if (actual == expected) return;
    failures++;
    std::printf("%s: %s differs\n", context.c_str(), what);
}

std::vector<uint64_t> bits_of(const std::vector<float>& x, i64 pixels, i64 C) {
    i64 words = (C + 63) / 64;
    std::vector<uint64_t> bits(size_t(pixels * words));
    for (i64 p = 0; p < pixels; p++)
        for (i64 c = 0; c < C; c++)
            if (x[size_t(p * C + c)] != 0) bits[size_t(p * words + c / 64)] |= uint64_t(1) << (c % 64);
    return bits;
}

struct Shape {
    i64 N, C, O, H, W;
    int k;
};

place at_address(const void* memory) { return memory ? reinterpret_cast<place>(memory) : place(NONE); }

// A layer whose maps lie anywhere: places count from address 0.
layer layer_of(int kind, const void* input, i64 steps, i64 n, const Shape& s) {
    layer l = {};
    l.kind = kind, l.taps = s.k * s.k, l.results = 1, l.frames = steps, l.T = steps, l.N = n;
    l.H = s.H, l.W = s.W, l.C = s.C, l.O = s.O, l.input = at_address(input), l.source = NONE;
    l.to[0].residual = l.to[0].values = l.to[0].spikes = NONE;
    l.to[0].decay = 0.5f, l.to[0].threshold = 1.0f;
    return l;
}

outcome run_one(const layer& l, int threads) {
    outcome done;
    compare_counts("sparse_run", sparse_run(&l, 1, nullptr, &done, threads), 0);
    return done;
}

void check_packing(const std::vector<float>& x, const Shape& s, int threads) {  // x: [N, H*W, C]
    const i64 HW = s.H * s.W, P = s.N * HW, words = (s.C + 63) / 64;
    const std::vector<uint64_t> expected = bits_of(x, P, s.C);
    i64 count = 0;
    for (float v : x) count += v != 0;
    for (int dtype = 0; dtype < 4; dtype++)
        for (int channels_last = 0; channels_last < 2; channels_last++) {
            const size_t size = dtype == 0 ? 4 : dtype == 3 ? 1 : 2;
            const uint32_t one = dtype == 0 ? 0x3F800000u : dtype == 1 ? 0x3F80u : dtype == 2 ? 0x3C00u : 1u;
            std::vector<char> memory(x.size() * size);
            for (i64 p = 0; p < P; p++)
                for (i64 c = 0; c < s.C; c++) {
                    const i64 at = channels_last ? p * s.C + c : (p / HW * s.C + c) * HW + p % HW;
                    if (x[size_t(p * s.C + c)] != 0) std::memcpy(memory.data() + size_t(at) * size, &one, size);
                }
            std::vector<uint64_t> bits(size_t(P * words), ~uint64_t(0));
            const void* from = memory.data();
            compare_counts("sparse_pack", sparse_pack(from, dtype, channels_last, s.N, HW, s.C, bits.data(), threads),
                           count);
            compare_bits("sparse_pack", bits, expected);
            memory.back() = 7;  // no spike any more in any of the types
            compare_counts("sparse_pack of other values",
                           sparse_pack(from, dtype, channels_last, s.N, HW, s.C, bits.data(), threads), -1);
        }
    std::vector<float> back(x.size(), 5);
    sparse_unpack(expected.data(), P, s.C, back.data(), threads);
    compare("sparse_unpack", back, x);
    const i64 height = (s.H + 1) / 2, width = (s.W + 1) / 2;
    std::vector<float> pooled(size_t(s.N * height * width * s.C));
    for (i64 p = 0; p < P; p++)
        for (i64 c = 0; c < s.C; c++)
            for (i64 y = p % HW / s.W / 2; x[size_t(p * s.C + c)] != 0 && y <= (p % HW / s.W + 1) / 2; y++)
                for (i64 u = p % s.W / 2; u <= (p % s.W + 1) / 2; u++)
                    if (y < height && u < width) pooled[size_t(((p / HW * height + y) * width + u) * s.C + c)] = 1;
    std::vector<uint64_t> out(size_t(s.N * height * width * words), ~uint64_t(0));
    layer pool = layer_of(POOL_SPIKES, expected.data(), 1, s.N, s);
    pool.to[0].spikes = at_address(out.data());
    run_one(pool, threads);
    compare_bits("pool of spikes", out, bits_of(pooled, s.N * height * width, s.C));
}

// Calls `visit(output pixel, output channel, input pixel, input channel, tap)` for every connection.
template <class Visit> void convolve(i64 images, const Shape& s, Visit visit) {
    const int r = s.k / 2;
    for (i64 n = 0; n < images; n++)
        for (i64 y = 0; y < s.H; y++)
            for (i64 x = 0; x < s.W; x++)
                for (int t = 0; t < s.k * s.k; t++) {
                    const i64 v = y + t / s.k - r, u = x + t % s.k - r;
                    if (v < 0 || v >= s.H || u < 0 || u >= s.W) continue;
                    for (i64 c = 0; c < s.C; c++)
                        visit((n * s.H + y) * s.W + x, (n * s.H + v) * s.W + u, c, t);
                }
}

void check_convolution(const Shape& s, double rate, int threads) {
    const i64 T = 3, images = T * s.N, P = images * s.H * s.W;
    const int taps = s.k * s.k;
    const std::vector<float> x = spikes<float>(P * s.C, rate);
    check_packing(x, {images, s.C, s.O, s.H, s.W, s.k}, threads);
    const std::vector<uint64_t> bits = bits_of(x, P, s.C);
    const auto weight = eighths<float>(s.O * s.C * taps, 16), bias = eighths<float>(s.O, 16);
    const auto residual = eighths<float>(P * s.O, 16), grad = eighths<float>(P * s.O, 16);
    std::vector<float> packed(size_t((s.O + 31) / 32 * taps * s.C * 32), 9), again(weight.size());
    sparse_pack_weights(weight.data(), s.O, s.C, taps, packed.data(), threads);
    sparse_unpack_weights(packed.data(), s.O, s.C, taps, again.data(), threads);
    if (s.O > 16)  // else the panels of the weights are narrower than those of their gradient
        compare("sparse_pack_weights and back", again, weight);

    std::vector<float> sums(residual.size()), plain(residual.size()), weight_grad(weight.size());
    for (size_t i = 0; i < sums.size(); i++) plain[i] = bias[i % size_t(s.O)], sums[i] = plain[i] + residual[i];
    i64 additions = 0;
    convolve(images, s, [&](i64 p, i64 q, i64 c, int t) {
        if (x[size_t(q * s.C + c)] == 0) return;
        for (i64 o = 0; o < s.O; o++) {
            const size_t w = size_t((o * s.C + c) * taps + t), to = size_t(p * s.O + o);
            plain[to] += weight[w], sums[to] += weight[w], weight_grad[w] += grad[to], additions++;
        }
    });
    std::vector<float> out(sums.size(), 9);
    std::vector<bf16> rounded(sums.size()), expected;
    // Told that nothing fires it adds from lists, told that far too much does from tables.
    auto forward = [&](i64 told, i64 steps, i64 n, const float* res, void* to, int dtype, uint64_t* neurons) {
        layer l = layer_of(CONVOLVE, bits.data(), steps, n, s);
        l.spikes = told, l.dtype = dtype;
        l.to[0].weights = packed.data(), l.to[0].bias = bias.data(), l.to[0].residual = at_address(res);
        l.to[0].values = at_address(to), l.to[0].spikes = at_address(neurons);
        return run_one(l, threads).additions;
    };
    const i64 step = s.N * s.H * s.W * s.O;
    std::vector<float> fired(plain.size());
    for (i64 i = 0; i < step; i++) {
        std::vector<double> current;
        for (i64 t = 0; t < T; t++) current.push_back(plain[size_t(t * step + i)]);
        const Neuron neuron(current, 0.5, 1.0);
        for (i64 t = 0; t < T; t++) fired[size_t(t * step + i)] = float(neuron.spike[size_t(t)]);
    }
    for (float v : plain) expected.push_back(make<bf16>(v));
    std::vector<uint64_t> neurons(size_t(P * ((s.O + 63) / 64)));
    for (i64 told : {i64(0), 100 * P * s.C}) {
        std::fill(out.begin(), out.end(), 9.0f);
        std::fill(neurons.begin(), neurons.end(), ~uint64_t(0));
        compare_counts("additions", forward(told, 1, images, residual.data(), out.data(), 0, nullptr), additions);
        compare("sums", out, sums);
        forward(told, 1, images, nullptr, rounded.data(), 1, nullptr);
        compare("sums in bfloat16", rounded, expected);
        forward(told, T, s.N, nullptr, nullptr, 0, neurons.data());
        compare_bits("neurons on sums", neurons, bits_of(fired, P, s.O));
    }
    std::fill(neurons.begin(), neurons.end(), ~uint64_t(0));
    layer alone = layer_of(FIRE, plain.data(), T, s.N, {s.N, s.O, s.O, s.H, s.W, 1});
    alone.to[0].spikes = at_address(neurons.data());
    run_one(alone, threads);
    compare_bits("neurons alone", neurons, bits_of(fired, P, s.O));

    std::vector<bf16> grad16;
    for (float v : grad) grad16.push_back(make<bf16>(v));
    for (int dtype = 0; dtype < 2; dtype++) {
        const void* from = dtype ? static_cast<const void*>(grad16.data()) : grad.data();
        sparse_weight_grad(bits.data(), images, s.H, s.W, s.C, s.O, taps, from, dtype, packed.data(), threads);
        sparse_unpack_weights(packed.data(), s.O, s.C, taps, again.data(), threads);
        compare("sparse_weight_grad", again, weight_grad);
    }
}

void check_event_attention(i64 T, i64 B, i64 N, i64 D, double rate, int threads) {
    auto q = spikes<float>(T * B * N * D, 0.6);
    const auto k = spikes<float>(T * B * N * D, rate), v = spikes<float>(T * B * N * D, rate);
    std::vector<uint64_t> bits = bits_of(q, T * B * N, D);
    double additions = 0;
    const std::vector<uint64_t> bits_k = bits_of(k, T * B * N, D), bits_v = bits_of(v, T * B * N, D);
    layer l = layer_of(ATTEND, bits_v.data(), T, B, {B, D, D, N, 1, 1});
    l.queries = at_address(bits.data()), l.keys = at_address(bits_k.data());
    const i64 done = run_one(l, threads).additions;
    for (double sum : mask(q, k, v, T, B, N, D)) additions += sum;
    compare_counts("additions of the attention", done, i64(additions));
    compare_bits("attention", bits, bits_of(q, T * B * N, D));
}

}  // namespace

int main() {
    const Shape shapes[] = {{1, 1, 1, 1, 1, 1}, {1, 1, 1, 1, 1, 3},   {3, 5, 7, 5, 4, 3},
                            {2, 64, 32, 8, 8, 1}, {1, 130, 70, 9, 7, 3}, {1, 3, 40, 2, 300, 3}};
    for (int threads : {1, 3})
        for (double rate : {0.0, 0.2, 1.0}) {
            for (const Shape& s : shapes) {
                context = "C " + std::to_string(s.C) + ", O " + std::to_string(s.O) + ", kernel " +
                          std::to_string(s.k) + ", rate " + std::to_string(rate) + ", threads " +
                          std::to_string(threads);
                check_convolution(s, rate, threads);
            }
            context = "attention, rate " + std::to_string(rate) + ", threads " + std::to_string(threads);
            check_event_attention(1, 1, 1, 1, rate, threads);
            check_event_attention(4, 3, 9, 70, rate, threads);
        }
    return report();
}
