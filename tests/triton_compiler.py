"""Triton kernels compiled ahead of time, as they would be launched: no device is needed.

`recorded(monkeypatch)` turns every launch into a `Launch`; what the functions of the kernels return is not computed.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclasses.dataclass
class Launch:
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        kinds = [_TYPES[a.dtype] for a in self.arguments if isinstance(a, Tensor)]
        return f"{self.kernel.__module__.rpartition('.')[2]}{self.kernel.__name__} {kinds[0]} {self.constants}"

    def compiled(self, architecture: int, folder: Path) -> Compiled:
        names = self.kernel.arg_names
        signature, attributes = {}, {}
        for i, (name, value) in enumerate(zip(names, self.arguments, strict=False)):
            if isinstance(value, Tensor):
                signature[name] = f"*{_TYPES[value.dtype]}"
                attributes[i,] = [["tt.divisibility", 16]]
            else:
                assert isinstance(value, int)
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if (
                    value % 16 == 0
                    and i not in self.kernel.do_not_specialize
                    and name not in self.kernel.do_not_specialize
                ):
                    attributes[i,] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(self.constants, "constexpr")
        source = ASTSource(self.kernel, signature=signature, constexprs=self.constants, attrs=attributes)
        target = GPUTarget("cuda", architecture, 32)
        code = triton.compile(source, target=target, options={"enable_fp_fusion": False})
        file = folder / "kernel.cubin"
        file.write_bytes(code.asm["cubin"])
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True).stdout
        numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        return Compiled(code.asm["ttir"], code.asm["ptx"], numbers["REG"], numbers["STACK"] + numbers["LOCAL"])


@dataclasses.dataclass
class Compiled:
    ttir: str
    ptx: str
    registers: int
    spilled: int  # bytes per thread


def recorded(monkeypatch: Any, *modules: Any) -> list[Launch]:
    """Where the launches of these modules end from now on."""
    found: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        assert all(size < 2**31 for size in grid[:1])
        assert all(size < 2**16 for size in grid[1:])
        found.append(Launch(kernel, arguments, constants))

    for module in modules:
        monkeypatch.setattr(module, "launch", launch)
    return found
