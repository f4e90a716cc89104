"""What training on CUDA needs of the run around it, as far as a CPU can show it."""

from __future__ import annotations

import copy
import functools
import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_cuda import _walk_backward, accelerated, without_random_numbers
from module.neuron import make_neuron
from utils.config.parse import config_from
from utils.data import loaders
from utils.data.mixing import EventMix, build_mixup
from utils.run.distributed import keep_gradient_strides, patient_group
from utils.run.precision import Precision
from utils.train.losses import make_train_loss
from utils.train.optim import make_optimizer
from utils.train.step import TrainStep, _without_exchange
from utils.train.trainer import parallel


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
def test_a_compiled_model_is_compiled_around_the_exchange_of_gradients(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    first = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 9, 5))
    x, y, weights = torch.randn(4, 3, 3, 3), torch.arange(4), []
    for compiles in (False, True):
        wrapped = parallel(copy.deepcopy(first), torch.device("cpu"), compiles)
        inner = wrapped._orig_mod if compiles else wrapped
        assert isinstance(inner, DistributedDataParallel)
        with _without_exchange(wrapped):
            assert not inner.require_backward_grad_sync
        model = Returning(wrapped)
        optimizer = torch.optim.SGD(inner.module.parameters(), lr=0.1)
        step = TrainStep(model, nn.CrossEntropyLoss(), optimizer, Precision(config_from({}), torch.device("cpu")))
        for i in range(2):
            step.run(x, y, i, 1)
        weights.append(inner.module.state_dict())
    torch.testing.assert_close(weights[1], weights[0])


class Returning(nn.Module):
    """Logits as the models of this project return them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x), {}


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


class _Waits(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        assert name not in {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}, name
        out = func(*args, **kwargs)
        if name in {"aten::_to_copy", "aten::copy_"}:
            source, target = (args[1], args[0]) if name == "aten::copy_" else (args[0], out)
            asked = kwargs.get("non_blocking") or (name == "aten::copy_" and len(args) > 2 and args[2])
            assert source.device == target.device or asked, name
        return out


@pytest.mark.parametrize(
    "settings",
    [
        {"opt": "lamb", "amp": True, "mixup": 0.5, "cutmix": 1.0, "clip_grad": 1.0},
        {"opt": "adamw", "amp": True, "amp_dtype": "bfloat16"},
        {"opt": "adam", "spike_mode": "plif", "TET": True, "grad_accum_steps": 2},
    ],
    ids=str,
)
def test_no_step_waits_for_the_device(settings, monkeypatch):
    """On fake CUDA tensors, with torch's backward engine, which needs a device, replaced by a walk over the graph."""
    monkeypatch.setattr(torch.amp.grad_scaler, "amp_definitely_not_available", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    queued = SimpleNamespace(record=lambda: None, synchronize=lambda: pytest.fail("the host waits"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: queued)
    cfg = config_from({"smoothing": 0.0, "batch_size": 4, "num_classes": 5, **settings})

    def backward(precision, loss):
        _walk_backward(precision.scaler.scale(loss))
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None

    monkeypatch.setattr(Precision, "backward", backward)
    cuda = torch.device("cuda")
    with without_random_numbers(), FakeTensorMode(allow_non_fake_inputs=True):
        neuron = functools.partial(make_neuron, cfg.spike_mode)
        with cuda:
            model = accelerated(img_size=16, embed_dims=16, depths=1, num_classes=5, TET=cfg.TET, neuron=neuron)
        precision, mixup = Precision(cfg, cuda), build_mixup(cfg)
        assert precision.scaler.is_enabled() == (cfg.amp and cfg.amp_dtype == "auto")
        loss = make_train_loss(cfg, mixup is not None)
        step = TrainStep(model, loss, make_optimizer(cfg, model), precision, mixup, cfg.grad_accum_steps)
        for i in range(2):
            x, y = torch.empty(4, 3, 16, 16, device=cuda), torch.zeros(4, dtype=torch.long, device=cuda)
            step._waiting = None  # its flags have arrived long ago
            with _Waits():
                step.run(x, y, i, 1)
    assert step._waiting is not None


def test_mixing_events_does_not_wait_for_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True):
        frames, labels = torch.empty(2, 4, 2, 8, 8, device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
        with _Waits():
            mixed, _ = EventMix(0.5, 5, 0.1)(frames, labels)
    assert mixed.is_cuda
