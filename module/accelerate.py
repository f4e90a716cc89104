"""`accelerate(model)`: attach faster ways to compute its parts, each after a proof that it computes the same.

A model that nobody accelerated is plain: what stands in module/ is what runs. A faster way, a substitute, stands for
exactly one class whose methods nobody changed. Two guards keep it from computing something else:

- Fingerprints guard against edits. Each substitute names the methods it stands for, with a fingerprint of their syntax
  tree. Where one differs, in a derived class or because somebody edited the file, the part runs as it is written.
- Numbers guard against kernels and devices: see `module.kernels.proof`.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from module.attention import MS_SSA_Conv
from module.kernels import backends, cpu, proof, triton_device
from module.kernels.neurons import KernelNeuron, substitute_for
from module.kernels.parts import PARTS, FusedPart
from module.kernels.parts_v2 import PARTS_V2
from module.kernels.substitute import Context, Substitute, plain_class
from module.neuron import neurons_of
from module.sps import MS_SPS
from module.v2.conv import DownSampling, SeparableConv
from module.v2.repconv import RepConv

KERNELS = ("auto", "plain")
# Kind of part -> why its substitute may not run, or None. All processes of a run must come to the same answer.
Agree = Callable[[dict[str, str | None]], dict[str, str | None]]

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger("sdt")
# Parts that contain others come later: they are proved with these.
_LEVELS = (PARTS | PARTS_V2[0], PARTS_V2[1])
_ALL_PARTS = _LEVELS[0] | _LEVELS[1]
_WITHOUT = ("torch.", "timm.", "spikingjelly.", "module.", "model")
_on_bits: dict[tuple[type[nn.Module], str], str | None] = {}


class Row(NamedTuple):
    """How the parts of one class run."""

    part: str
    number: int
    runs_as: str
    why_not_faster: str = ""


class _Candidate(NamedTuple):
    part: nn.Module
    substitute: type[Substitute]
    settings: dict[str, object]  # attributes of the substitute


def accelerate(
    model: Model,
    *,
    kernels: str = "auto",
    neuron_backend: str = "auto",
    engine: str = "dense",
    bf16_input_grad: bool = False,
    amp_dtype: torch.dtype | None = None,
    training: bool = True,
    prove: bool = True,
    agree: Agree | None = None,
) -> Model:
    """Attach what computes `model` faster on the device that it is on, in place; returns the model.

    May be called again, with other arguments or after the model was moved: earlier substitutes are taken off first.

    Args:
        model: on its device, with its dtype, and with its layers converted (synchronised BatchNorm) before.
        kernels: `auto`, or `plain` for no substitute but what `neuron_backend` and `engine` ask for by name.
        neuron_backend: `auto`, or one of `module.kernels.backends.BACKENDS`, for the neurons alone. A substitute that
            contains another neuron is then left out.
        engine: convolutions of spikes on a CPU: `dense`, `sparse` (additions of weight rows), or `auto` (for each layer
            and call whichever is faster).
        bf16_input_grad: sparse convolutions compute the gradient of their input in bfloat16.
        amp_dtype: the dtype of autocast, where the run uses it.
        training: whether the model will be trained; else only evaluation is proved, and only there it is fast.
        prove: False attaches without comparing numbers, for analysis on fake or meta tensors; an edited method still
            runs as it is written.
        agree: combines the answers of several processes, so that all attach the same.

    Raises:
        ValueError: an unknown name, or a neuron backend that cannot run here, with the reason.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is not one of {', '.join(KERNELS)}")
    detach(model)
    parameter = next(model.parameters(), torch.empty(0))
    contexts = _contexts(parameter, amp_dtype, training)
    steps = int(getattr(model, "T", 4))
    reasons: dict[type[nn.Module], str] = {}
    for backend in _backends(kernels, neuron_backend, parameter.device, prove, agree):
        failed: dict[type[nn.Module], str] = {}
        _attach(list(_neurons(model, backend)), contexts, steps, prove, agree, failed)
        if not failed or parameter.device.type != "cuda":
            break
        _logger.warning(f"warning: neurons do not run on {backend}: {next(iter(failed.values()))}")
        detach(model)  # on CUDA there is another backend to try
    reasons |= failed
    # Parts last: they are proved with the neurons and convolutions that they will run with.
    for candidates in (
        _convolutions(model, engine, bf16_input_grad, reasons),
        *(_parts(model, level, kernels, parameter.device, prove, reasons) for level in _LEVELS),
    ):
        _attach(list(candidates), contexts, steps, prove, agree, reasons)
    model.acceleration = _rows(model, kernels, backend, reasons)  # type: ignore[assignment]
    return model


def detach(model: nn.Module) -> None:
    """Take every substitute off, in place."""
    for part in model.modules():
        if isinstance(part, Substitute):
            part.__class__ = plain_class(part)  # type: ignore[assignment]
            for name in ("proved", "kernel", "auto", "bf16_input_grad", "counts"):
                vars(part).pop(name, None)


def rows(model: nn.Module) -> list[Row]:
    """Which part runs how, and why not faster; empty for a model that was never accelerated."""
    return list(getattr(model, "acceleration", []))


def for_evaluation(model: nn.Module) -> nn.Module:
    """What evaluates these weights fastest: with a sparse engine the way from spikes to spikes where it can run and is
    proved (`module.sparse.inference`), else the model itself. Called like the model; does not follow later updates."""
    from module.sparse.conv import SparseConv2d

    layers = [layer for layer in model.modules() if isinstance(layer, SparseConv2d)]
    if not layers:
        return model
    from module.sparse.inference import ON_BITS, SparseInference, why_not

    if why_not(model) is not None:
        return model
    for part in model.modules():
        kind = plain_class(part)
        if kind not in ON_BITS:
            continue
        key = (kind, repr(part))
        if key not in _on_bits:
            fast = proof.detached(part)
            fast.__class__ = ON_BITS[kind]
            vars(fast).update(proved=None)
            context = (torch.device("cpu"), torch.float32, None, False)
            _on_bits[key] = _difference(fast, [context], int(getattr(model, "T", 4)))
            if reason := _on_bits[key]:
                _logger.warning(f"warning: evaluation does not run from spikes to spikes: {kind.__name__}: {reason}")
        if _on_bits[key] is not None:
            return model
    return SparseInference(model)


def _backends(
    kernels: str, neuron_backend: str, device: torch.device, prove: bool, agree: Agree | None
) -> Iterator[str]:
    """The backends to try for the neurons, fastest first; all processes try the same."""
    if neuron_backend != "auto":
        # Fake tensors say that they are on a device that may not be there.
        yield backends.check_backend(neuron_backend, device, runs=prove)
        return
    for backend in backends.fastest_first(device) if kernels == "auto" else ():
        reason = backends.why_not(backend, device) if prove or device.type != "cuda" else None
        if agree is not None:
            (reason,) = agree({f"neurons on {backend}": reason}).values()
        if reason is None:
            yield backend
        else:
            _logger.warning(f"warning: neurons do not run on {backend}: {reason}")
    yield "torch"


def _contexts(parameter: torch.Tensor, amp_dtype: torch.dtype | None, training: bool) -> list[Context]:
    dtypes = dict.fromkeys((parameter.dtype, amp_dtype or parameter.dtype))
    modes = (True, False) if training else (False,)
    return [(parameter.device, dtype, amp_dtype, mode) for dtype in dtypes for mode in modes]


def _neurons(model: nn.Module, backend: str) -> Iterator[_Candidate]:
    for neuron in neurons_of(model).values():
        if (of_neuron := substitute_for(neuron, backend)) is not None:
            yield _Candidate(neuron, of_neuron, {"kernel": backend} if backend != "cupy" else {})


def _convolutions(
    model: nn.Module, engine: str, bf16_input_grad: bool, reasons: dict[type[nn.Module], str]
) -> Iterator[_Candidate]:
    if engine == "dense":
        return
    # Imported here: it registers operators, which a dense model has no use for.
    from module.sparse import conv

    engine = conv.check_engine(engine)
    if reason := conv.why_unusable():
        _logger.warning(f"warning: engine {engine} is not available, convolutions stay dense: {reason}")
        reasons[nn.Conv2d] = reason
        return
    others = set(map(id, _of_real_values(model)))
    for layer in model.modules():
        if id(layer) not in others and (sparse := conv.substitute_for(layer)) is not None:
            yield _Candidate(layer, sparse, {"auto": engine == "auto", "bf16_input_grad": bf16_input_grad})


def _of_real_values(model: nn.Module) -> Iterator[object]:
    """Convolutions of the published parts that no spikes enter: of images, those inside of V2's parts, unused ones."""
    for part in model.modules():
        if isinstance(part, MS_SPS):
            yield part.proj_conv
        elif isinstance(part, MS_SSA_Conv):
            yield part.talking_heads  # only a key of the checkpoint
        elif isinstance(part, DownSampling) and part.first:
            yield part.encode_conv
        elif isinstance(part, SeparableConv):
            yield part.pwconv2
        elif isinstance(part, RepConv):
            yield from part.body[2]  # type: ignore[misc]


def _parts(
    model: nn.Module,
    level: Mapping[type[nn.Module], type[FusedPart]],
    kernels: str,
    device: torch.device,
    prove: bool,
    reasons: dict[type[nn.Module], str],
) -> Iterator[_Candidate]:
    if kernels == "plain":
        return
    if device.type == "cpu":
        reason = cpu.why_unusable()
    elif device.type == "cuda":
        reason = triton_device.why_not(device) if prove else None
    else:
        reason = f"none exists for {device.type}"
    for part in model.modules():
        if type(part) in level:
            if reason is None:
                yield _Candidate(part, level[type(part)], {})
            reasons[type(part)] = reason or ""


def _attach(
    candidates: list[_Candidate],
    contexts: list[Context],
    steps: int,
    prove: bool,
    agree: Agree | None,
    reasons: dict[type[nn.Module], str],
) -> None:
    """Compare one of each kind, and attach those that passed in all processes."""
    names = [f"{c.substitute.__name__} for {c.part!r}" for c in candidates]
    kinds = dict(zip(names, candidates, strict=True))
    answers = {kind: _edited(c) or (_why_not(c, contexts, steps) if prove else None) for kind, c in kinds.items()}
    if agree is not None:
        answers = agree(answers)
    refused = {(plain_class(kinds[kind].part), answer): None for kind, answer in answers.items() if answer is not None}
    for part, answer in refused:
        reasons[part] = answer
        _logger.warning(f"warning: {part.__name__} runs plain: {answer}")
    for name, candidate in zip(names, candidates, strict=True):
        if answers[name] is None:
            _become(candidate, frozenset(_seen(candidate, contexts)) if prove else None)


def _become(candidate: _Candidate, proved: frozenset[Context] | None) -> nn.Module:
    part = candidate.part
    part.__class__ = candidate.substitute
    vars(part).update(candidate.settings, proved=proved)
    return part


def _seen(candidate: _Candidate, contexts: list[Context]) -> list[Context]:
    """The contexts that the substitute can compute, as it tells them apart."""
    substitute, settings = candidate.substitute, candidate.settings
    return list(dict.fromkeys(substitute.seen(c) for c in contexts if substitute.computes(c[1], settings)))


def _edited(candidate: _Candidate) -> str | None:
    edited = candidate.substitute.edited()
    return f"{', '.join(edited)} differs from what the faster way was written for" if edited else None


def _why_not(candidate: _Candidate, contexts: list[Context], steps: int) -> str | None:
    if not (possible := _seen(candidate, contexts)):
        return f"its kernel does not compute {', '.join(str(c[1]).removeprefix('torch.') for c in contexts)}"
    fast = _become(candidate._replace(part=copy.deepcopy(candidate.part)), None)
    proof.unwatch(fast)
    return _difference(fast, possible, steps)


def _difference(fast: nn.Module, contexts: list[Context], steps: int) -> str | None:
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            return proof.difference(fast, contexts, steps)
    except Exception as error:  # whatever a kernel raises, the plain part still runs
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"


def _rows(model: nn.Module, kernels: str, backend: str, reasons: dict[type[nn.Module], str]) -> list[Row]:
    found: Counter[tuple[str, str, str]] = Counter()
    neurons = {id(neuron) for neuron in neurons_of(model).values()}
    on_triton = triton_device.runs(next(model.parameters(), torch.empty(0)))
    for part in model.modules():
        kind = type(part)
        base = next((known for known in _ALL_PARTS if isinstance(part, known)), None)
        foreign = not kind.__module__.startswith(_WITHOUT)
        if isinstance(part, Substitute):
            how = f"{part.kernel} {part.runs_as}" if isinstance(part, KernelNeuron) else part.runs_as
            if on_triton and isinstance(part, FusedPart):
                how = "Triton kernels"
            found[part.plain_class.__name__, how, ""] += 1
        elif id(part) in neurons:
            why = reasons.get(kind) or ("" if backend == "torch" else "no kernel for this class")
            found[kind.__name__, "SpikingJelly's torch code" if not foreign else "plain", why] += 1
        elif kind in _ALL_PARTS:
            found[kind.__name__, "plain", reasons.get(kind) or f"kernels: {kernels}"] += 1
        elif base is not None:
            found[kind.__name__, "plain", f"derived from {base.__name__}: its own code runs"] += 1
        elif foreign and part is not model:
            found[kind.__name__, "plain", "no faster way is known for this class"] += 1
    return [Row(part, count, how, why) for (part, how, why), count in found.items()]
