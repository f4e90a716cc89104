"""Event data in training: batches, splits, sizes, types on the wire, any T, the .pt form, and what is refused."""

from __future__ import annotations

import io
import json
import logging
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recordings import CLASSES, names, some_events, write_cifar10_dvs
from test_event_sources import CIFAR, pretend
from torchvision.transforms import functional as F

from utils.config.parse import config_from
from utils.data.datasets import build_dataset, build_datasets
from utils.data.loaders import Loaders, build_eval_loader, build_loaders
from utils.errors import UserError
from utils.events import tet as event_tet
from utils.events.files import read_events, read_npz, write_events
from utils.events.sources import MANIFEST, prepare_events
from utils.events.tet import exact_frames, published_frames
from utils.npz import REAL

CPU = torch.device("cpu")
T = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """CIFAR10-DVS from its archives, with ten recordings in each class."""
    folder = tmp_path_factory.mktemp("cifar10-dvs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretend(monkeypatch, CIFAR, write_cifar10_dvs(folder, per_class=10))
        prepare_events(CIFAR, folder)
    return folder


def config(root: Path, **settings: Any):
    defaults = {"dataset": "cifar10-dvs", "data_dir": str(root), "num_classes": 10, "in_channels": 2, "time_steps": T}
    small = {"batch_size": 8, "val_batch_size": 4, "workers": 0}
    return config_from({**defaults, **small, **settings})


def loaders(root: Path, *, rank: int = 0, world_size: int = 1, **settings: Any) -> Loaders:
    return build_loaders(config(root, **settings), device=CPU, rank=rank, world_size=world_size)


def first_batch(built: Loaders, epoch: int = 0) -> torch.Tensor:
    built.set_epoch(epoch)
    return next(iter(built.train))[0]


def test_from_archive_to_batch(root) -> None:
    built = loaders(root)
    built.set_epoch(0)
    train, evaluation = list(built.train), list(built.eval)
    assert {frames.shape for frames, _ in train} == {(8, T, 2, 64, 64)}
    assert (len(train), len(built.train)) == (90 // 8, 90 // 8), "the incomplete batch is left out"
    assert [len(frames) for frames, _ in evaluation] == [4, 4, 2]
    assert {frames.dtype for frames, _ in train + evaluation} == {torch.float32}
    labels = torch.cat([labels for _, labels in evaluation])
    assert labels.tolist() == list(range(10))


def test_frames_are_resized_without_antialias(root) -> None:
    small, full = (build_dataset(config(root, img_size=side), training=False) for side in (64, 128))
    frames = full[3][0]
    # Halved bilinearly, each pixel is the mean of four.
    assert torch.allclose(small[3][0], frames.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5)))
    assert float(frames.sum()) == len(some_events(69)["t"])


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_seed_and_epoch_alone(root, workers) -> None:
    every = dict(event_hflip=0.5, event_roll=5, event_rotate=10.0, event_shear=0.2, dvs_aug=True, dvs_trival_aug=True)
    expected = first_batch(loaders(root, **every), epoch=3)
    assert torch.equal(expected, first_batch(loaders(root, **every, workers=workers), epoch=3))
    assert not torch.equal(expected, first_batch(loaders(root, **every), epoch=4))
    assert not torch.equal(expected, first_batch(loaders(root, **every, no_aug=True), epoch=3))


def test_ranks_share_the_samples_out(root) -> None:
    parts = [loaders(root, rank=rank, world_size=2) for rank in (0, 1)]
    assert [sum(len(labels) for _, labels in part.eval) for part in parts] == [5, 5]
    drawn = [part.train.batches.batch_sampler.sampler for part in parts]  # type: ignore[attr-defined]
    indices = [{pick.sample for pick in sampler} for sampler in drawn]
    assert [len(part) for part in indices] == [45, 45]
    assert not indices[0] & indices[1]


def test_evaluation_takes_any_number_of_frames_from_the_same_events(root) -> None:
    for steps in (3, 7):
        frames, _ = next(iter(build_eval_loader(config(root, time_steps=steps), device=CPU)))
        assert frames.shape[1] == steps
    with pytest.raises(UserError, match="time_steps: 65 is more than the 60 events in"):
        build_eval_loader(config(root, time_steps=65), device=CPU)


def test_the_evaluation_is_not_augmented(root) -> None:
    every = dict(event_hflip=1.0, event_roll=5, event_rotate=10.0, event_shear=0.1, dvs_aug=True, dvs_trival_aug=True)
    plain, augmented = loaders(root), loaders(root, **every, event_drop=True)
    assert not torch.equal(first_batch(augmented), first_batch(plain))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(plain.eval, augmented.eval, strict=True))


def test_splits_by_name_and_their_hash(root, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="sdt"):
        published = loaders(root)
    assert f"90 + 10 samples, split {published.split_hash}" in caplog.text
    other = loaders(root, event_split="random:0")
    assert other.split_hash != published.split_hash
    assert loaders(root, time_steps=5).split_hash == published.split_hash
    loaders(root, split_hash=published.split_hash)
    with pytest.raises(UserError, match=f"split_hash: {published.split_hash} is another split than that of"):
        loaders(root, split_hash=published.split_hash, event_split="random:0")
    data = build_dataset(config(root), training=False)
    assert names(data.samples) == [f"{name}/cifar10_{name}_9.npz" for name in CLASSES]


def test_labels_come_from_names_not_from_files(root, monkeypatch) -> None:
    build_datasets(config(root))
    monkeypatch.setattr(np, "load", lambda *args, **kwargs: pytest.fail("a sample was opened"))
    train, _ = build_datasets(config(root))
    assert [sample.label for sample in train.samples] == [label for label in range(10) for _ in range(9)]


@pytest.mark.parametrize("drop", [False, True])
def test_the_training_set_can_be_sent_to_spawned_workers(root, drop) -> None:
    every = dict(event_hflip=0.5, event_roll=5, event_rotate=10.0, event_shear=0.2, dvs_aug=True, dvs_trival_aug=True)
    train = build_dataset(config(root, event_drop=drop, **every), training=True)
    again = pickle.loads(pickle.dumps(train))
    for data in (train, again):
        torch.manual_seed(0)
        data.first = data[0][0]
    assert torch.equal(train.first, again.first)


def test_bytes_on_the_wire_give_the_same_batches(root) -> None:
    sent = loaders(root, img_size=128, event_wire="uint8")
    assert next(iter(sent.train.batches))[0].dtype == torch.uint8  # type: ignore[call-overload]
    assert torch.equal(first_batch(sent), first_batch(loaders(root, img_size=128)))


def test_bytes_that_would_lose_counts_are_refused(root) -> None:
    with pytest.raises(UserError, match=r"event_wire: uint8 cannot carry \S+, whose counts are not whole after res"):
        first_batch(loaders(root, event_wire="uint8"))


def test_frames_are_normalised_only_where_statistics_are_given(root) -> None:
    plain, scaled = first_batch(loaders(root)), first_batch(loaders(root, mean=[0.5], std=[2.0]))
    assert torch.allclose(scaled, (plain - 0.5) / 2.0)
    assert float(plain.min()) == 0.0


def test_dropped_events_are_integrated_anew(root) -> None:
    train = build_dataset(config(root, event_drop=True, img_size=128), training=True)
    whole = build_dataset(config(root, img_size=128), training=True)
    totals = []
    for seed in range(20):
        torch.manual_seed(seed)
        frames = train[5][0]
        assert frames.shape == (T, 2, 128, 128)
        totals.append(float(frames.sum()))
    full = float(whole[5][0].sum())
    assert max(totals) == full
    assert min(totals) < 0.7 * full
    # Evaluation is never augmented.
    held, plain = (build_dataset(config(root, event_drop=drop), training=False) for drop in (True, False))
    assert torch.equal(held[0][0], plain[0][0])


def test_frames_alone_are_enough_and_checked_for_completeness(root, tmp_path) -> None:
    build_datasets(config(root))
    folder = f"frames_number_{T}_split_by_number"
    (tmp_path / folder).symlink_to(root / folder)
    (tmp_path / MANIFEST).symlink_to(root / MANIFEST)
    assert len(build_dataset(config(tmp_path), training=False)) == 10
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"holds 100 samples, the published set 10,000"):
        build_dataset(config(tmp_path), training=False)


def test_frames_of_another_shape_are_refused(root) -> None:
    data = build_dataset(config(root, time_steps=6), training=False)
    path = root / "frames_number_6_split_by_number" / data.samples[0].path
    np.savez(path, frames=np.zeros((5, 2, 128, 128)))
    with pytest.raises(UserError, match=r"holds frames of shape \[5, 2, 128, 128\], expected \[6, 2, 128, 128\]"):
        data[0]


def test_events_of_another_sensor_are_refused(tmp_path) -> None:
    from utils.events.files import integrate

    events = some_events(20)
    write_events(tmp_path / "a.npz", events)
    with pytest.raises(UserError, match="holds events outside of 64 x 64 pixels"):
        integrate(events, 2, 64, tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"event_split": "first80"}, r"event_split: .*first80.*first90, tet or random:SEED"),
        ({"event_split": "tet"}, "event_split: 'tet' does not fit dataset 'cifar10-dvs'; valid: first90 or random"),
        ({"dataset": "cifar10-dvs-tet", "event_split": "first90"}, "event_split: 'first90' does not fit dataset"),
        ({"dataset": "cifar10-dvs-tet"}, "holds no .pt files; put them there, or make them"),
    ],
)
def test_settings_that_do_not_fit_are_refused(root, settings, message) -> None:
    with pytest.raises(UserError, match=message):
        build_datasets(config(root, **settings))


# --- CIFAR10-DVS as .pt files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tet(root, tmp_path_factory) -> Path:
    from utils.prepare import prepare

    folder = tmp_path_factory.mktemp("tet")
    for name in ("events_np", MANIFEST):
        (folder / name).symlink_to(root / name)
    prepare("cifar10-dvs-tet", folder, T, "")
    return folder


def test_pt_files_hold_the_exact_frames_of_the_named_split(root, tet) -> None:
    made, from_events = (
        build_dataset(config(path, dataset=name), training=False)
        for path, name in ((tet, "cifar10-dvs-tet"), (root, "cifar10-dvs"))
    )
    assert len(made) == len(from_events) == 10
    for i in range(10):
        assert torch.equal(made[i][0], from_events[i][0])
        assert made[i][1] == from_events[i][1]


def test_another_t_than_that_of_the_pt_files_is_refused(tet) -> None:
    data = build_dataset(config(tet, dataset="cifar10-dvs-tet", time_steps=5), training=False)
    with pytest.raises(UserError, match=r"time_steps: 5, but .* holds 4 frames; set time_steps: 4, or use dataset"):
        data[0]


def test_an_interrupted_making_of_pt_files_is_refused_and_finished(root, tmp_path, monkeypatch) -> None:
    from utils.prepare import prepare

    for name in ("events_np", MANIFEST):
        (tmp_path / name).symlink_to(root / name)
    save, left = torch.save, iter(range(95))

    def interrupted(content, path) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        save(content, path)

    monkeypatch.setattr(event_tet.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("cifar10-dvs-tet", tmp_path, T, "")
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"a conversion was interrupted; finish it with python -m utils\.prepare"):
        build_dataset(config(tmp_path, dataset="cifar10-dvs-tet"), training=False)
    split, _ = prepare("cifar10-dvs-tet", tmp_path, T, "")
    assert (len(split.train), len(split.test)) == (90, 10)
    with pytest.raises(UserError, match=r"the \.pt files there are of another split, T or origin"):
        prepare("cifar10-dvs-tet", tmp_path, T + 1, "")


@pytest.fixture
def foreign(tmp_path) -> Path:
    """Two .pt files per part, as other tools make them: floating-point counts."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for i in range(2):
            counts = torch.randint(0, 300, (2, 128, 128, T), generator=generator).double()
            torch.save([counts, torch.tensor([i])], tmp_path / part / f"{i}.pt")
    return tmp_path


def test_existing_pt_files_are_read_once_for_their_labels(foreign, monkeypatch) -> None:
    cfg = config(foreign, dataset="cifar10-dvs-tet")
    train = build_dataset(cfg, training=True)
    assert [sample.label for sample in train.samples] == [0, 1]
    monkeypatch.setattr(event_tet, "read_tet", lambda path: pytest.fail("opened again"))
    assert build_dataset(cfg, training=False).split_hash == train.split_hash


def test_counts_above_255_are_exact_or_wrap_as_published(foreign) -> None:
    counts = torch.load(foreign / "test" / "0.pt", weights_only=True)[0]
    assert counts.max() > 255
    exact = build_dataset(config(foreign, dataset="cifar10-dvs-tet", img_size=128), training=False)[0][0]
    assert torch.equal(exact, counts.permute(3, 0, 1, 2).float())
    settings = {"dataset": "cifar10-dvs-tet", "tet_counts": "published"}
    published = build_dataset(config(foreign, **settings), training=False)[0][0]
    # What torchvision makes of it by itself, which is what the published loader calls.
    for t in range(T):
        image = F.resize(
            F.to_pil_image(counts[..., t].mul(255).to(torch.int64).remainder(256).to(torch.uint8)), [64, 64]
        )
        assert torch.equal(published[t], F.to_tensor(image))
    whole = torch.full((2, 8, 8, 1), 300, dtype=torch.int32)
    assert published_frames(whole, 8)[0, 1, 0, 0] == pytest.approx(44 / 255)
    assert exact_frames(whole)[0, 1, 0, 0] == 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"torn", r"train/1\.pt is (damaged or no PyTorch file|not a file of tensors)"),
        ([torch.zeros(2, 8, 8, 4)], "holds no pair of counts"),
        ([torch.zeros(4, 2, 8, 8), torch.tensor([0])], r"shape \[4, 2, 8, 8\], expected \[2, H, W, T\]"),
        ([Path("code"), torch.tensor([0])], r"is not a file of tensors and plain data, and is not loaded, .*pathlib\."),
    ],
)
def test_unsafe_or_strange_pt_files_are_refused(foreign, content, message) -> None:
    path = foreign / "train" / "1.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=message):
        build_dataset(config(foreign, dataset="cifar10-dvs-tet"), training=True)


def test_a_gap_in_the_pt_files_is_named(foreign) -> None:
    (foreign / "test" / "0.pt").unlink()
    with pytest.raises(UserError, match=r"test has 1 files but no 0.pt; they count from 0"):
        build_dataset(config(foreign, dataset="cifar10-dvs-tet"), training=False)


def test_pt_files_of_others_are_never_overwritten(root, foreign) -> None:
    from utils.prepare import prepare

    for name in ("events_np", MANIFEST):
        (foreign / name).symlink_to(root / name)
    with pytest.raises(UserError, match=r"already holds \.pt files that were not made here"):
        prepare("cifar10-dvs-tet", foreign, T, "")


def test_stored_frames_use_the_smallest_exact_type(root) -> None:
    build_datasets(config(root))
    path = next((root / f"frames_number_{T}_split_by_number").rglob("*.npz"))
    assert read_npz(path, {"frames": REAL})["frames"].dtype == np.uint8


def test_a_run_does_not_go_on_with_another_split(root, tmp_path) -> None:
    from utils.run.precision import Precision
    from utils.train.optim import make_optimizer, make_schedule
    from utils.train.run_state import RunState

    model = torch.nn.Linear(2, 2)
    trained, now = config(root, split_hash="0123"), config(root, split_hash="4567")
    optimizer = make_optimizer(trained, model)
    state = RunState(model, optimizer, make_schedule(trained, optimizer)[0], Precision(trained, CPU), None)
    path = tmp_path / "last.pth.tar"
    content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 0}
    torch.save(content | {"config": trained.as_dict()}, path)
    with pytest.raises(
        UserError, match=r"split_hash: checkpoint .*/last.pth.tar was trained on split '0123', the data"
    ):
        state.restore(path, now)


# --- files of other content --------------------------------------------------------------------------------


def wrong_events(draw: random.Random) -> dict[str, np.ndarray]:
    """Events of which one array is spoiled."""
    events: dict[str, np.ndarray] = {key: values.astype(np.int64) for key, values in some_events(30).items()}
    name, place = draw.choice("txyp"), draw.randrange(30)
    kind = draw.choice(["fraction", "nan", "length", "2-D", "range", "type", "missing"])
    values = events[name].astype(np.float64)
    if kind == "fraction":
        values[place] += 0.5
    elif kind == "nan":
        values[place] = draw.choice([float("nan"), float("inf")])
    elif kind == "length":
        values = values[:-1]
    elif kind == "2-D":
        values = values.reshape(1, 30)
    elif kind == "range":
        values[place] = {"t": 1e30, "p": draw.choice([-1, 2])}.get(name, draw.choice([-1, 128]))
    events[name] = values.astype(str) if kind == "type" else values
    if kind == "missing":
        del events[name]
    return events


@pytest.mark.parametrize("seed", range(40))
def test_events_of_another_form_are_one_message(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **wrong_events(random.Random(seed)))
    with pytest.raises(
        UserError, match=r"a\.npz (is damaged|holds events) .*; delete it and run|a\.npz holds"
    ) as caught:
        read_events(path, 128)
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_any_type_are_events(tmp_path: Path) -> None:
    whole = some_events(30)
    for kind in (np.float32, np.int8, np.uint8, np.int64):
        np.savez(
            tmp_path / "a.npz",
            **{key: values.astype(kind) for key, values in whole.items() if key != "t"},
            t=whole["t"],
        )
        found = read_events(tmp_path / "a.npz", 128)
        assert all(np.array_equal(found[key], whole[key]) for key in "txyp")


def header(shape: tuple[int, ...]) -> bytes:
    """A bare array of NumPy whose header promises `shape`."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
    return file.getvalue()


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for name in "txyp":
            members.writestr(f"{name}.npy", content)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"t,x,y,p\n", header((3,)) + bytes(24), zipped(header((10**13,))), zipped(b""), zipped(b"text"),
     zipped(header((2,)) + bytes(8)), zipped(header((-1,)))],
)  # fmt: skip
def test_a_file_that_holds_no_arrays_is_one_message(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz is damaged \(.+\); delete it and run python -m utils\.prepare again"):
        read_events(tmp_path / "a.npz", 128)


def test_each_flipped_bit_of_an_event_file_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path, draw = tmp_path / "a.npz", random.Random(0)
    write_events(path, some_events(200))
    whole, before = path.read_bytes(), read_events(path, 128)
    refused = 0
    for _ in range(200):
        bit, damaged = draw.randrange(8 * len(whole)), bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            found = read_events(path, 128)
        except UserError:
            refused += 1
        else:
            assert all(np.array_equal(found[key], before[key]) for key in "txyp")
    assert refused > 100


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_frames_that_are_no_counts_are_refused(root, value) -> None:
    data = build_dataset(config(root, time_steps=8), training=False)
    frames = np.zeros((8, 2, 128, 128))
    frames[3, 1, 5, 5] = value
    np.savez(root / "frames_number_8_split_by_number" / data.samples[0].path, frames=frames)
    with pytest.raises(UserError, match="holds counts below 0 or no numbers; delete"):
        data[0]


COUNTS = torch.ones(2, 128, 128, T)


@pytest.mark.parametrize(
    "content",
    [None, "text", [], [COUNTS, None], [COUNTS, "1"], [COUNTS, torch.tensor([])], [COUNTS, torch.tensor([10])],
     [COUNTS, -1], [COUNTS, 0.5], [COUNTS, float("nan")], [COUNTS, True], [COUNTS, torch.tensor([0, 1])],
     [-COUNTS, 0], [COUNTS * float("nan"), 0], [COUNTS.to(torch.complex64), 0], [COUNTS.to_sparse(), 0],
     [COUNTS.to("meta"), 0], [torch.zeros(2, 0, 0, 4), 0]],
)  # fmt: skip
def test_pt_files_of_other_content_are_one_message(foreign, content) -> None:
    torch.save(content, foreign / "test" / "1.pt")
    with pytest.raises(UserError, match=r"test/1\.pt (holds|has label) .*replace it") as caught:
        build_dataset(config(foreign, dataset="cifar10-dvs-tet"), training=False)
    assert "\n" not in str(caught.value)


def test_a_pt_file_that_was_replaced_by_one_of_another_class_is_noticed(foreign) -> None:
    data = build_dataset(config(foreign, dataset="cifar10-dvs-tet"), training=False)
    torch.save([COUNTS, 7], foreign / "test" / "1.pt")
    with pytest.raises(UserError, match=r"test/1\.pt has label 7, tet_labels\.json says 1; the file was replaced"):
        data[1]


RECORDS = [None, 3, "text", [], {"samples": None}, {"labels": 3}, {"complete": "yes", "labels": {}},
           {"dataset": "cifar10-dvs", "samples": {"cat": "many"}}, {"labels": {"train": [10]}},
           {"labels": {"train": [0.5]}}, {"dataset": 3, "samples": {}, "made": 1}]  # fmt: skip


@pytest.mark.parametrize("content", RECORDS)
def test_small_files_of_other_content_are_one_message(root, foreign, tmp_path, content) -> None:
    (foreign / "tet_labels.json").write_text(json.dumps(content))
    names = r"tet_labels\.json(: | is damaged).*; delete it and run"
    if content in ({"samples": None}, {"dataset": "cifar10-dvs", "samples": {"cat": "many"}}):  # of no meaning there
        build_dataset(config(foreign, dataset="cifar10-dvs-tet"), training=False)
    else:
        with pytest.raises(UserError, match=names):
            build_dataset(config(foreign, dataset="cifar10-dvs-tet"), training=False)
    (tmp_path / "events_np").symlink_to(root / "events_np")
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"prepared\.json(: | is damaged).*; delete it and run"):
        build_dataset(config(tmp_path), training=False)
