"""What `python -m utils.doctor` tries out, beyond reading versions.

A check takes the folder of the data sets and yields what works as (topic, text). It raises `Unusable` with the reason
where something does not work; any other exception means the same. Nothing heavy is imported before a check runs, so
that a package that cannot be imported is the failure of one check.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils import ROOT
from utils.config.settings import EVENT_DATASETS
from utils.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

    from utils.config.settings import Config

Found = Iterator[tuple[str, str]]

_SPEED_SECONDS = 4.0  # for each of two ways to compute
_DEMO = ROOT / "conf" / "digits" / "1_64_15E_t4.yml"
# Two processes that know each other by this port add their ranks.
_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from datetime import timedelta
rank, port, backend = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                        timeout=timedelta(seconds=30))
value = torch.tensor([rank + 1.0], device=f"cuda:{rank}" if backend == "nccl" else "cpu")
dist.all_reduce(value)
dist.destroy_process_group()
sys.exit(0 if value.item() == 3.0 else f"the sum of 1 and 2 over two processes came out as {value.item()}")
"""


class Unusable(Exception):
    """Something does not work here.

    Args:
        reason: in one line.
        remedy: what to do.
        harmless: nothing on this machine needs it.
    """

    def __init__(self, reason: str, remedy: str = "", *, harmless: bool = False) -> None:
        super().__init__(reason)
        self.remedy, self.harmless = remedy, harmless


def check_torch(_: str) -> Found:
    """torch computes: a convolution, forward and backward."""
    import torch

    layer = torch.nn.Conv2d(3, 8, 3, padding=1)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    layer(x).square().mean().backward()
    if x.grad is None or not torch.isfinite(x.grad).all():
        raise Unusable("a convolution has no finite gradient", "install another build of torch")
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    yield (
        "torch",
        f"{torch.__version__}, {built}; a convolution forward and backward; {torch.get_num_threads()} thread(s)",
    )


def check_torchvision(_: str) -> Found:
    """torchvision fits torch: its compiled operators are there."""
    import torch

    remedy = (
        f"torch {torch.__version__} and torchvision must come from one release and one index: install both again, in "
        "one command (python -m pip install --force-reinstall torch torchvision)"
    )
    try:
        import torchvision
        from torchvision.ops import nms

        kept = nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), torch.tensor([0.9, 0.8]), 0.5)
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {first_line(error)}", remedy) from error
    if kept.tolist() != [0]:
        raise Unusable("an operator of torchvision gives a wrong result", remedy)
    yield "torchvision", f"{torchvision.__version__}; fits torch"


def check_spikingjelly(_: str) -> Found:
    """SpikingJelly's own neuron, forward and backward, on torch."""
    import torch
    from spikingjelly.activation_based.neuron import LIFNode

    x = torch.full((4, 2, 3), 1.5, requires_grad=True)
    spikes = LIFNode(tau=2.0, step_mode="m")(x)
    spikes.sum().backward()
    # With tau = 2 the potential is .75, 1.125: it fires at every second step.
    if spikes[:, 0, 0].tolist() != [0, 1, 0, 1] or x.grad is None:
        raise Unusable(f"LIF gives {spikes[:, 0, 0].tolist()} for a constant input of 1.5; expected 0, 1, 0, 1")
    yield "spikingjelly", f"{importlib.metadata.version('spikingjelly')}; LIF forward and backward"


def check_package(name: str, module: str, _: str) -> Found:
    """A package can be imported."""
    importlib.import_module(module)
    yield name, importlib.metadata.version(name)


def check_cupy(_: str) -> Found:
    """CuPy can be imported, which needs no GPU."""
    try:
        import cupy
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        remedy = "install one CuPy, of torch's CUDA: cupy-cuda13x or cupy-cuda12x; only a GPU needs it"
        raise Unusable(reason, remedy, harmless=True) from error
    yield "cupy", cupy.__version__


def check_cuda(_: str) -> Found:
    """torch sees the GPUs that the machine has."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            raise Unusable("no NVIDIA driver (nvidia-smi is not there): everything runs on the CPU", harmless=True)
        if torch.version.cuda is None:
            raise Unusable(
                f"driver {driver} is there, but this torch is built for CPUs only",
                "install a torch that is built for CUDA (https://pytorch.org/get-started/locally/)",
            )
        try:
            torch.cuda.init()
            reason = "torch.cuda.is_available() is False"
        except Exception as error:
            reason = first_line(error)
        raise Unusable(
            f"driver {driver}, torch for CUDA {torch.version.cuda}: {reason}",
            "install a driver that is new enough for this CUDA, or a torch for an older CUDA",
        )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"sm_{properties.major}{properties.minor}"
        value = torch.ones(8, device=f"cuda:{index}").sum().item()
        if value != 8:
            raise Unusable(f"cuda:{index} adds eight ones to {value}", "test the GPU")
        memory = properties.total_memory / 2**30
        yield f"cuda:{index}", f"{properties.name}, {capability}, {memory:.0f} GiB, driver {driver or 'not known'}"


def check_neurons(backend: str, _: str) -> Found:
    """A small model whose neurons run on `backend`, forward and backward."""
    import torch

    device = _device()
    try:
        model = _model(_config({"neuron_backend": backend}), device)
    except UserError as error:
        reason = first_line(error).partition("cannot be used: ")[2].removesuffix(". Use 'auto' or 'torch'.")
        remedies = {"cupy": "install cupy-cuda13x or cupy-cuda12x, as torch's CUDA", "triton": "install triton"}
        remedy = remedies.get(backend, "") if device.type == "cuda" else ""  # the reason for cpp has its own
        raise Unusable(reason or str(error), remedy, harmless=True) from error
    logits, _hook = model(torch.rand(2, 1, 16, 16, device=device))
    logits.square().mean().backward()
    yield f"neurons, {backend}", f"forward and backward on {device}"


def check_auto(_: str) -> Found:
    """What the default settings choose here."""
    from utils.run.build import rows

    device = _device()
    for row in rows(_model(_config({}), device)):
        reason = f" ({row.why_not_faster})" if row.why_not_faster else ""
        yield f"auto, {row.part}", f"{row.runs_as} on {device}{reason}"


def check_processes(backend: str, _: str) -> Found:
    """Two processes add a number."""
    import torch

    if backend == "nccl" and torch.cuda.device_count() < 2:
        raise Unusable(f"needs two GPUs, there are {torch.cuda.device_count()}", harmless=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO_PROCESSES, str(rank), port, backend], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [child.communicate(timeout=90)[1] for child in children]
    except subprocess.TimeoutExpired:
        raise Unusable(
            "two processes did not find each other within 90 s", "check the firewall for 127.0.0.1"
        ) from None
    finally:
        for child in children:
            child.kill()
    for child, error in zip(children, errors, strict=True):
        if child.returncode:
            raise Unusable(
                next((line for line in reversed(error.splitlines()) if line.strip()), "no message"),
                "check the network interface that gloo or NCCL takes (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)",
            )
    yield f"two processes, {backend}", "all-reduce"


def check_images(name: str, data_dir: str) -> Found:
    """The files of an image set are there and can be read."""
    from utils.data.datasets import build_dataset, dataset_facts

    facts = dataset_facts(name)
    settings = {"dataset": name, "num_classes": facts.classes, "in_channels": facts.channels}
    cfg = _config(settings | ({} if name == "digits" else {"data_dir": data_dir}))
    try:
        found = f"{len(build_dataset(cfg, training=True)):,} training samples"
    except UserError as error:
        missing = f"{data_dir}/{'cifar-10-batches-py' if name == 'torch/cifar10' else 'cifar-100-python'}"
        reason = first_line(error) if Path(missing).exists() else f"{missing} is not there"
        raise Unusable(reason, "to fetch it, train with --dataset-download", harmless=True) from error
    yield f"data, {name}", found


def check_events(name: str, data_dir: str) -> Found:
    """The files of an event set are complete."""
    from utils.events.sources import SOURCES, event_samples
    from utils.events.tet import open_tet

    source, folder = SOURCES[name], Path(data_dir) / name.removesuffix("-tet")
    root = folder if folder.is_dir() else Path(source.root)
    remedy = f"python -m utils.prepare {name} says what to download, and prepares it"
    if not root.is_dir():
        if source.make:
            yield f"data, {name}", f"is made from the embedded digits when it is first used, in {root}"
            return
        raise Unusable(f"{root} is not there", remedy, harmless=True)
    try:
        if source.tet_of:
            samples = sum(map(len, open_tet(root)))
        else:
            samples = sum(map(len, event_samples(source, root).values()))
    except UserError as error:
        raise Unusable(first_line(error), remedy, harmless=True) from error
    yield f"data, {name}", f"{samples:,} samples in {root}"


def check_folders(data_dir: str) -> Found:
    """Folders of images below `data_dir`."""
    folders = [path.parent for path in sorted(Path(data_dir).glob("*/train")) if path.is_dir()]
    if not folders:
        reason = f"no folder DIR/train below {data_dir}"
        raise Unusable(reason, "a folder of images has train/CLASS/ and val/CLASS/", harmless=True)
    yield "data, folders", ", ".join(map(str, folders))


def check_speed(_: str) -> Found:
    """Training steps of the demo's network per second, as it runs by default and in plain PyTorch."""
    device = _device()
    for title, kernels in (("by default", "auto"), ("plain PyTorch", "plain")):
        yield f"speed, {title}", f"{_images_per_second(kernels, device):,.0f} images/s, training the demo's network"


def _images_per_second(kernels: str, device: torch.device) -> float:
    import torch
    from torch.nn.functional import cross_entropy

    cfg = _config({"kernels": kernels})
    model, batch = _model(cfg, device), cfg.batch_size
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.rand(batch, 1, 16, 16, device=device)
    targets = torch.arange(batch, device=device) % cfg.num_classes
    steps, start = -2, time.perf_counter()
    while steps < 1 or time.perf_counter() - start < _SPEED_SECONDS:
        logits, _hook = model(images)
        loss = cross_entropy(logits, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # waits for the device
        steps += 1
        if steps == 0:
            start = time.perf_counter()
    return steps * batch / (time.perf_counter() - start)


def _config(changes: dict[str, Any]) -> Config:
    """The demo's configuration with `changes`."""
    from utils.config.parse import config_from, load_yaml

    demo = load_yaml(_DEMO)
    # What describes the demo's data does not fit another set.
    kept = {} if "dataset" in changes else {name: getattr(demo, name) for name in demo.explicit}
    return config_from(kept | changes)


def _model(cfg: Config, device: torch.device) -> torch.nn.Module:
    from utils.run.build import build_model, make_faster
    from utils.run.distributed import Process
    from utils.run.precision import Precision

    model = build_model(cfg).to(device)
    make_faster(cfg, model, Process(0, 1, device), Precision(cfg, device), training=True)
    return model


def _device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _driver() -> str | None:
    """Version of the NVIDIA driver, or None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


_PACKAGES = {
    "timm": "timm",
    "numpy": "numpy",
    "pillow": "PIL.Image",
    "pyyaml": "yaml",
    "tensorboard": "torch.utils.tensorboard",
    "matplotlib": "matplotlib.figure",
    "tqdm": "tqdm",
}
IMAGE_SETS = ("digits", "torch/cifar10", "torch/cifar100")
_BACKENDS = ("torch", "lean", "cpp", "cupy", "triton")
CHECKS: dict[str, Callable[[str], Found]] = {
    "torch": check_torch,
    "torchvision": check_torchvision,
    "spikingjelly": check_spikingjelly,
    **{name: functools.partial(check_package, name, module) for name, module in _PACKAGES.items()},
    "cupy": check_cupy,
    "cuda": check_cuda,
    **{f"neurons, {backend}": functools.partial(check_neurons, backend) for backend in _BACKENDS},
    "auto": check_auto,
    **{f"two processes, {name}": functools.partial(check_processes, name) for name in ("gloo", "nccl")},
    **{f"data, {name}": functools.partial(check_images, name) for name in IMAGE_SETS},
    **{f"data, {name}": functools.partial(check_events, name) for name in EVENT_DATASETS},
    "data, folders": check_folders,
    "speed": check_speed,
}
# What must work before a check says anything of its own.
_MODEL = ("torch", "torchvision", "spikingjelly", "timm")
NEEDS: dict[str, tuple[str, ...]] = {
    "torchvision": ("torch",),
    "spikingjelly": ("torch",),
    "timm": ("torch", "torchvision"),
    "tensorboard": ("torch",),
    "cuda": ("torch",),
    **{name: ("torch",) for name in CHECKS if name.startswith("two processes")},
    **{name: _MODEL for name in CHECKS if name.startswith(("neurons", "data")) or name in ("auto", "speed")},
}
NEEDS_MODEL = ("auto", "speed", *(name for name in CHECKS if name.startswith("neurons")))
