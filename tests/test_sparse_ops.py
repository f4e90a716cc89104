"""The sparse convolution: equal to the dense one, counted exactly, on every path the compiler can take."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import shutil

import pytest
import torch
import torch.nn.functional as F
from golden import relative_error

from module.kernels import native
from module.sparse import crossover as event_crossover
from module.sparse import library as event_kernels
from module.sparse import ops as sparse_ops
from module.sparse.ops import pack_spikes, sparse_conv2d, sparse_linear, unpack_spikes

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler: the engine falls back to dense layers"
)

# Sums of at most 1200 weights of unit size in float32, in another order than the reference: n * 2**-24 bounds the
# rounding, relative to the largest output. The issue's own bound is 1e-5.
TOLERANCE = 1e-5

# N, C, M, H, W, k: one pixel, one channel, words and panels not filled, several blocks, a row longer than a block
SHAPES = [
    (1, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 3),
    (3, 5, 7, 5, 4, 3),
    (2, 64, 32, 8, 8, 1),
    (5, 130, 70, 9, 17, 3),
    (2, 65, 33, 33, 20, 3),
    (1, 3, 40, 2, 600, 3),
    (40, 96, 33, 4, 4, 1),
]


def spikes(*shape: int, rate: float = 0.3, seed: int = 0) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < rate).float()


def weights(M: int, C: int, k: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(M, C, k, k, generator=generator), torch.randn(M, generator=generator)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    bias = None if bias is None else bias.double()
    return F.conv2d(x.double(), weight.double(), bias, padding=weight.shape[-1] // 2)


def additions(x: torch.Tensor, M: int, k: int) -> int:
    """(spike, weight) pairs by looping over every spike."""
    N, _, H, W = x.shape
    assert len(x) == N
    total = 0
    for _, _, y, u in x.nonzero().tolist():
        reach = range(-(k // 2), k // 2 + 1)
        total += sum(0 <= y + i < H and 0 <= u + j < W for i, j in itertools.product(reach, reach))
    return total * M


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_dense_and_counts_every_addition(shape, layout, rate):
    N, C, M, H, W, k = shape
    x = spikes(N, C, H, W, rate=rate).contiguous(memory_format=layout)
    weight, bias = weights(M, C, k)
    for b in (bias, None):
        out, counts = sparse_conv2d(x, weight, b, auto=False)
        assert relative_error(out, reference(x, weight, b)) < TOLERANCE
        assert counts.tolist() == [int(x.sum()), additions(x, M, k)]
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_and_tables_give_the_same_spikes_and_count_the_same_additions(shape):
    """The way is chosen by the number of spikes that the layer is told: none asks for lists, all for tables."""
    N, C, M, H, W, k = shape
    steps, x = 2, spikes(2 * N, C, H, W, rate=0.5)
    # Small multiples of 1/32: no sum is rounded, in whatever order, and no potential either.
    weight = torch.randint(-8, 9, (M, C, k, k), generator=torch.Generator().manual_seed(1)) / 32
    bits, count = pack_spikes(x)
    packed = sparse_ops.pack_weight(weight)
    for told in (0, count + x.numel()):
        layer = event_kernels.Layer(
            kind=event_kernels.CONVOLVE, taps=k * k, results=1, T=steps, N=N, H=H, W=W, C=C, O=M
        )
        layer.input, layer.source, layer.spikes = bits.data_ptr(), event_kernels.NONE, told
        out = torch.full((steps * N * H * W, (M + 63) // 64), -1)
        values = torch.full((steps * N, M, H, W), torch.nan).contiguous(memory_format=torch.channels_last)
        result = layer.to[0]
        result.weights, result.residual = packed.data_ptr(), event_kernels.NONE
        result.values, result.spikes, result.decay, result.threshold = values.data_ptr(), out.data_ptr(), 0.5, 1.0
        (done,) = event_kernels.run(event_kernels.load(), (event_kernels.Layer * 1)(layer), None, 2)
        fired = unpack_spikes(out, (steps * N, M, H, W))
        assert done.spikes == int(fired.sum())
        assert torch.equal(values, F.conv2d(x, weight, padding=k // 2))
        charged = values.unflatten(0, (steps, N))
        first = charged[0] / 2
        second = torch.where(first >= 1, 0, first) / 2 + charged[1] / 2
        assert torch.equal(fired.unflatten(0, (steps, N)), (torch.stack([first, second]) >= 1).float())
        assert done.additions == additions(x, M, k)


@pytest.mark.parametrize("dtype", list(sparse_ops.SPIKE_DTYPES))
def test_every_spike_dtype_gives_the_same_bits_in_both_layouts(dtype):
    x = spikes(3, 70, 9, 11)
    bits, count = pack_spikes(x)
    assert count == int(x.sum())
    for layout in (torch.contiguous_format, torch.channels_last):
        other, n = pack_spikes(x.to(dtype).contiguous(memory_format=layout))
        assert n == count
        assert torch.equal(bits, other)
    assert torch.equal(unpack_spikes(bits, tuple(x.shape)), x)


def test_non_contiguous_input():
    x = spikes(4, 20, 12, 10)[1:, ::2, 1::2].transpose(2, 3)
    weight, bias = weights(9, 10, 3)
    out, _ = sparse_conv2d(x, weight, bias, auto=False)
    assert relative_error(out, reference(x, weight, bias)) < TOLERANCE


def test_bfloat16_output_is_the_rounded_float32_one():
    x = spikes(2, 40, 6, 6)
    weight, bias = weights(35, 40, 3)
    exact, _ = sparse_conv2d(x, weight, bias, auto=False)
    rounded, _ = sparse_conv2d(x.bfloat16(), weight, bias, out_dtype=torch.bfloat16, auto=False)
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_dense(shape):
    N, C, M, H, W, k = shape
    x, (weight, bias) = spikes(N, C, H, W), weights(M, C, k)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in arguments]
    grad = torch.randn(N, M, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = torch.autograd.grad(reference(*exact), exact, grad)
    out, _ = sparse_conv2d(*arguments, auto=False)
    for actual, wanted in zip(torch.autograd.grad(out, arguments, grad.float()), expected, strict=True):
        assert actual.dtype == torch.float32
        assert relative_error(actual, wanted) < TOLERANCE


def test_bfloat16_input_gradient_changes_no_other_gradient():
    torch.manual_seed(0)
    x, (weight, bias) = spikes(3, 40, 6, 6), weights(33, 40, 3)
    arguments = [t.requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(3, 33, 6, 6)
    plain = torch.autograd.grad(sparse_conv2d(*arguments, auto=False)[0], arguments, grad)
    mixed = torch.autograd.grad(sparse_conv2d(*arguments, auto=False, bf16_input_grad=True)[0], arguments, grad)
    assert relative_error(mixed[0], plain[0].double()) < 2**-7  # a bfloat16 has 8 significant bits
    assert not torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[2], plain[2])


def test_results_do_not_depend_on_the_number_of_threads():
    x, (weight, bias) = spikes(6, 70, 20, 12), weights(75, 70, 3)
    weight.requires_grad_()
    grad = torch.randn(6, 75, 20, 12)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, counts = sparse_conv2d(x, weight, bias, auto=False)
            results.append((out.detach(), counts, torch.autograd.grad(out, weight, grad)[0]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_input_other_than_0_and_1_is_computed_densely_with_gradients():
    x, (weight, bias) = spikes(2, 6, 5, 5), weights(4, 6, 3)
    x[1, 2, 3, 4] = 0.5
    x.requires_grad_(), weight.requires_grad_()
    out, counts = sparse_conv2d(x, weight, bias, auto=False)
    assert counts.tolist() == [sparse_ops.NOT_SPIKES, 0]
    expected = F.conv2d(x, weight, bias, padding=1)
    assert relative_error(out.detach(), expected.detach().double()) < TOLERANCE
    grad = torch.randn_like(expected)
    pairs = zip(
        torch.autograd.grad(out, (x, weight), grad), torch.autograd.grad(expected, (x, weight), grad), strict=True
    )
    for actual, wanted in pairs:
        assert relative_error(actual, wanted.double()) < TOLERANCE


def test_auto_is_dense_above_the_crossover_and_event_driven_below(monkeypatch):
    x, (weight, bias) = spikes(2, 8, 6, 6, rate=0.4), weights(4, 8, 1)
    rate = float(x.mean())
    for limit, dense in ((rate - 0.01, True), (rate + 0.01, False)):
        monkeypatch.setattr(sparse_ops, "crossover", lambda *_, limit=limit: limit)
        out, counts = sparse_conv2d(x, weight, bias)
        assert (int(counts[1]) == 0) == dense
        assert relative_error(out, reference(x, weight, bias)) < TOLERANCE


def test_linear():
    x, (weight, bias) = spikes(3, 4, 50), weights(11, 50, 1)
    weight = weight[:, :, 0, 0]
    out = sparse_linear(x, weight, bias, auto=False)
    assert relative_error(out, F.linear(x.double(), weight.double(), bias.double())) < TOLERANCE


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within opcheck
def test_operators_pass_opcheck_and_compile():
    x, (weight, bias) = spikes(2, 6, 5, 4), weights(5, 6, 3)
    arguments = (x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), torch.float32, False, False)
    torch.library.opcheck(torch.ops.sdt.event_conv2d.default, arguments)
    bits, _ = pack_spikes(x.detach())
    torch.library.opcheck(torch.ops.sdt.event_weight_grad.default, (bits, torch.randn(2, 5, 5, 4), 6, 3))
    compiled = torch.compile(
        lambda x: sparse_conv2d(x, weight, bias, auto=False)[0].relu(), backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(x), sparse_conv2d(x, weight, bias, auto=False)[0].relu())


def test_inductor_compiles_around_the_operators():
    """What torch.compile generates by default: forward and backward, fused with what stands beside them."""
    x, (weight, bias) = spikes(2, 6, 5, 4), weights(5, 6, 3)

    def layer(x, weight):
        return sparse_conv2d(x, weight, bias, auto=False)[0].mul(2).relu().sum()

    found = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        value = call(*leaves)
        value.backward()
        found.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*found, strict=True):
        assert relative_error(compiled, eager.double()) < TOLERANCE


def test_inference_mode():
    x, (weight, bias) = spikes(2, 6, 5, 4), weights(5, 6, 3)
    with torch.inference_mode():
        out, _ = sparse_conv2d(x, weight, bias, auto=False)
    assert relative_error(out, reference(x, weight, bias)) < TOLERANCE


def _avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


# Every way of compiling: the first choice is what all other tests run. The last has no OpenMP and no vectors beyond
# the compiler's baseline.
VARIANTS = [("-fopenmp",), ("-mavx2",) if _avx2() else (), ()]


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
def test_every_build_gives_the_same_bits(variant, tmp_path, monkeypatch):
    x, (weight, bias) = spikes(3, 70, 9, 11), weights(75, 70, 3)
    weight.requires_grad_()
    grad = torch.randn(3, 75, 9, 11)

    def compute() -> tuple[torch.Tensor, ...]:
        out, counts = sparse_conv2d(x, weight, bias, auto=False)
        return out.detach(), counts, torch.autograd.grad(out, weight, grad)[0]

    best = compute()
    other = dataclasses.replace(event_kernels.LIBRARY, variants=(variant,))
    library = event_kernels.typed(ctypes.CDLL(str(native.build(other, tmp_path))))
    monkeypatch.setattr(sparse_ops, "load", lambda: library)
    assert all(map(torch.equal, best, compute()))


class TestCrossover:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path, monkeypatch):
        event_kernels.load()  # from the usual folder, not built anew here
        monkeypatch.setenv("SDT_CACHE_DIR", str(tmp_path))
        event_crossover._kept.cache_clear()
        yield tmp_path
        event_crossover._kept.cache_clear()

    def test_it_is_measured_once_and_kept_in_a_file(self, folder, monkeypatch):
        first = event_crossover.crossover(16, 16, 1, 60)
        assert 0 <= first <= 1
        assert len(list(folder.glob("crossover_*.json"))) == 1
        monkeypatch.setattr(event_crossover, "_measure", lambda *_: pytest.fail("measured twice"))
        event_crossover._kept.cache_clear()
        assert event_crossover.crossover(16, 16, 1, 64) == first

    @pytest.mark.parametrize(
        ("dense", "expected"), [(4.5, 0.35), (2.0, 0.1), (3.0, 0.2), (0.5, 0.0), (5.0, 1.0), (99.0, 1.0)]
    )
    def test_it_is_where_the_sparse_layer_takes_as_long_as_the_dense_one(self, monkeypatch, dense, expected):
        """With a clock on which a dense layer takes `dense`, and a sparse one 1 + 10 x firing rate, at most 5."""
        now = 0.0

        def takes(seconds):
            def call(x, *args, **options):
                nonlocal now
                now += seconds(round(float(x.mean()), 1))

            return call

        monkeypatch.setattr(event_crossover.time, "perf_counter", lambda: now)
        monkeypatch.setattr(event_crossover.F, "conv2d", takes(lambda rate: dense))
        monkeypatch.setattr(sparse_ops, "sparse_conv2d", takes(lambda rate: min(5, 1 + 10 * rate)))
        assert event_crossover._measure(64, 8, 1, 2048) == pytest.approx(expected)

    def test_a_spoiled_file_is_measured_anew(self, folder, monkeypatch):
        monkeypatch.setattr(event_crossover, "_measure", lambda *_: 0.25)
        event_crossover.crossover(16, 16, 1, 64)
        (file,) = folder.glob("crossover_*.json")
        file.write_text("{")
        event_crossover._kept.cache_clear()
        assert event_crossover.crossover(16, 16, 1, 64) == 0.25
        assert "0.25" in file.read_text()

    def test_a_deterministic_run_does_not_measure(self, monkeypatch):
        monkeypatch.setattr(event_crossover, "_measure", lambda *_: pytest.fail("measured"))
        torch.use_deterministic_algorithms(True)
        try:
            assert event_crossover.crossover(16, 16, 1, 64) == event_crossover.FIXED
        finally:
            torch.use_deterministic_algorithms(False)
