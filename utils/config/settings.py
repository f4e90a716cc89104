"""Every setting of train.py and firing_num.py: one field each, with its type, valid values and explanation.

Values from a YAML or a command line go through `utils.config.parse`, which also checks combinations. `only` names the
program that a setting is for, where the other one has no use for it.
"""

# ruff: noqa: RUF009 -- setting() returns a dataclass field, with a factory where the default is a list

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from utils.config.field import setting, settings_of

EVENT_DATASETS = ("digits-dvs", "cifar10-dvs", "cifar10-dvs-tet", "gesture")
EVENT_MODE_DATASETS = ("cifar10-dvs", "cifar10-dvs-tet")  # not gesture: its published model is without

TRAIN, MEASURE = "train.py", "firing_num.py"

_NEVER_APPLIED = "the model never applies it, and published results are without it"
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")

# Without "..", with which a run would rename or fill a folder that it was not given.
_PART = r"(?!\.{1,2}(?:/|$))[^/]+"
_FOLDER_NAME = (rf"|{_PART}(?:/{_PART})*", 'a name for a folder in output, as run1 or study/run1, without "." and ".."')

_run = partial(setting, group="Run and output")
_model = partial(setting, group="Model")
_neuron = partial(setting, group="Neuron")
_data = partial(setting, group="Data")
_augment = partial(setting, group="Image augmentation", only=TRAIN)
_mixup = partial(setting, group="Mixup and label smoothing", only=TRAIN)
_event = partial(setting, group="Event augmentation", only=TRAIN)
_loss = partial(setting, group="Loss", only=TRAIN)
_distill = partial(setting, group="Distillation", only=TRAIN)
_optim = partial(setting, group="Optimizer", only=TRAIN)
_sched = partial(setting, group="Learning rate schedule", only=TRAIN)
_norm = partial(setting, group="Batch norm")
_ema = partial(setting, group="EMA", only=TRAIN)
_device = partial(setting, group="Precision and device")
_distributed = partial(setting, group="Distributed")
_checkpoint = partial(setting, group="Checkpoints")
_measure = partial(setting, group="Measurement (firing_num.py)", only=MEASURE)
_kept = partial(setting, group="Kept for compatibility")


@dataclass(frozen=True)
class Config:
    """One valid set of settings. Derive another with `dataclasses.replace`.

    Two configs are equal when their settings are, wherever the values came from.
    """

    # fmt: off
    config: str = _run("", "YAML file with settings; the command line overrides it (firing_num.py without "
                       "it: the settings inside the checkpoint)", aliases=("-c",), compare=False)
    output: str = _run("", "folder for runs (empty: output/train, or output/firing for firing_num.py)")
    experiment: str = _run("", "name of this run's folder (empty: date, model and sizes; for firing_num.py the name of "
                           "the folder that holds the checkpoint)", pattern=_FOLDER_NAME)
    epochs: int = _run(200, "epochs of the schedule, warm-up included, cool-down not", low=1, high=100_000, only=TRAIN)
    seed: int = _run(42, "seed of Python, NumPy and PyTorch", low=0, high=2**63 - 1, only=TRAIN)
    deterministic: bool = _run(False, "repeat a run bit for bit, at a cost in speed", only=TRAIN)
    dry_run: bool = _run(False, "build everything, time a few steps, say what a run would cost, and stop", only=TRAIN)
    log_interval: int = _run(100, "steps between two log lines", low=1, high=1_000_000)
    eval_metric: str = _run("top1", "picks the best checkpoint", choices=("loss", "top1", "top5"), only=TRAIN)
    plugin: list[str] | None = _run(None, "Python file to import first; it may register neurons, models and data "
                                    "sets: docs/extending.md", repeats=True)
    log_wandb: bool = _run(False, "log to Weights & Biases too (needs the package wandb)", only=TRAIN)

    model: str = _model("sdt", "registered model name")
    layer: int = _model(4, "number of blocks", low=1, high=200)
    dim: int = _model(256, "channels D of the blocks (had no default in the published command line)", low=8, high=65536)
    embed_dims: list[int] | None = _model(None, "V2: channels of the four stages, as 64 128 256 360 (null: the "
                                          "model's)", low=1, high=65536, lengths=(4,))
    depths: list[int] | None = _model(None, "V2: Transformer blocks of the last two stages, as 6 2 (null: the model's)",
                                      low=1, high=200, lengths=(2,))
    num_heads: int = _model(8, "attention heads; divides dim, in V2 the last two of embed_dims", low=1, high=1024)
    mlp_ratio: int = _model(4, "hidden channels of the MLP, in units of dim", low=1, high=64)
    in_channels: int = _model(3, "input channels: 3 for images, 2 for events", low=1, high=1024)
    num_classes: int = _model(1000, "classes; 0 leaves the head out", low=0, high=1_000_000)
    time_steps: int = _model(4, "time steps T; for event data also the number of frames", low=1, high=1000)
    pooling_stat: str = _model("1111", "which of the four patch-splitting stages halve the image",
                               pattern=("[01]{4}", "four characters, each 0 or 1, in quotes"))
    dvs_mode: bool | None = _model(None, "pooling inside attention (null: on for the cifar10-dvs data sets)")
    pretrained: bool = _model(False, "refused: no weights are shipped (load a checkpoint with initial_checkpoint)")
    linear_prob: bool = _model(False, "train the head only", only=TRAIN)
    torchscript: bool = _model(False, "compile with TorchScript", unavailable="neurons keep a state that cannot be "
                               "scripted, and torch is giving TorchScript up; use --compile")

    spike_mode: str = _neuron("lif", "neuron: lif, plif (learnable time constant), if, klif, qif, eif, izhikevich, or "
                              "one that a plugin registers")
    surrogate: str = _neuron("sigmoid", "surrogate gradient of the spike: sigmoid, atan, erf, soft_sign, "
                             "piecewise_quadratic or piecewise_exp")
    surrogate_alpha: float = _neuron(4.0, "steepness of the surrogate gradient", above=0, high=1000)
    neuron_args: dict[str, Any] | None = _neuron(None, "further arguments of the neuron, by name")
    neuron_backend: str = _neuron("auto", "kernels (auto: cpp on a CPU; on CUDA triton, else cupy, "
                                  "whichever is exact)", choices=("auto", "cupy", "torch", "cpp", "triton", "lean"))
    neuron_dtype: str = _neuron("float32", "membrane state under mixed precision (published runs: input, "
                                "the precision of the layer's input)", choices=("float32", "input"))

    data_dir: str = _data("", "root folder of the data set")
    dataset: str = _data("torch/cifar10", "data set name, or 'imagenet' for a folder per class")
    dataset_download: bool = _data(False, "download the data set if it is missing and can be downloaded")
    train_split: str = _data("train", "name of the training split", only=TRAIN)
    val_split: str = _data("validation", "name of the evaluation split")
    train_split_path: str | None = _data(None, "file with the training samples to use, one per line", only=TRAIN)
    event_split: str = _data("", "split of cifar10-dvs (empty: first90, as published; random:SEED)",
                             pattern=(r"|first90|tet|random:\d{1,9}", "first90, tet or random:SEED, as random:0"))
    split_hash: str | None = _data(None, "event data: the split's hash (null: compute it; else it must agree)")
    event_wire: str = _data("float32", "type of event frames from the loader to the device (uint8: a quarter "
                            "of the bytes, for whole counts up to 255)", choices=("float32", "uint8"))
    tet_counts: str = _data("exact", "cifar10-dvs-tet: counts as they are, or as the published loader made them "
                            "(8 bits, in 0..1)", choices=("exact", "published"))
    batch_size: int = _data(32, "training samples per process and step", low=1, high=1_000_000, aliases=("-b",),
                            only=TRAIN)
    val_batch_size: int = _data(16, "evaluation samples per process and step", low=1, high=1_000_000, aliases=("-vb",))
    img_size: int | None = _data(None, "image side in pixels (null: by data set)", low=1, high=10_000)
    input_size: list[int] | None = _data(None, "channels, height, width; instead of img_size", low=1, high=10_000,
                                         lengths=(3,))
    crop_pct: float | None = _data(None, "evaluation: share of the side kept (null: by data set)", low=0.1, high=1)
    mean: list[float] | None = _data(None, "mean per channel, for values in 0..1 (null: by data set)", low=-1e6,
                                     high=1e6)
    std: list[float] | None = _data(None, "standard deviation per channel (null: by data set)", low=1e-6, high=1e6)
    interpolation: str = _data("", "resize method of evaluation (empty: by data set)", choices=("", *_INTERPOLATIONS))
    large_valid: bool = _data(False, "evaluate at 288 pixels: resize to 320, bilinear, then centre crop")
    workers: int = _data(4, "loader processes per process; 0 loads in the main one", low=0, high=1000, aliases=("-j",))
    pin_mem: bool | None = _data(None, "page-locked host memory, for copies to the GPU beside its work (null: on CUDA)")
    no_prefetcher: bool = _data(False, "normalise in the loader processes instead of on the device")
    use_multi_epochs_loader: bool = _data(False, "kept between epochs in any case; the option is accepted")
    epoch_repeats: float = _data(0.0, "passes over the data that count as one epoch (0: one)", low=0, high=100,
                                 only=TRAIN)
    save_images: bool = _data(False, "write the first training batch into the run's folder as a picture", only=TRAIN)

    no_aug: bool = _augment(False, "no training augmentation at all: resize and centre crop")
    scale: list[float] = _augment([0.08, 1.0], "random crop: range of its area, as a share", above=0, high=1,
                                  lengths=(2,))
    ratio: list[float] = _augment([3 / 4, 4 / 3], "random crop: range of width / height", low=0.01, high=100,
                                  lengths=(2,))
    hflip: float = _augment(0.5, "probability of a horizontal flip", low=0, high=1)
    vflip: float = _augment(0.0, "probability of a vertical flip", low=0, high=1)
    color_jitter: float = _augment(0.4, "strength of colour jitter; without effect beside aa", low=0, high=10)
    aa: str | None = _augment(None, "AutoAugment or RandAugment policy, as rand-m9-n1-mstd0.4-inc1")
    aug_repeats: int = _augment(0, "copies of an image in an epoch of the same length (0: one)", low=0, high=100)
    aug_splits: int = _augment(0, "copies of an image in a batch, the first one clean (0, or 2 up)", low=0, high=64)
    reprob: float = _augment(0.0, "probability of random erasing", low=0, high=1)
    remode: str = _augment("const", "random erasing: fill", choices=("const", "rand", "pixel"))
    recount: int = _augment(1, "random erasing: rectangles per image", low=1, high=100)
    resplit: bool = _augment(False, "no random erasing in the first, clean copy of aug_splits")
    train_interpolation: str = _augment("random", "resize method of crops", choices=("random", *_INTERPOLATIONS))

    mixup: float = _mixup(0.0, "mixup: alpha of the beta distribution (0: off)", low=0, high=1000)
    cutmix: float = _mixup(0.0, "cutmix: alpha of the beta distribution (0: off)", low=0, high=1000)
    cutmix_minmax: list[float] | None = _mixup(None, "cutmix: range of the box side, as a share; no alpha",
                                               low=0, high=1, lengths=(2,))
    mixup_prob: float = _mixup(1.0, "probability of mixing", low=0, high=1)
    mixup_switch_prob: float = _mixup(0.5, "probability of cutmix where both are on", low=0, high=1)
    mixup_mode: str = _mixup("batch", "one draw per batch, pair or sample", choices=("batch", "pair", "elem"))
    mixup_off_epoch: int = _mixup(0, "first epoch without mixup and cutmix (0: never off)", low=0, high=100_000)
    smoothing: float = _mixup(0.1, "label smoothing", low=0, below=1)

    dvs_aug: bool = _event(False, "cutout with a hole of 16 pixels, one per sample (published: one per batch)")
    dvs_trival_aug: bool = _event(False, "one of identity, shear, shift in x, shift in y, rotation per sample")
    event_hflip: float = _event(0.0, "probability of a horizontal flip", low=0, high=1)
    event_roll: int = _event(0, "shift with wrap-around: most pixels along each axis (0: off)", low=0, high=10_000)
    event_rotate: float = _event(0.0, "rotation: most degrees (0: off)", low=0, high=180)
    event_shear: float = _event(0.0, "shear along x: most pixels per pixel (0: off)", low=0, high=10)
    event_cutout: int = _event(0, "cutout: side of the hole in pixels (0: off, or 16 by dvs_aug)", low=0, high=10_000)
    event_drop: bool = _event(False, "EventDrop: remove events by time, area or chance before integration")
    event_mix: float = _event(0.0, "EventMix: alpha of the beta distribution (0: off)", low=0, high=1000)

    jsd: bool = _loss(False, "Jensen-Shannon divergence between the copies of aug_splits")
    bce_loss: bool = _loss(False, "binary instead of soft-target cross entropy with mixup or smoothing")
    bce_target_thresh: float | None = _loss(None, "bce_loss: targets above it count as 1", low=0, high=1)
    TET: bool = _loss(False, "temporal efficient training: the loss at each time step", only="")
    TET_means: float = _loss(1.0, "TET: value that a regularisation moves the logits to", low=-1000, high=1000)
    TET_lamb: float = _loss(0.0, "TET: weight of that regularisation", low=0, high=1)

    kd: str = _distill("none", "learn from a teacher: hard (its class) or soft (its probabilities); a V2 model gets a "
                       "second head for it", choices=("none", "hard", "soft"), only="")
    teacher: str = _distill("", "kd: a model of timm, a checkpoint of a run of this project, or a file with logits "
                            "[samples, classes] of the training set in its order")
    teacher_checkpoint: str = _distill("", "kd: weights of a teacher of timm (empty: timm downloads them)")
    kd_alpha: float = _distill(0.5, "kd: weight of the teacher; the labels have the rest", low=0, high=1)
    kd_tau: float = _distill(1.0, "kd: temperature of soft", above=0, high=1000)

    opt: str = _optim("sgd", "optimizer name of timm's factory, as adamw or lamb")
    lr: float = _optim(0.01, "peak learning rate; not scaled with the number of GPUs", low=0, high=1000)
    lr_base: float | None = _optim(None, "instead of lr: learning rate per lr_base_size samples, scaled with the "
                                   "global batch (null: off, as published)", above=0, high=1000)
    lr_base_size: int = _optim(256, "lr_base: the batch it is meant for", low=1, high=1_000_000)
    lr_base_scale: str = _optim("linear", "lr_base: how the rate grows with the batch", choices=("linear", "sqrt"))
    grad_accum_steps: int = _optim(1, "batches per update, their gradients averaged", low=1, high=100_000)
    weight_decay: float = _optim(1e-4, "weight decay; biases and 1-D tensors are without", low=0, high=100)
    momentum: float = _optim(0.9, "momentum of optimizers that have one", low=0, below=1)
    opt_eps: float | None = _optim(None, "epsilon (null: the optimizer's default)", above=0, high=10)
    opt_betas: list[float] | None = _optim(None, "betas (null: the optimizer's default)", low=0, below=1)
    clip_grad: float | None = _optim(None, "gradient clipping threshold (null: off)", above=0, high=1e9)
    clip_mode: str = _optim("norm", "what is clipped", choices=("norm", "value", "agc"))

    sched: str = _sched("step", "shape of the schedule", choices=("cosine", "tanh", "step", "plateau", "poly"))
    warmup_epochs: int = _sched(3, "epochs of linear warm-up, inside epochs", low=0, high=100_000)
    sched_on_updates: bool = _sched(False, "set the rate before each update instead of before each epoch")
    warmup_prefix: bool = _sched(False, "the shape begins at the end of the warm-up (published V2), else with it")
    warmup_lr: float = _sched(1e-4, "learning rate at the start of the warm-up", low=0, high=1000)
    min_lr: float = _sched(1e-5, "lowest learning rate", low=0, high=1000)
    cooldown_epochs: int = _sched(10, "epochs at min_lr, added after epochs", low=0, high=100_000)
    start_epoch: int | None = _sched(None, "first epoch (null: 0, or where the checkpoint stopped)", low=0,
                                     high=200_000)
    decay_epochs: float = _sched(30.0, "step: epochs between two decays", above=0, high=100_000)
    decay_rate: float = _sched(0.1, "step, plateau: factor of a decay; cosine: per cycle; poly: power", above=0,
                               high=1000)
    patience_epochs: int = _sched(10, "plateau: epochs without progress before a decay", low=0, high=100_000)
    lr_cycle_mul: float = _sched(1.0, "factor of the length from one cycle to the next", above=0, high=100)
    lr_cycle_limit: int = _sched(1, "number of cycles", low=1, high=100_000)
    lr_noise: list[float] | None = _sched(None, "learning rate noise: first epoch, or first and last; shares",
                                          low=0, high=1, lengths=(1, 2))
    lr_noise_pct: float = _sched(0.67, "learning rate noise: limit, as a share of the rate", low=0.01, high=1)
    lr_noise_std: float = _sched(1.0, "learning rate noise: standard deviation", low=0, high=10)

    bn_momentum: float | None = _norm(None, "momentum of the running statistics (null: 0.1)", low=0, high=1, only=TRAIN)
    bn_init_bias: float = _norm(0.0, "initial bias of every BatchNorm (published: 0; with 0.5 the neurons of a small "
                                "fresh V2 fire)", low=-10, high=10, only=TRAIN)
    bn_eps: float | None = _norm(None, "epsilon (null: 1e-5)", above=0, high=10)
    sync_bn: bool = _norm(False, "statistics over all processes in each step", only=TRAIN)
    dist_bn: str = _norm("", "running statistics that are evaluated and saved (reduce: their mean; else rank 0's)",
                         choices=("", "broadcast", "reduce"), only=TRAIN)
    split_bn: bool = _norm(False, "statistics of their own for each copy of aug_splits", only=TRAIN)

    model_ema: bool = _ema(False, "also keep, evaluate and save a moving average of the weights")
    model_ema_decay: float = _ema(0.9998, "weight of the past per step", low=0, below=1)
    use_ema: bool = _ema(False, "measure the moving average in the checkpoint", only=MEASURE)
    model_ema_force_cpu: bool = _ema(False, "keep the average in host memory")

    device: str = _device("auto", "where to run (auto: CUDA if there is one)",
                          pattern=(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N"))
    amp: bool = _device(False, "mixed precision")
    amp_dtype: str = _device("auto", "lower precision of amp (auto: float16 on CUDA, as published; bfloat16)",
                             choices=("auto", "float16", "bfloat16"))
    allow_tf32: bool = _device(False, "CUDA may multiply float32 with 10 bits of mantissa: faster, less exact")
    compile: bool = _device(False, "compile the model with torch.compile", only=TRAIN)
    cuda_graph: bool = _device(False, "CUDA: run each training step as one graph, for small models, which the host's "
                               "work per layer holds up; off, with the reason in the log, where it cannot be",
                               only=TRAIN)
    grad_checkpointing: bool = _device(False, "keep only each block's input for the backward pass and compute the "
                                       "block again: less memory, slower, the same numbers", only=TRAIN)
    kernels: str = _device("auto", "auto: replace parts of the model by faster ones that were checked to compute the "
                           "same; plain: run the model as it is written", choices=("auto", "plain"))
    engine: str = _device("dense", "convolutions on a CPU (sparse: additions of the weights of active inputs; "
                          "auto: sparse or dense per layer, whichever is faster)",
                          choices=("auto", "dense", "sparse"), synonyms={"event": "sparse"})
    bf16_input_grad: bool = _device(False, "engine: gradients of spikes in bfloat16, all else in float32", only=TRAIN)
    channels_last: bool | None = _device(None, "memory format with the channels innermost (null: on CUDA with amp or "
                                         "with this project's Triton kernels)")

    local_rank: int = _distributed(0, "of torch.distributed.launch; the variable LOCAL_RANK wins", low=0, high=10_000)

    resume: str = _checkpoint("", "checkpoint to continue or to measure (train.py: auto is the newest of "
                              "--experiment, if there is one)")
    no_resume_opt: bool = _checkpoint(False, "resume: weights only, without the optimizer and loop state")
    initial_checkpoint: str = _checkpoint("", "checkpoint whose weights a new run starts from", only=TRAIN)
    initial_partial: str = _checkpoint("", "checkpoint from which a new run takes the weights that fit by name and "
                                       "shape; the others are listed", only=TRAIN)
    checkpoint_hist: int = _checkpoint(10, "number of best checkpoints kept", low=1, high=100_000, only=TRAIN)
    recovery_interval: int = _checkpoint(0, "steps between checkpoints in an epoch (0: none)", low=0, high=1_000_000,
                                         only=TRAIN)

    form: str = _measure("auto", "form of the model: trained, or merged (convolutions without a neuron between them "
                         "joined, BatchNorm folded; auto: merged for V2)", choices=("auto", "trained", "merged"))
    energy_mode: str = _measure("exact", "operations charged: exactly those needed; formula: MACs x firing rate of the "
                                "input; by the paper's supplement S1", choices=("exact", "formula", "paper"))
    first_conv: str = _measure("auto", "charge of the first convolution (auto: once for images, which are the same at "
                               "each step; in paper mode T x its own rate)", choices=("auto", "per_step", "once"))
    energy_model: str = _measure("all", "what is priced, for this network and its ANN twins: compute (operations), "
                                 "flat (and bytes moved), lemaire (and addressing and memories by size)",
                                 choices=("all", "compute", "flat", "lemaire"))
    energy_cost: str = _measure("fp32", "preset of prices; at 45 nm, MAC/AC in pJ: fp32 4.6/0.9, fp16 1.5/0.4, "
                                "int8 0.23/0.03, int32 3.2/0.1")
    hardware: str = _measure("", "file of own presets for energy_cost, like data/hardware.yml")
    mac_pj: float | None = _measure(None, "pJ of a multiply-accumulate (null: by energy_cost)", above=0, high=1e6)
    ac_pj: float | None = _measure(None, "pJ of an addition (null: by energy_cost)", above=0, high=1e6)
    energy_extras: list[str] | None = _measure(None, "rows beside the synapses, never in the total",
                                               choices=("neurons", "residual", "batchnorm", "memory"))
    memory_pj: float | None = _measure(None, "pJ per byte moved, of the model flat and the extra row memory (null: by "
                                       "energy_cost)", above=0, high=1e6)
    ann_attention: str = _measure("printed", "products of the ANN twin's attention: 2 N² D as printed in the "
                                  "paper, or 2 N D² as its totals need", choices=("printed", "paper"))
    from_rates: str = _measure("", "energy from the firing rates in this JSON file, without checkpoint and data")
    compare: list[str] | None = _measure(None, "checkpoints of train.py, each with the settings it was trained with, "
                                         "and report.json files, in one table and one picture")
    verify: bool = _measure(False, "check that the model runs with additions of selected weights alone")
    verify_samples: int = _measure(2, "samples of that check", low=1, high=1_000_000)
    attention_map: list[str] | None = _measure(None, "draw attention maps: a number of samples, or image files")
    sweep_T: list[int] | None = _measure(None, "measure at each of these numbers of time steps", low=1, high=1000)

    apex_amp: bool = _kept(False, "older name of amp", no_effect="apex is gone, it means amp")
    native_amp: bool = _kept(False, "older name of amp", no_effect="it means amp")
    drop: float = _kept(0.0, "dropout rate", low=0, high=1, no_effect=_NEVER_APPLIED)
    drop_path: float = _kept(0.2, "drop path rate", low=0, high=1, no_effect=_NEVER_APPLIED)
    drop_block: float | None = _kept(None, "drop block rate", low=0, high=1, no_effect=_NEVER_APPLIED)
    drop_connect: float | None = _kept(None, "older name of drop_path", low=0, high=1, no_effect=_NEVER_APPLIED)
    gp: str | None = _kept(None, "global pooling", no_effect="the head always averages over H and W")
    patch_size: int | None = _kept(None, "patch side", low=1, high=10_000,
                                   no_effect="pooling_stat alone sets the token grid")
    use_conv_as_linear: bool = _kept(False, "1x1 convolutions", no_effect="they are always convolutions")
    tta: int = _kept(0, "test-time augmentation factor", low=0, high=1000,
                     no_effect="the published loader never made the further views that it would average")
    bn_tf: bool = _kept(False, "TensorFlow's batch norm defaults",
                        no_effect="they never reached the model; use bn_momentum and bn_eps")
    # fmt: on

    explicit: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # given, not defaulted
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)  # for the script to log
    inside: str = field(default="", compare=False, repr=False)  # the checkpoint whose own settings these are

    @property
    def is_v2(self) -> bool:
        """Whether the model is one of the registered sizes of V2, which has other sizes than V1."""
        return self.model.startswith(("sdt_v2", "metaspikformer"))

    @property
    def event_mode(self) -> bool:
        """Whether the model pools inside attention: `dvs_mode`, by data set where that is null."""
        return self.dataset in EVENT_MODE_DATASETS if self.dvs_mode is None else self.dvs_mode

    @property
    def mixes(self) -> bool:
        """Whether training batches are mixed, by mixup or cutmix."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def plugin_modules(self) -> tuple[str, ...]:
        """The names under which the plugins are imported."""
        return tuple(Path(path).stem for path in self.plugin or ())

    def as_dict(self) -> dict[str, Any]:
        """Name and value of each setting but `config`: plain data, valid for `config_from`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name in SETTINGS and f.name != "config"}


SETTINGS = settings_of(Config)
