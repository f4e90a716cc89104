"""What a training step on CUDA moves and keeps, on fake tensors: no copy slips in, nothing grows, layouts stay."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_cuda import Operand, Step, accelerated, in_words, step, without_random_numbers
from module.accelerate import rows

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
