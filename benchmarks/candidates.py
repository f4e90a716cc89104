"""What is compared: the plain baseline and the model, each at a precision, as one call that does one step's work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import sizes
from benchmarks.plain import PlainSDT
from benchmarks.plain_v2 import PlainMetaSpikeFormer
from model import sdt, sdt_v2
from module.accelerate import accelerate
from module.kernels import winograd
from module.kernels.backends import BACKENDS
from module.neuron import make_neuron
from utils.run.allocator import keep_freed_memory
from utils.train.cuda_graph import StepGraph

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_BACKENDS = BACKENDS[1:]
_OPTIONS = (
    "fuse",
    "checkpoint",
    "compile",
    "nchw",
    "nhwc",
    "unaccelerated",
    "keep",
    "glibc",
    "direct",
    "graph",
    "sparse",
    "auto",
    *_BACKENDS,
)


def _make_fire(model: nn.Module, size: str) -> None:
    """Fresh models of V2 are silent, and their gradients then have no end: BatchNorm gets a bias of 0.5 (setting
    `bn_init_bias`), and the running statistics of one batch."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        nn.init.constant_(norm.bias, 0.5)
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(sizes.batch(size, 4, torch.device("cpu"))[0])
    for norm in norms:
        norm.momentum = 0.1


@dataclass(frozen=True)
class Candidate:
    """`plain:fp32`, `ours:bf16`, `ours:bf16:fuse`: implementation, precision, options.

    `ours` is the model after `module.accelerate.accelerate`.

    Options: `fuse` folds BatchNorm (evaluation), `checkpoint` recomputes blocks (training), `compile` runs
    torch.compile, `graph` runs a training step as one CUDA graph, `nchw` or `nhwc` sets the memory format of weights
    and input; `sparse` or `auto` is the engine of ours; a backend's name sets the neurons'.
    To see what one thing alone brings: `unaccelerated` runs the model as module/ has it (with a backend's name, the
    neurons alone are accelerated); `keep` and `glibc` choose whether freed memory is kept (ours does), `direct`
    computes the gradients of 3x3 convolutions without Winograd's algorithm.
    """

    name: str

    @property
    def parts(self) -> list[str]:
        """Implementation, precision, options. Raises ValueError for a name that says something else."""
        parts = self.name.split(":")
        if (
            parts[0] not in ("plain", "ours")
            or len(parts) < 2
            or parts[1] not in DTYPES
            or set(parts[2:]) - {*_OPTIONS}
        ):
            raise ValueError(
                f"candidate {self.name!r} is not plain or ours, one of {', '.join(DTYPES)}, and any of "
                f"{', '.join(_OPTIONS)}, joined by colons; for example ours:bf16:fuse"
            )
        return parts

    def build(self, size: str, device: torch.device, *, training: bool) -> tuple[Any, torch.memory_format]:
        kind, precision, *options = self.parts
        backend = next((option for option in options if option in _BACKENDS), None)
        self._switch(device)
        torch.manual_seed(0)
        arguments: dict[str, Any] = sizes.arguments(size)
        if kind == "ours":
            model = (sdt_v2 if sizes.is_v2(size) else sdt)(**arguments)
        else:  # the kernels are for the neurons of module.neuron
            plain = PlainMetaSpikeFormer if sizes.is_v2(size) else PlainSDT
            model = plain(**arguments, **({"neuron": make_neuron} if backend else {}))
        if sizes.is_v2(size):
            _make_fire(model, size)
        layout = torch.channels_last if "nhwc" in options else torch.contiguous_format
        model = model.to(device).to(memory_format=layout).train(training)
        if "checkpoint" in options:
            model.set_grad_checkpointing(True)
        # V2's merged convolutions are new layers, for which substitutes are found afterwards.
        merged = "fuse" in options and sizes.is_v2(size)
        if merged:
            model.fuse()
        whole = kind == "ours" and "unaccelerated" not in options
        if whole or backend:
            accelerate(
                model,
                kernels="auto" if whole else "plain",
                neuron_backend=backend or "auto",
                engine=next((option for option in options if option in ("sparse", "auto")), "dense"),
                amp_dtype=DTYPES[precision],
                training=training,
            )
        if "fuse" in options and not merged:
            model.fuse()
        return model, layout

    def training_step(self, size: str, batch: int, device: torch.device) -> Callable[[], float]:
        """Forward, cross entropy, backward and AdamW's update (fused for ours, torch's choice for plain)."""
        model, layout = self.build(size, device, training=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=self.parts[0] == "ours" or None)
        call = torch.compile(model) if "compile" in self.parts else model
        x, y = sizes.batch(size, batch, device)
        x = x.contiguous(memory_format=layout)

        def compute(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            with self._autocast(device):
                loss = F.cross_entropy(call(x)[0].float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach(), loss.detach()

        if "graph" in self.parts:
            if device.type != "cuda":
                raise ValueError(f"candidate {self.name}: CUDA graphs are for CUDA devices")
            compute = StepGraph(compute, optimizer)

        def step() -> float:
            self._switch(device)
            loss, _ = compute(x, y)
            return float(loss) if device.type == "cpu" else 0.0

        return step

    def evaluation(self, size: str, batch: int, device: torch.device) -> Callable[[], object]:
        """The forward pass of one batch."""
        model, layout = self.build(size, device, training=False)
        call = torch.compile(model) if "compile" in self.parts else model
        x = sizes.batch(size, batch, device)[0].contiguous(memory_format=layout)

        @torch.no_grad()
        def forward() -> object:
            self._switch(device)
            with self._autocast(device):
                return call(x)[0]

        return forward

    def _switch(self, device: torch.device) -> None:
        """Set what belongs to the process, before each step: candidates alternate."""
        if device.type == "cpu":
            ours = self.parts[0] == "ours"
            keep_freed_memory("keep" in self.parts or (ours and "glibc" not in self.parts))
            winograd.enabled = "direct" not in self.parts

    def _autocast(self, device: torch.device) -> torch.autocast:
        dtype = DTYPES[self.parts[1]]
        return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
