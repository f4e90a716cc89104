"""Several networks beside each other: checkpoints, each measured as the model that it was trained as, and reports of
earlier measurements."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from utils.config.inside import entries_inside
from utils.config.parse import config_from
from utils.config.settings import Config
from utils.errors import UserError, first_line
from utils.files import read_text
from utils.measure.energy import PJ_PER_MJ
from utils.measure.latency import median_latencies_ms, run_ms
from utils.measure.measurement import Measurement, checkpoint_facts, chosen_hardware
from utils.run.checkpoint import read_checkpoint
from utils.run.distributed import Process
from utils.run.plugins import import_plugins, say_what_changed

_REPORT, _BEST = "report.json", "model_best.pth.tar"  # what a folder is taken for, in this order


@dataclass(frozen=True)
class Compared:
    """One network of a comparison."""

    name: str  # the part of its path that tells it from the others
    path: str
    sha256: str | None  # of the checkpoint
    model: str
    neuron: str
    time_steps: int
    parameters: float | None  # None where an older report does not tell
    dataset: str
    samples: int
    top1_percent: float
    mean_firing_rate: float | None
    mac_operations: float  # per sample, as are the next two
    ac_operations: float
    energy_mJ: float
    incomplete: list[str]  # operators without a price
    mode: str
    first_conv: str
    ann_energy_mJ: float | None  # None for a model of no known family
    ann_ratio: float | None
    models_mJ: dict[str, float]  # energy of this network by model
    latency_ms: float | None = None  # of one sample alone; None for a report


def compare(cfg: Config, process: Process) -> list[Compared]:
    """Measure what `cfg.compare` names, all processes together, in its order.

    The script must have imported `model`, which registers the names.

    Raises:
        UserError: a file is missing, no checkpoint with settings and no report, or cannot be measured as asked.
    """
    paths = [_file(path) for path in cfg.compare or ()]
    if twice := sorted({str(path) for path in paths if paths.count(path) > 1}):
        raise UserError(f"compare: {twice[0]} is given twice; give each file once")
    names = short_names(paths)
    # What may fail comes first: a wrong file should not cost the evaluation of the others.
    found: list[Compared | Measurement] = [
        _of_report(path, name, cfg) if path.suffix == ".json" else _measurement(path, cfg, process)
        for path, name in zip(paths, names, strict=True)
    ]
    measurements = [one for one in found if isinstance(one, Measurement)]
    rows = [
        _measured(one, path, name) if isinstance(one, Measurement) else one
        for one, path, name in zip(found, paths, names, strict=True)
    ]
    latencies = iter(_latencies_ms(measurements))
    return [
        replace(row, latency_ms=next(latencies)) if isinstance(one, Measurement) else row
        for row, one in zip(rows, found, strict=True)
    ]


def _file(given: str) -> Path:
    """The file that a path stands for: of a folder, its report or its best checkpoint."""
    path = Path(given)
    if not path.is_dir():
        return path
    for name in (_REPORT, _BEST):
        if (path / name).is_file():
            return path / name
    raise UserError(f"compare: folder {path} has no {_REPORT} and no {_BEST}; give a checkpoint or a {_REPORT}")


def short_names(paths: Sequence[Path]) -> list[str]:
    """A name for each path: that of its folder, else folder and file, else the whole path, as it takes to be unique."""
    full = [path.absolute() for path in paths]
    names = [path.parent.name for path in full]
    for longer in (lambda path: f"{path.parent.name}/{path.name.removesuffix('.json').removesuffix('.pth.tar')}", str):
        names = [longer(path) if names.count(name) > 1 else name for name, path in zip(names, full, strict=True)]
    return names


def _measurement(path: Path, cfg: Config, process: Process) -> Measurement:
    """A checkpoint, ready to be evaluated."""
    own = settings_of(path, read_checkpoint(path, say=False), cfg)
    import_plugins(own.plugin)
    try:
        measurement = Measurement(own, process)
    except UserError as error:
        raise UserError(f"compare: {path}: {error}") from error
    say_what_changed(measurement.checkpoint, path, alone=False)
    return measurement


def settings_of(path: Path, checkpoint: Mapping[str, Any], cfg: Config) -> Config:
    """What `checkpoint` was trained with (utils.config.inside); what `cfg` gives explicitly comes before that.

    Raises:
        UserError: the checkpoint holds no settings, or such as are not valid.
    """
    trained = checkpoint.get("config")
    if not isinstance(trained, Mapping):
        raise UserError(
            f"compare: checkpoint {path} holds no settings (config), as those of train.py do; measure it with -c CONF "
            f"--resume {path}, and give the {_REPORT} of that measurement"
        )
    kept = {entry.key: entry.value for entry in entries_inside(trained, str(path))[0]}
    given = {name: getattr(cfg, name) for name in cfg.explicit if name not in ("config", "compare")}
    return config_from(kept | given | {"resume": str(path)}, source=f"compare: {path}")


def _measured(measurement: Measurement, path: Path, name: str) -> Compared:
    found = measurement.evaluate(name)
    energy, cfg = found.energy, measurement.cfg
    twin = found.compare(energy)
    return Compared(
        name=name,
        path=str(path),
        sha256=checkpoint_facts(str(path), measurement.checkpoint)["sha256"],
        model=found.family.shape.title if found.family else cfg.model,
        neuron=cfg.spike_mode,
        time_steps=found.counts.time_steps,
        parameters=measurement.parameters,
        dataset=cfg.dataset,
        samples=found.accuracy.samples,
        top1_percent=found.accuracy.top1,
        mean_firing_rate=found.mean_firing_rate,
        mac_operations=energy.operations("MAC"),
        ac_operations=energy.operations("AC"),
        energy_mJ=energy.total_mJ,
        incomplete=energy.incomplete,
        mode=energy.mode,
        first_conv=energy.first_conv,
        ann_energy_mJ=twin.energy_mJ if twin else None,
        ann_ratio=twin.ratio if twin else None,
        models_mJ={total.model.name: total.snn_pJ / PJ_PER_MJ for total in found.models},
    )


def _latencies_ms(measurements: Sequence[Measurement]) -> list[float]:
    def run_of(m: Measurement) -> Callable[[], float]:
        x, _ = m.first_batch(1)
        return lambda: run_ms(m.model, x, m.precision)

    return median_latencies_ms([run_of(m) for m in measurements])


def _of_report(path: Path, name: str, cfg: Config) -> Compared:
    """A network that was measured before, in the accounting that this comparison uses."""
    place = f"compare: {path}"
    try:
        content = json.loads(read_text(path))
    except OSError as error:
        raise UserError(f"{place}: cannot be read ({error.strerror}); give a checkpoint or a {_REPORT}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: no JSON ({first_line(error)}); give a checkpoint or a {_REPORT}") from error
    try:
        return _read(content, str(path), name, cfg, place)
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{place}: no report of a measured checkpoint ({type(error).__name__}: {error}); give a checkpoint, or the "
            f"{_REPORT} that firing_num.py --resume writes"
        ) from error


def _read(content: Any, path: str, name: str, cfg: Config, place: str) -> Compared:
    config, energy, cost = content["config"], content["energy"], chosen_hardware(cfg).cost
    if [energy["cost"][of] for of in ("mac", "ac")] != [cost.mac, cost.ac]:
        raise UserError(f"{place}: its costs are {energy['cost']}, here they are {asdict(cost)}; measure it again")
    totals = {total["mode"]: total for total in content["totals"]}
    if cfg.energy_mode not in totals:
        modes = ", ".join(totals)
        raise UserError(
            f"{place}: has no total in mode {cfg.energy_mode}, only in {modes}; give another --energy-mode, or measure "
            "it again"
        )
    total, twin = totals[cfg.energy_mode], content["ann_twin"]
    return Compared(
        name=name,
        path=path,
        sha256=content["checkpoint"]["sha256"],
        model=content.get("network") or config["model"],
        neuron=config["spike_mode"],
        time_steps=int(content["time_steps"]),
        parameters=_number(content.get("parameters")),
        dataset=config["dataset"],
        samples=int(content["samples"]),
        top1_percent=float(content["top1_percent"]),
        mean_firing_rate=_number(content["mean_firing_rate"]),
        mac_operations=float(total["mac_operations"]),
        ac_operations=float(total["ac_operations"]),
        energy_mJ=float(total["energy_mJ"]),
        incomplete=energy.get("incomplete", []),
        mode=total["mode"],
        first_conv=total["first_conv"],
        ann_energy_mJ=_number(twin["energy_mJ"]) if twin else None,
        ann_ratio=_number(total["ann_ratio"]),
        models_mJ={one["model"]: float(one["snn_mJ"]) for one in content.get("energy_models", ())},
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
