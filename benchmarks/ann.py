"""The ANN twin of a Spike-driven Transformer, as something to run: the same layers with real values, one pass.

ReLU stands in place of each neuron, softmax attention in place of the spike-driven one, BatchNorm is folded, q, k and v
are one product. The weights are the spiking network's: only the time is of interest.

Legend: B batch, C channels, H x W feature map, D embed_dims, h heads, N = H*W tokens, K classes.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from module.folding import folded
from utils.run.export_formats import OPSET

Run = Callable[[Tensor], Any]


class Block(nn.Module):
    """Self-attention and MLP with shortcuts."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.heads = attn.num_heads
        parts = [folded(getattr(attn, f"{x}_conv"), getattr(attn, f"{x}_bn")) for x in "qkv"]
        self.qkv = nn.Conv2d(attn.dim, 3 * attn.dim, 1)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            self.qkv.bias.copy_(torch.cat([part.bias for part in parts]))  # type: ignore[union-attr]
        self.proj = folded(attn.proj_conv, attn.proj_bn)
        self.fc1 = folded(mlp.fc1_conv, mlp.fc1_bn)
        self.fc2 = folded(mlp.fc2_conv, mlp.fc2_bn)
        self.relu = nn.ModuleList(nn.ReLU() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.relu[1](self.qkv(self.relu[0](x)))
        B, width, H, W = qkv.shape
        tokens = qkv.permute(0, 2, 3, 1).reshape(B, H * W, 3, self.heads, width // (3 * self.heads))
        q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)  # [B, h, N, D/h]
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, H, W, width // 3)
        x = self.proj(y.permute(0, 3, 1, 2)) + x
        return self.fc2(self.relu[3](self.fc1(self.relu[2](x)))) + x


class ANN(nn.Module):
    """The twin of `model`, a `SpikeDrivenTransformer` in evaluation mode: images `[B, C, H, W]` -> `[B, K]`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        sps = model.patch_embed
        stages: list[nn.Module] = []
        for i in ("", "1", "2"):
            stages += [folded(getattr(sps, f"proj_conv{i}"), getattr(sps, f"proj_bn{i}")), nn.ReLU()]
            stages += [getattr(sps, f"maxpool{i}")]
        stages += [folded(sps.proj_conv3, sps.proj_bn3), sps.maxpool3]
        self.stages = nn.Sequential(*(stage for stage in stages if not isinstance(stage, nn.Identity)))
        self.relu = nn.ReLU()
        self.rpe = folded(sps.rpe_conv, sps.rpe_bn)
        self.blocks = nn.Sequential(*map(Block, model.block))
        self.head_relu = nn.ReLU()
        self.head = model.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(x)
        x = self.blocks(self.rpe(self.relu(x)) + x)
        return self.head(self.head_relu(x.mean(dim=(2, 3))))


def int8(net: ANN, x: Tensor) -> Run:
    """Convolutions, shortcuts and the head in 8 bits, calibrated on `x`; the attention itself stays in float32."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves this to a package of its own, torchao
        prepared = prepare_fx(net, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
        run: Run = convert_fx(prepared)
    return run


def onnx(net: nn.Module, x: Tensor, *, quantized: bool = False) -> Run:
    """`net` for batches of the shape of `x` in ONNX Runtime, on torch's number of threads; `quantized`: in 8 bits."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own code
        path = Path(folder) / "net.onnx"
        torch.onnx.export(net, (x,), path, dynamo=True, opset_version=OPSET, verbose=False, external_data=False)
        if quantized:
            path = _quantized(path, x)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    return lambda x: session.run(None, {entry.name: x.numpy()})[0]


def _quantized(path: Path, x: Tensor) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.batches = iter([{name: x.numpy()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    import onnx as onnx_package

    name = onnx_package.load(path).graph.input[0].name
    prepared, made = path.with_name("prepared.onnx"), path.with_name("int8.onnx")
    quant_pre_process(path, prepared)
    # Without VNNI two products of full 8-bit weights overflow the 16 bits that AVX2 adds them in: 7 bits there.
    quantize_static(prepared, made, Once(name), weight_type=QuantType.QInt8, reduce_range=True, per_channel=True)
    return made
