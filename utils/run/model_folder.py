"""A model as a folder that timm reads: `config.json`, `model.safetensors` and a model card.

`timm.create_model("local-dir:FOLDER", pretrained=True)` (timm 1.0.16 or newer) builds it and loads its weights, and so
does `hf-hub:USER/NAME` after an upload. `config.json` also has the settings of the training, so `train.py
--initial-checkpoint FOLDER` and `firing_num.py --resume FOLDER` need no configuration file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from utils.config.settings import Config
from utils.data.facts import DataSettings
from utils.errors import UserError, first_line
from utils.files import replacing
from utils.run.models import model_arguments

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_SETTINGS = "training_config"  # our own key in config.json
_PAPERS = {
    False: "A Spike-driven Transformer (Yao et al., NeurIPS 2023, arXiv 2307.01694)",
    True: "A Spike-driven Transformer V2 (Yao et al., ICLR 2024, arXiv 2404.03663)",
}


def is_model_folder(path: Path) -> bool:
    """Whether `path` looks like such a folder."""
    return (path / CONFIG).is_file()


def write_model_folder(
    folder: Path, weights: Mapping[str, Tensor], cfg: Config, data: DataSettings, report: Mapping[str, Any] | None
) -> None:
    """Write the three files.

    Args:
        weights: as trained, BatchNorm not folded.
        report: content of a `report.json` of these weights, for the card; None leaves its figures out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in model_arguments(cfg).items() if name != "pretrained"}
    content = {
        "architecture": cfg.model,
        "num_classes": cfg.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": data.eval_size,
            "num_classes": cfg.num_classes,
            "mean": data.mean,
            "std": data.std,
            "interpolation": data.interpolation,
            "crop_pct": data.crop_pct,
            "classifier": "head",
        },
        _SETTINGS: cfg.as_dict() | {"plugin": None},
    }
    with replacing(folder / WEIGHTS) as temporary:
        save_file({name: value.contiguous().clone() for name, value in weights.items()}, temporary, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    (folder / CARD).write_text(model_card(cfg, report))


def read_model_folder(folder: Path) -> dict[str, Any]:
    """The folder as a checkpoint: `state_dict` and, if this project wrote the folder, `config`.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        content = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"checkpoint {folder}: the folder has no readable {CONFIG} and {WEIGHTS} ({first_line(error)}); make it "
            "again with python -m utils.export CHECKPOINT --to hub"
        ) from error
    settings = content.get(_SETTINGS) if isinstance(content, dict) else None
    return {"state_dict": weights} | ({"config": settings} if isinstance(settings, dict) else {})


def model_card(cfg: Config, report: Mapping[str, Any] | None) -> str:
    """The card, Markdown with the header that model hubs read."""
    lines = [
        *("---", "library_name: timm", "license: apache-2.0", "tags:", "- image-classification", "- spiking"),
        *("- spike-driven-transformer", "---", ""),
        f"# {cfg.model}, {cfg.dataset}, T = {cfg.time_steps}",
        "",
        f"{_PAPERS[cfg.is_v2]}.",
        "",
        "```python",
        "import timm",
        "import model  # of the Spike-driven Transformer project: registers the architecture",
        "",
        'net = timm.create_model("local-dir:FOLDER", pretrained=True).eval()',
        "logits, _ = net(images)  # normalised as pretrained_cfg in config.json says",
        "```",
        "",
        "## Measured",
        "",
    ]
    if report is None:
        lines.append("Not measured. `python firing_num.py --resume FOLDER` does.")
    else:
        energy = report["energy"]
        rate = report["mean_firing_rate"]
        lines += [
            "| | |",
            "|---|---|",
            f"| top-1 | {report['top1_percent']:.2f}% of {report['samples']:,} samples |",
            f"| top-5 | {report['top5_percent']:.2f}% |",
            f"| time steps | {report['time_steps']} |",
            *([f"| mean firing rate | {rate:.4f} |"] if rate is not None else []),
            f"| additions per sample | {energy['ac_operations']:,.0f} |",
            f"| multiply-accumulates per sample | {energy['mac_operations']:,.0f} |",
            f"| energy per sample, {energy['mode']}, {energy['cost']['name']} | {energy['total_mJ'] * 1000:.3f} µJ |",
            "",
            "Energy is computed from counted operations; it is not measured power.",
        ]
    lines += ["", "## Settings of the training", "", "```yaml"]
    defaults = Config()
    lines += [
        f"{name}: {json.dumps(value)}" for name, value in cfg.as_dict().items() if value != getattr(defaults, name)
    ]
    return "\n".join([*lines, "```", ""])


def upload(folder: Path, repository: str) -> str:
    """Upload the folder to the Hugging Face hub, as the user who is logged in there; the address.

    Raises:
        UserError: the hub cannot be reached or refuses, with its reason.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi(library_name="timm")
        name = api.create_repo(repository, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Spike-driven Transformer")
    except Exception as error:  # its kinds of error, and those of the network below it
        raise UserError(
            f"--upload {repository}: {type(error).__name__}: {first_line(error)}; log in with hf auth login, and give "
            "USER/NAME"
        ) from error
    return f"https://huggingface.co/{name}"
