"""What a training step on CUDA moves and keeps, on fake tensors: no copy slips in, nothing grows, layouts stay."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_cuda import Operand, Step, accelerated, in_words, step, without_random_numbers
from model import MetaSpikeFormer
from module.accelerate import rows
from module.kernels import triton_device
from module.neuron import make_neuron

# 2-512 at 224 x 224, T = 4, B = 8, float16; `python -m benchmarks.fake_cuda` prints the figures of 8-512.
SIZES = dict(embed_dims=512, depths=2, img_size=224, T=4)
BATCH = 8
MOST_MOVED, MOST_KEPT = 5.1e9, 0.67e9  # bytes


@pytest.fixture(scope="module")
def training() -> Step:
    return step(lambda: accelerated(**SIZES), BATCH)


def activations(operands: list[Operand]) -> list[Operand]:
    """Of the size of a block's input or more: [T, B, C, H, W] or [T * B, C, H, W]; not the images."""
    T, D = SIZES["T"], SIZES["embed_dims"]
    least, first = T * BATCH * D * 14 * 14, (T, 1, T * BATCH, BATCH)
    return [o for o in operands if o.bytes >= least and o.shape[0] in first and o.shape[-3] != 3]


def test_a_training_step_moves_and_keeps_no_more_than_its_budget(training):
    moved, _, _ = training.totals()
    assert 0.9 * MOST_MOVED < moved < MOST_MOVED, "if it became less, lower the budget"
    assert 0.9 * MOST_KEPT < training.kept < MOST_KEPT


def test_large_tensors_are_only_touched_by_products_and_operators_of_ours(training):
    copies = 0
    for row in training.rows:
        if not activations([*row.inputs, *row.outputs]):
            continue
        # The gradient of a shortcut is a sum of two; that of the mean over the map is a quotient, in another layout.
        expected = ("aten::convolution", "sdt::", "aten::add", "aten::mean", "aten::div", "aten::copy_")
        assert row.name.startswith(expected), in_words(row)
        copies += row.name == "aten::copy_"
        for operand in activations(row.outputs):
            if operand.dtype != torch.uint8 and row.name != "aten::div":
                assert operand.strides[-3] == 1, in_words(row)
                assert operand.dtype == torch.float16, in_words(row)
    assert copies <= 1


def test_an_evaluation_keeps_nothing_and_moves_less(training):
    done = step(lambda: accelerated(**SIZES), BATCH, training=False)
    assert done.kept == 0
    assert done.totals()[0] < 0.3 * training.totals()[0]


def test_the_table_names_tritons_kernels_on_cuda():
    with without_random_numbers(), FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = accelerated(img_size=16, embed_dims=16, depths=1)
    expected = dict.fromkeys(("MS_SPS", "MS_SSA_Conv", "MS_MLP_Conv"), "Triton kernels") | {"LIF": "triton kernel"}
    assert {row.part: row.runs_as for row in rows(model)} == expected


def test_learned_time_constants_move_and_keep_the_same(training):
    done = step(lambda: accelerated(**SIZES, neuron=functools.partial(make_neuron, "plif")), BATCH)
    assert done.totals()[0] < 1.01 * training.totals()[0]
    assert done.kept < 1.01 * training.kept


def test_event_mode_keeps_one_byte_for_each_pooled_spike():
    sizes = dict(in_channels=2, embed_dims=64, depths=1, img_size=64, T=8)
    done = step(lambda: accelerated(**sizes, dvs_mode=True), BATCH, side=64, channels=2)
    names = {row.name for row in done.rows}
    assert {"sdt::max_pool_neighbours", "sdt::max_pool_neighbours_backward"} <= names
    assert not any("max_pool3d" in name for name in names)
    assert not any(o.dtype == torch.int64 and o.bytes > 2**16 for row in done.rows for o in row.outputs)


def test_v2_joins_repconvs_last_layers_and_keeps_its_layout():
    sizes = dict(embed_dims=(16, 32, 64, 64), depths=(1, 1), T=4)
    done = step(lambda: accelerated(network=MetaSpikeFormer, **sizes), 8)
    names = Counter(row.name for row in done.rows)
    assert names["sdt::bn_bn_lif"] == 2 * 3
    assert names["sdt::bn_bn_add"] == 2
    assert names["aten::cudnn_batch_norm"] == 2 * 4  # with RepConv's border
    for row in done.rows:
        if row.name.startswith(("aten::convolution", "aten::constant_pad", "aten::cudnn_batch_norm", "sdt::bn")):
            large = [o for o in row.outputs if len(o.shape) > 3 and o.bytes > 2**20]
            assert all(o.strides[-3] == 1 for o in large), in_words(row)
    plain = step(lambda: accelerated("plain", network=MetaSpikeFormer, **sizes), 8)
    assert done.totals()[0] < 0.85 * plain.totals()[0]
    assert done.kept < plain.kept


def test_torch_compile_takes_the_model_on_tritons_kernels_as_one_graph(monkeypatch):
    """On a CPU, with launches that do nothing: what torch.compile looks at is the code around them."""
    for part in ("lif", "norm", "norm_lif", "pool", "attention"):
        monkeypatch.setattr(f"module.kernels.triton_{part}.launch", lambda *_, **__: None)
    monkeypatch.setattr(triton_device, "runs", lambda x: True)
    monkeypatch.setattr(triton_device, "why_not", lambda device: None)
    torch._dynamo.reset()
    model = accelerated(img_size=16, embed_dims=16, depths=1, pooling_stat="0011").train()
    assert {row.runs_as for row in rows(model)} == {"Triton kernels", "triton kernel"}
    logits, _ = torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(2, 3, 16, 16))
    logits.sum().backward()
    torch._dynamo.reset()
