"""Every key of an experiment. Standard library only; values are checked in `__post_init__`.

`load.py` merges the YAML files into these dataclasses. A wrong value raises a ValueError that names the key,
the value and what is allowed.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

TASKS = ("text_to_image", "unconditional", "text", "image_tokenizer")
LOSS_ROWS = ("all", "image")
INITS = ("pretrained", "random")
SOURCES = ("scenes", "image_folder", "parquet", "webdataset", "hub", "hub_stream", "text")
CAPTION_CHOICES = ("first", "random", "all")
LOGGERS = ("tensorboard", "csv", "wandb", "none")
OPTIMIZERS = ("adamw", "muon")
DECAYS = ("all", "matrices")
STRATEGIES = ("auto", "ddp")
ENCODE_PRECISIONS = ("float32", "bfloat16")
MOVQGAN_SIZES = ("67M", "102M", "270M")
PRECISIONS = ("auto", "32-true", "bf16-mixed")


def _require(condition: bool, key: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {allowed}")


def _one_of(key: str, value: Any, allowed: Collection[str]) -> None:
    _require(value in allowed, key, value, f"one of {', '.join(allowed)}")


@dataclass
class BackboneConfig:
    """The language model. `preset` or `config` gives the architecture, `path` the pre-trained weights."""

    path: str | None = None  # open_lm .pt or safetensors, or a transformers folder; `asset:NAME`, `hub:ORG/NAME`
    config: str | None = None  # preset, open_lm model JSON or transformers folder; null: config.json beside `path`
    positional: str | None = None  # overrides the config's positional_embedding_type
    seq_len: int | None = None  # overrides the config's seq_len (rotary tables only)


@dataclass
class TextTokenizerConfig:
    """A sentencepiece model. Text experiments train one where `path` is null."""

    path: str | None = None  # `asset:lm_rotary/text_tokenizer.model` is shipped
    vocab_size: int = 4096  # pieces, when one is trained
    train_paragraphs: int = 100_000  # evenly spaced paragraphs it is trained on

    def __post_init__(self) -> None:
        _require(self.vocab_size > 259, "text_tokenizer.vocab_size", self.vocab_size, "more than 259")
        _require(self.train_paragraphs >= 1, "text_tokenizer.train_paragraphs", self.train_paragraphs, "at least 1")


@dataclass
class VQModelConfig:
    """Architecture of a small diffusers `VQModel` behind a pixel-unshuffle of `patch`."""

    patch: int = 4
    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])
    layers_per_block: int = 1
    latent_channels: int = 8
    codes: int = 512
    code_dim: int = 8


@dataclass
class ImageTokenizerConfig:
    """The image tokenizer: weights by `path`, or the architecture and phases that train one."""

    path: str | None = None  # our folder, a diffusers VQModel folder or a MoVQGAN .ckpt; `asset:NAME` is shipped
    expect: str | None = None  # size of a MoVQGAN checkpoint: another is refused
    size: int = 64  # pixels a side after the centre crop
    precision: str = "float32"  # of encoding; bfloat16 is refused where it changes more than 0.1 % of the ids
    model: VQModelConfig = field(default_factory=VQModelConfig)
    warmup_fraction: float = 0.4  # share of the steps without quantisation
    restart_every: int = 100  # steps between re-seeding of unused codes
    commitment: float = 0.25
    edge_weight: float = 0.0  # weight of the image-gradient term

    def __post_init__(self) -> None:
        if self.expect is not None:
            _one_of("image_tokenizer.expect", self.expect, MOVQGAN_SIZES)
        _one_of("image_tokenizer.precision", self.precision, ENCODE_PRECISIONS)
        _require(self.size >= 8 and self.size % 8 == 0, "image_tokenizer.size", self.size, "a multiple of 8")
        _require(
            0 <= self.warmup_fraction < 1, "image_tokenizer.warmup_fraction", self.warmup_fraction, "a value in [0, 1)"
        )


@dataclass
class DataConfig:
    """Where the data comes from and how it is batched."""

    source: str = "scenes"
    path: str | None = None  # file, folder or hub name, for every source but `scenes`
    val_path: str | None = None  # held-out data; null: `path`'s own validation part
    train_size: int | None = None  # samples taken from the source; null: all
    val_size: int | None = None
    seed: int = 0  # of generated scenes and of a validation split made here; not the run's seed
    hold_out_pairs: bool = True  # scenes: keep some colour-kind pairs out of training, so validation asks to compose
    batch_size: int = 64  # global: split over ranks and accumulation
    length: int = 128  # positions of a sequence, pads included
    captions: str = "random"  # of several: `first`, a `random` one per epoch, or `all` as samples of their own
    max_reject_share: float = 0.01  # unreadable samples above this share stop the preparation
    cache_dir: str = "cache"  # prepared token shards
    part_size: int = 8192  # samples of one part of the shards: what a killed preparation loses at most
    workers: int = 0  # processes that load batches

    def __post_init__(self) -> None:
        _one_of("data.source", self.source, SOURCES)
        _one_of("data.captions", self.captions, CAPTION_CHOICES)
        for key in ("batch_size", "length", "part_size"):
            _require(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "at least 1")
        for key in ("train_size", "val_size"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"data.{key}", value, "null or at least 1")
        _require(0 <= self.max_reject_share <= 1, "data.max_reject_share", self.max_reject_share, "a value in [0, 1]")
        _require(self.workers >= 0, "data.workers", self.workers, "0 or more")


@dataclass
class OptimConfig:
    """AdamW with warm-up and cosine (Section 2.1). What the paper does not state is open_lm's default."""

    name: str = "adamw"
    lr: float = 3e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    weight_decay: float = 0.1
    decay: str = "all"
    warmup_steps: int = 2000
    final_lr_ratio: float = 0.0
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _one_of("optim.name", self.name, OPTIMIZERS)
        _one_of("optim.decay", self.decay, DECAYS)
        _require(self.lr > 0, "optim.lr", self.lr, "a positive value")
        _require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "two values in [0, 1)",
        )
        _require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        _require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        _require(0 <= self.final_lr_ratio <= 1, "optim.final_lr_ratio", self.final_lr_ratio, "a value in [0, 1]")
        _require(self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "a positive value")


@dataclass
class TrainerConfig:
    """Lightning's own names."""

    max_steps: int = 100_000  # optimiser steps
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    precision: str = "auto"  # bf16-mixed where the device computes in bfloat16, else 32-true
    accumulate_grad_batches: int = 1
    val_check_interval: int = 1000  # optimiser steps between validations
    checkpoint_interval: int = 1000  # optimiser steps between checkpoints
    threads: int | None = None  # CPU threads a process; null: torch's default

    def __post_init__(self) -> None:
        _one_of("trainer.strategy", self.strategy, STRATEGIES)
        _one_of("trainer.precision", self.precision, PRECISIONS)
        for key in (
            "max_steps",
            "devices",
            "num_nodes",
            "accumulate_grad_batches",
            "val_check_interval",
            "checkpoint_interval",
        ):
            _require(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "at least 1")
        _require(self.threads is None or self.threads >= 1, "trainer.threads", self.threads, "null or at least 1")


@dataclass
class LogConfig:
    """How often and where curves go."""

    interval: int = 10  # optimiser steps of one point of a curve; equal in both arms
    ema: float = 0.95  # smoothing of the drawn curves (Figures 3 to 5)
    logger: str = "tensorboard"

    def __post_init__(self) -> None:
        _require(self.interval >= 1, "log.interval", self.interval, "at least 1")
        _require(0 <= self.ema < 1, "log.ema", self.ema, "a value in [0, 1)")
        _one_of("log.logger", self.logger, LOGGERS)


@dataclass
class SampleConfig:
    """What a text-to-image run draws and measures at its end."""

    prompts: int = 64  # held-out prompts drawn
    grid: int = 16  # of these shown in the grid
    temperature: float = 1.0
    top_k: int | None = None
    preference_scenes: int = 500  # held-out scenes for caption preference (scenes only)

    def __post_init__(self) -> None:
        for key in ("prompts", "grid", "preference_scenes"):
            _require(getattr(self, key) >= 0, f"samples.{key}", getattr(self, key), "0 or more")
        _require(self.temperature > 0, "samples.temperature", self.temperature, "a positive value")
        _require(self.top_k is None or self.top_k >= 1, "samples.top_k", self.top_k, "null or at least 1")


@dataclass
class RunConfig:
    """Where a run's folder is made."""

    dir: str = "runs"


@dataclass
class ExperimentConfig:
    """One experiment at one scale."""

    name: str = "experiment"
    task: str = "text_to_image"
    scale: str = "demo"
    seed: int = 0
    init: str = "pretrained"
    tune: str = "all"  # one of models/freeze.py's TUNE_SETS: what learns, as in Figure 5
    freeze: list[str] = field(default_factory=list)  # FREEZE_GROUPS that do not learn, whatever `tune` says
    loss_rows: str = "all"  # of task=unconditional: softmax over the whole vocabulary, or the image rows alone
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        _one_of("task", self.task, TASKS)
        _one_of("init", self.init, INITS)
        _one_of("loss_rows", self.loss_rows, LOSS_ROWS)
        if self.loss_rows != "all" and self.task != "unconditional":
            raise ValueError(f"loss_rows={self.loss_rows!r} is for task=unconditional, not task={self.task!r}")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "a value in [0, 2**32)")
        _require(
            self.optim.warmup_steps < self.trainer.max_steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"less than trainer.max_steps={self.trainer.max_steps}",
        )
        if self.task in ("text", "image_tokenizer") and self.init != "random":
            raise ValueError(f"init={self.init!r}: task={self.task} starts from random weights")
        if self.task == "image_tokenizer" and (self.freeze or self.tune != "all"):
            raise ValueError("freeze and tune are for language models, not task=image_tokenizer")
        if (self.task == "text") != (self.data.source == "text"):
            raise ValueError(f"data.source={self.data.source!r} does not fit task={self.task!r}")
        ranks = self.trainer.devices * self.trainer.num_nodes
        share = ranks * self.trainer.accumulate_grad_batches
        _require(
            self.data.batch_size % share == 0,
            "data.batch_size",
            self.data.batch_size,
            f"a multiple of {share} (trainer.devices x trainer.num_nodes x trainer.accumulate_grad_batches)",
        )

    def require_paths(self) -> None:
        """Checks that every path is given without which the experiment cannot run; a dry run does without.

        Raises:
            ValueError: naming the first key.
        """
        needed = {"data.path": (self.data.path, f"a path for data.source={self.data.source}")}
        if self.data.source == "scenes":
            del needed["data.path"]
        if self.task in ("text_to_image", "unconditional"):
            for name in ("text_tokenizer", "image_tokenizer"):
                needed[f"{name}.path"] = (getattr(self, name).path, f"a path for task={self.task}")
            if self.init == "pretrained":
                needed["backbone.path"] = (self.backbone.path, "a checkpoint for init=pretrained")
        for key, (path, expected) in needed.items():
            _require(path is not None, key, path, expected)

    @property
    def micro_batch(self) -> int:
        """Samples of one rank in one forward pass."""
        trainer = self.trainer
        return self.data.batch_size // (trainer.devices * trainer.num_nodes * trainer.accumulate_grad_batches)
