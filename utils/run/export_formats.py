"""A trained model in the formats of other tools: how each is written, and read back.

The model is traced as it is written, neurons included: what they do at each of the T time steps becomes arithmetic of
tensors. So every neuron and every part of the user's own that torch.export can follow is exported as it computes.

Legend: B batch, T time steps, C channels, H x W image, K classes.
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.config.settings import Config
from utils.data.facts import DataSettings
from utils.errors import UserError, first_line
from utils.run.model_folder import write_model_folder

OPSET = 20  # of ONNX; the newest that the exporter of torch 2.6 writes
Run = Callable[[Tensor], Tensor]


class Logits(nn.Module):
    """Images `[B, C, H, W]` or event frames `[B, T, C, H, W]` -> logits `[B, K]`, averaged over T."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits, _hook = self.model(x)
        return logits.mean(dim=0) if logits.dim() == 3 else logits


@dataclass(frozen=True)
class Source:
    """What is exported."""

    model: nn.Module  # in evaluation mode, on a CPU
    example: Tensor  # a batch of two samples
    cfg: Config
    data: DataSettings
    report: Mapping[str, Any] | None  # of `firing_num.py` for these weights

    @property
    def facts(self) -> dict[str, Any]:
        """What a user of the file must know to prepare its input."""
        return {
            "model": self.cfg.model,
            "dataset": self.cfg.dataset,
            "input": ["batch", *self.example.shape[1:]],
            "mean": self.data.mean,
            "std": self.data.std,
            "crop_pct": self.data.crop_pct,
            "interpolation": self.data.interpolation,
            "time_steps": self.cfg.time_steps,
        }


class Format(ABC):
    """One kind of file.

    Attributes:
        name: as `--to` has it.
        suffix: of the file's name.
        packages: what must be installed, beside the project's requirements.
        takes_folded: whether BatchNorm may be folded before; else the file has the weights as trained.
    """

    name: str
    suffix: str
    packages: tuple[str, ...] = ()
    takes_folded = True

    def check(self) -> None:
        """UserError, with what to install, if a package is missing."""
        if missing := [name for name in self.packages if importlib.util.find_spec(name) is None]:
            raise UserError(
                f"--to {self.name} needs {' and '.join(missing)}; install with python -m pip install "
                f"{' '.join(missing)}"
            )

    @abstractmethod
    def write(self, source: Source, path: Path) -> str:
        """Write the model and what is known of it; what to say of the file."""

    @abstractmethod
    def load(self, path: Path, model: nn.Module) -> Run:
        """The file as a function from a batch to logits; `model` is one of the same architecture."""


class TorchExport(Format):
    """A program of `torch.export`: runs in PyTorch without this project, and is what AOTInductor compiles."""

    name, suffix = "pt2", ".pt2"

    def write(self, source: Source, path: Path) -> str:
        program = traced(source.model, source.example)
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={"facts.json": json.dumps(source.facts)})
        return f"{sum(node.op == 'call_function' for node in program.graph.nodes)} operations"

    def load(self, path: Path, model: nn.Module) -> Run:
        with path.open("rb") as file:
            program: Run = torch.export.load(file).module()
        return program


class Onnx(Format):
    """ONNX with standard operators only, for ONNX Runtime and what else reads it."""

    name, suffix, packages = "onnx", ".onnx", ("onnx", "onnxscript", "onnxruntime")

    def write(self, source: Source, path: Path) -> str:
        import onnx

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter's own code
            written = torch.onnx.export(
                traced(source.model, source.example), (source.example,), dynamo=True, opset_version=OPSET, verbose=False
            )
        assert written is not None
        proto = written.model_proto
        proto.metadata_props.extend(
            onnx.StringStringEntryProto(key=name, value=json.dumps(value)) for name, value in source.facts.items()
        )
        if foreign := sorted({node.domain for node in proto.graph.node} - {"", "ai.onnx"}):
            raise UserError(
                f"--to onnx: the model needs operators of {', '.join(foreign)}, which are not standard ONNX"
            )
        onnx.checker.check_model(proto)
        onnx.save(proto, path)
        return f"opset {OPSET}, {len(proto.graph.node)} standard operators"

    def load(self, path: Path, model: nn.Module) -> Run:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (entry,) = session.get_inputs()
        return lambda x: torch.from_numpy(session.run(None, {entry.name: x.numpy()})[0])


class Safetensors(Format):
    """The weights alone, under their published names, for any program that builds the model itself."""

    name, suffix, packages, takes_folded = "safetensors", ".safetensors", ("safetensors",), False

    def write(self, source: Source, path: Path) -> str:
        from safetensors.torch import save_file

        tensors = {name: value.contiguous().clone() for name, value in source.model.state_dict().items()}
        save_file(tensors, path, metadata={name: json.dumps(value) for name, value in source.facts.items()})
        return f"{len(tensors)} tensors"

    def load(self, path: Path, model: nn.Module) -> Run:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(path), strict=True)
        return Logits(model).eval()


class Hub(Format):
    """A folder that timm reads, see `utils.run.model_folder`."""

    name, suffix, takes_folded = "hub", "-hub", False

    def write(self, source: Source, path: Path) -> str:
        write_model_folder(path, source.model.state_dict(), source.cfg, source.data, source.report)
        return "for timm.create_model('local-dir:...', pretrained=True)" + (
            ", with the report" if source.report else ""
        )

    def load(self, path: Path, model: nn.Module) -> Run:
        import timm

        net = timm.create_model(f"local-dir:{path}", pretrained=True)
        return Logits(net).eval()


FORMATS: dict[str, Format] = {kind.name: kind for kind in (TorchExport(), Onnx(), Safetensors(), Hub())}
# What is refused, and why; see docs/export.md.
REFUSED = {
    "torchscript": "torch is giving TorchScript up, and it cannot script neurons that keep a state; use pt2 or onnx",
    "nir": "NIR's neuron fires above its threshold, the published one also at it, and NIR has neither a max-pool of "
    "membrane values nor a product of spikes: no model of this project can be written exactly (docs/export.md)",
}


def traced(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """The program of `Logits(model)`; its batch may have any size.

    Raises:
        UserError: torch.export cannot follow the model, with its reason.
    """
    try:
        with torch.no_grad():
            return torch.export.export(
                Logits(model).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False
            )
    except Exception as error:
        raise UserError(
            f"torch.export cannot follow the model ({type(error).__name__}: {first_line(error)}); in a part of your "
            "own, avoid Python decisions on values of tensors"
        ) from error
