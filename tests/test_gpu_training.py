"""What training on CUDA needs of the run around it, as far as a CPU can show it."""

from __future__ import annotations

import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel

from utils.config.parse import config_from
from utils.data import loaders
from utils.run.distributed import keep_gradient_strides, patient_group
from utils.run.precision import Precision


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("mended", [False, True])
def test_gradients_of_1x1_weights_have_the_strides_of_the_weights(mended):
    """torch copies each gradient and warns where they differ."""
    model = nn.Conv2d(4, 6, 1).to(memory_format=torch.channels_last)
    # Kernels that hand out gradients in the other layout.
    model.weight.register_hook(lambda g: g.clone().as_strided(g.shape, (4, 1, 1, 1)))
    if mended:
        keep_gradient_strides(model)
    x = torch.randn(2, 4, 3, 3)
    DistributedDataParallel(model)(x).sum().backward()
    (expected,) = torch.autograd.grad(model(x).sum(), model.weight)
    assert torch.equal(model.weight.grad, expected)
    assert (model.weight.grad.stride() == model.weight.stride()) == mended


@pytest.mark.usefixtures("alone")
def test_processes_wait_long_and_on_their_cpus():
    group = patient_group()
    assert dist.get_backend(group) == "gloo"
    assert group._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=12)
    with loaders._first_rank_first(0):
        newest = dist.distributed_c10d._world.pg_map
    assert all(p._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=12) for p in list(newest)[1:])
    assert len(newest) == 3


@pytest.mark.parametrize(("dtype", "device"), [("auto", "cuda"), ("bfloat16", "cuda"), ("auto", "cpu")])
def test_bfloat16_is_recommended_where_float16_runs_on_cuda(dtype, device):
    with FakeTensorMode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loss scaling is switched off where CUDA is missing
        precision = Precision(config_from({"amp": True, "amp_dtype": dtype}), torch.device(device))
    recommended = "amp_dtype: bfloat16 is recommended" in (precision.advice() or "")
    assert recommended == ((dtype, device) == ("auto", "cuda"))
