"""Every file in conf/ loads, names itself and holds what its name says, the published ones golden values."""

import json
import re
from pathlib import Path

import pytest

from utils.config.parse import load_yaml
from utils.config.settings import SETTINGS, Config

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "conf").rglob("*.yml"))
PUBLISHED = json.loads((GOLDEN / "configs.json").read_text())
PARAMETERS = {name: entry["params"] for name, entry in json.loads((GOLDEN / "state_dicts.json").read_text()).items()}

# use_conv_as_linear has no effect. mixup_off_epoch 200 never took effect there, and here it would.
DIFFERENT_ON_PURPOSE = {"use_conv_as_linear", "mixup_off_epoch"}
BESIDE_THE_PUBLISHED = {"data_dir"}


def header(path: str) -> str:
    """The comment at the top of a file."""
    return re.match(r"(#.*\n)*", (ROOT / path).read_text()).group()


@pytest.mark.parametrize("path", FILES)
def test_loads_without_error_or_warning(path):
    assert load_yaml(ROOT / path).warnings == ()


@pytest.mark.parametrize("path", FILES)
def test_header_has_the_command_of_this_very_file(path):
    assert f"train.py -c {path}" in header(path)


@pytest.mark.parametrize("path", FILES)
def test_name_agrees_with_content(path):
    name = re.fullmatch(r"(?:paper_|small_)?(\d+)_(\d+)_(\d+)E_t(\d+)(_TET)?(?:_\w+)?", Path(path).stem)
    if name is None:
        pytest.skip("not named after its sizes")
    layer, dim, epochs, steps, tet = name.groups()
    cfg = load_yaml(ROOT / path)
    assert (cfg.layer, cfg.dim, cfg.epochs, cfg.time_steps) == (int(layer), int(dim), int(epochs), int(steps))
    assert cfg.TET is (tet is not None)


def test_every_published_configuration_is_there():
    assert {f"conf/{name}.yml" for name in PUBLISHED} <= set(FILES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_holds_exactly_the_published_values(name):
    cfg = load_yaml(ROOT / f"conf/{name}.yml").as_dict()
    defaults = Config().as_dict()
    published = defaults | PUBLISHED[name]["set"]
    differing = {key for key in cfg if cfg[key] != published[key]}
    assert differing <= DIFFERENT_ON_PURPOSE | BESIDE_THE_PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_mixup_stays_on_as_in_the_published_runs(name):
    assert load_yaml(ROOT / f"conf/{name}.yml").mixup_off_epoch == 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_states_parameters_cost_and_published_result(name):
    text = header(f"conf/{name}.yml")
    assert f"firing_num.py -c conf/{name}.yml" in text
    assert f"{PARAMETERS[name]:,} parameters" in text
    assert "not measured here" in text
    assert "Published:" in text
    assert "The paper states" in text


@pytest.mark.parametrize("path", FILES)
def test_keys_are_spelt_with_underscores(path):
    keys = re.findall(r"^([\w-]+):", (ROOT / path).read_text(), flags=re.MULTILINE)
    assert set(keys) <= set(SETTINGS)


# What the paper states, and the published file that fills in the rest.
CIFAR_BY_PAPER = {"lr": 5e-4, "batch_size": 32, "val_batch_size": 32, "epochs": 200, "cooldown_epochs": 0}
IMAGENET_BY_PAPER = {"lr": 5e-4, "batch_size": 32, "val_batch_size": 32}  # on 4 to 8 GPUs: 128 to 256
BY_PAPER = {
    "cifar10/paper_2_512_200E_t4": ("cifar10/2_512_300E_t4", CIFAR_BY_PAPER),
    "cifar100/paper_2_512_200E_t4": ("cifar100/2_512_300E_t4", CIFAR_BY_PAPER),
    "cifar10-dvs/paper_2_256_200E_t16_TET": (
        "cifar10-dvs/2_256_200E_t10_TET",
        {"time_steps": 16, "lr": 1e-2, "batch_size": 16, "val_batch_size": 16},
    ),
    "gesture/paper_2_256_200E_t16": ("gesture/2_256_200E_t16", {}),  # agrees with it
    **{
        f"imagenet/paper_{size}_300E_t4": (f"imagenet/{size}_300E_t4", IMAGENET_BY_PAPER)
        for size in ("8_384", "6_512", "8_512", "10_512", "8_768")
    },
}


def test_every_paper_recipe_is_swept():
    assert {f"conf/{name}.yml" for name in BY_PAPER} == {path for path in FILES if "/paper_" in path}


@pytest.mark.parametrize("name", BY_PAPER)
def test_paper_recipe_differs_from_the_published_file_where_the_paper_says_so(name):
    published, stated = BY_PAPER[name]
    ours, theirs = (load_yaml(ROOT / f"conf/{path}.yml").as_dict() for path in (name, published))
    assert {key: ours[key] for key in ours if ours[key] != theirs[key]} == stated


@pytest.mark.parametrize("name", BY_PAPER)
def test_paper_recipe_says_what_is_from_where(name):
    text = header(f"conf/{name}.yml")
    published = Path(BY_PAPER[name][0]).name
    assert f"firing_num.py -c conf/{name}.yml" in text
    assert f"{PARAMETERS[BY_PAPER[name][0]]:,} parameters" in text
    for words in ("The paper's own settings:", f"taken from {published}.yml", "not measured here", "Paper:     "):
        assert words in text


@pytest.mark.parametrize("name", BY_PAPER)
def test_recipes_page_names_each_paper_recipe(name):
    assert f"conf/{name}.yml" in (ROOT / "docs" / "recipes.md").read_text()
