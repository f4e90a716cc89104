"""The settings inside a checkpoint: what a program takes from them when it is given no configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from utils.config.settings import SETTINGS, Config
from utils.config.yaml_file import Entry
from utils.errors import listed

# They describe the machine and the folders of the training, and how it was computed there, not what was trained.
NOT_TAKEN = frozenset(
    {
        *("output", "experiment", "plugin", "data_dir", "train_split_path", "dataset_download", "log_wandb"),
        *("resume", "initial_checkpoint", "initial_partial", "from_rates"),
        *("device", "local_rank", "workers", "pin_mem"),
        *("neuron_backend", "kernels", "engine", "bf16_input_grad", "compile"),
    }
)


def entries_inside(config: Mapping[Any, Any], path: str) -> tuple[list[Entry], list[str]]:
    """The settings to take, and a warning for each kind that is left out.

    Settings that are as by default are not taken, so that they do not count as given.
    """
    place, defaults = f"config in {path}", Config().as_dict()
    taken = [
        Entry(name, value, place)
        for name, value in config.items()
        if name in defaults and name not in NOT_TAKEN and value != defaults[name]
    ]
    warnings = []
    if unknown := sorted(str(name) for name in config if name not in SETTINGS):
        warnings.append(f"{place}: {listed(unknown)}: unknown to this version, left out")
    if plugins := config.get("plugin"):
        files = listed([str(file) for file in plugins]) if isinstance(plugins, list) else str(plugins)
        warnings.append(f"{place}: trained with the plugin {files}; it is imported only if you give it with --plugin")
    return taken, warnings
