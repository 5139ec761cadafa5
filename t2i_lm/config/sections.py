"""The sections of an experiment (`experiment.py`), each a dataclass that checks its values.

Standard library only. A wrong value raises a ValueError that names the key, the value and what is allowed.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

SOURCES = ("scenes", "image_folder", "parquet", "webdataset", "hub", "hub_stream", "text")
OPENED_BY_PATH = ("image_folder", "parquet", "webdataset", "text")
CAPTION_CHOICES = ("first", "random", "all")
LOGGERS = ("tensorboard", "csv", "wandb", "none")
OPTIMIZERS = ("adamw", "muon")
DECAYS = ("all", "matrices")
STRATEGIES = ("auto", "ddp", "fsdp2", "hsdp")
SHARDED = ("fsdp2", "hsdp")
ENCODE_PRECISIONS = ("float32", "bfloat16")
MOVQGAN_SIZES = ("67M", "102M", "270M")
FID_FEATURES = (64, 192, 768, 2048)
PRECISIONS = ("auto", "32-true", "bf16-mixed")


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises a ValueError in the words of every wrong value."""
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {allowed}")


def one_of(key: str, value: Any, allowed: Collection[str]) -> None:
    """Raises a ValueError where a value is no known name."""
    require(value in allowed, key, value, f"one of {', '.join(allowed)}")


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
        require(self.vocab_size > 259, "text_tokenizer.vocab_size", self.vocab_size, "more than 259")
        require(self.train_paragraphs >= 1, "text_tokenizer.train_paragraphs", self.train_paragraphs, "at least 1")


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
    size: int = 64  # pixels a side after the center crop
    precision: str = "float32"  # of encoding; bfloat16 is refused where it changes more than 0.1 % of the ids
    model: VQModelConfig = field(default_factory=VQModelConfig)
    warmup_fraction: float = 0.4  # share of the steps without quantization
    restart_every: int = 100  # steps between re-seeding of unused codes
    commitment: float = 0.25
    edge_weight: float = 0.0  # weight of the image-gradient term

    def __post_init__(self) -> None:
        if self.expect is not None:
            one_of("image_tokenizer.expect", self.expect, MOVQGAN_SIZES)
        one_of("image_tokenizer.precision", self.precision, ENCODE_PRECISIONS)
        require(self.size >= 8 and self.size % 8 == 0, "image_tokenizer.size", self.size, "a multiple of 8")
        require(
            0 <= self.warmup_fraction < 1, "image_tokenizer.warmup_fraction", self.warmup_fraction, "a value in [0, 1)"
        )


@dataclass
class DataConfig:
    """Where the data comes from and how it is batched."""

    source: str = "scenes"
    path: str | None = None  # file, folder or hub name, for every source but `scenes`
    val_path: str | None = None  # held-out data; null: PATH/val or every 20th of `path` (text needs it)
    train_size: int | None = None  # samples taken from the source; null: all
    val_size: int | None = None
    seed: int = 0  # of generated scenes and of a validation split made here; not the run's seed
    hold_out_pairs: bool = True  # scenes: keep some colour-kind pairs out of training, so validation asks to compose
    batch_size: int = 64  # global: split over ranks and accumulation
    length: int = 128  # positions of a sequence, pads included
    captions: str = "random"  # of several: `first`, a `random` one per epoch, or `all` as samples of their own
    caption_dropout: float = 0.0  # share of training captions left empty: what classifier-free guidance needs
    max_reject_share: float = 0.01  # unreadable samples above this share stop the preparation
    cache_dir: str = "cache"  # prepared token shards
    part_size: int = 8192  # samples of one part of the shards: what a killed preparation loses at most
    workers: int = 0  # processes that load batches
    trim: int = 8  # a micro-batch is as long as its longest sequence, rounded up to a multiple of this
    replay_path: str | None = None  # plain text that takes the place of pairs; read where replay_ratio > 0
    replay_ratio: float = 0.0  # share of each batch's sequences that are windows of it

    def __post_init__(self) -> None:
        one_of("data.source", self.source, SOURCES)
        expected = f"null where data.source={self.source}; {', '.join(OPENED_BY_PATH)} read one"
        require(self.val_path is None or self.source in OPENED_BY_PATH, "data.val_path", self.val_path, expected)
        one_of("data.captions", self.captions, CAPTION_CHOICES)
        for key in ("batch_size", "length", "part_size", "trim"):
            require(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "at least 1")
        for key in ("train_size", "val_size"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"data.{key}", value, "null or at least 1")
        require(0 <= self.caption_dropout < 1, "data.caption_dropout", self.caption_dropout, "a value in [0, 1)")
        require(0 <= self.max_reject_share <= 1, "data.max_reject_share", self.max_reject_share, "a value in [0, 1]")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more")
        require(
            0 <= self.replay_ratio < 1 and abs(self.replay_ratio * self.batch_size - self.replayed) < 1e-9,
            "data.replay_ratio",
            self.replay_ratio,
            f"a value in [0, 1) that gives a whole number of data.batch_size={self.batch_size} sequences",
        )

    @property
    def replayed(self) -> int:
        """Sequences of a batch that are replayed text."""
        return round(self.replay_ratio * self.batch_size)


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
    l2_sp: float = 0.0  # pull of pre-trained weights to where they began, in place of their decay; 0: none

    def __post_init__(self) -> None:
        one_of("optim.name", self.name, OPTIMIZERS)
        one_of("optim.decay", self.decay, DECAYS)
        require(self.lr > 0, "optim.lr", self.lr, "a positive value")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "optim.betas",
            self.betas,
            "two values in [0, 1)",
        )
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.warmup_steps >= 0, "optim.warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.final_lr_ratio <= 1, "optim.final_lr_ratio", self.final_lr_ratio, "a value in [0, 1]")
        require(self.l2_sp >= 0, "optim.l2_sp", self.l2_sp, "0 or more")
        require(self.grad_clip > 0, "optim.grad_clip", self.grad_clip, "a positive value")


@dataclass
class TrainerConfig:
    """Lightning's own names."""

    max_steps: int = 100_000  # optimizer steps
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"  # fsdp2 shards the model over all processes; hsdp within each node, and copies between nodes
    precision: str = "auto"  # bf16-mixed where the device computes in bfloat16, else 32-true
    accumulate_grad_batches: int = 1  # parts of a step, reduced together; under fsdp2 and hsdp gradients are then whole
    activation_checkpointing: bool = False  # recomputes blocks in the backward pass: less memory, a third more time
    packing: bool = False  # layers without pads: same loss and gradients; a demo step on a CPU takes 6 % less time
    fp8: bool = False  # layers multiply in float8 (extra `fp8`, NVIDIA from Ada on): changes curves, not comparable
    compile: bool = False  # torch.compile of each block; eager with a message where there is no C++ compiler
    val_check_interval: int = 1000  # optimizer steps between validations
    checkpoint_interval: int = 1000  # optimizer steps between checkpoints
    threads: int | None = None  # CPU threads a process; null: torch's default

    def __post_init__(self) -> None:
        one_of("trainer.strategy", self.strategy, STRATEGIES)
        one_of("trainer.precision", self.precision, PRECISIONS)
        shapes = "false with trainer.compile=true, since every batch would have a shape of its own"
        require(not (self.packing and self.compile), "trainer.packing", True, shapes)
        for key in (
            "max_steps",
            "devices",
            "num_nodes",
            "accumulate_grad_batches",
            "val_check_interval",
            "checkpoint_interval",
        ):
            require(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "at least 1")
        require(self.threads is None or self.threads >= 1, "trainer.threads", self.threads, "null or at least 1")


@dataclass
class LogConfig:
    """How often and where curves go."""

    interval: int = 10  # optimizer steps of one point of a curve; equal in both arms
    ema: float = 0.95  # smoothing of the drawn curves (Figures 3 to 5)
    logger: str = "tensorboard"

    def __post_init__(self) -> None:
        require(self.interval >= 1, "log.interval", self.interval, "at least 1")
        require(0 <= self.ema < 1, "log.ema", self.ema, "a value in [0, 1)")
        one_of("log.logger", self.logger, LOGGERS)


@dataclass
class SampleConfig:
    """What a text-to-image run draws and measures at its end."""

    prompts: int = 64  # held-out prompts drawn
    grid: int = 16  # of these shown in the grid
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0  # scale of classifier-free guidance, which needs data.caption_dropout in training; 1: none
    interval: int | None = (
        None  # optimizer steps between grids during training; null, or a sharded model: only at the end
    )
    preference_scenes: int = 500  # held-out scenes for caption preference (scenes only)

    def __post_init__(self) -> None:
        for key in ("prompts", "grid", "preference_scenes"):
            require(getattr(self, key) >= 0, f"samples.{key}", getattr(self, key), "0 or more")
        require(self.temperature > 0, "samples.temperature", self.temperature, "a positive value")
        require(self.top_k is None or self.top_k >= 1, "samples.top_k", self.top_k, "null or at least 1")
        require(self.top_p is None or 0 < self.top_p <= 1, "samples.top_p", self.top_p, "null or a value in (0, 1]")
        require(self.guidance >= 0, "samples.guidance", self.guidance, "0 or more")
        require(self.interval is None or self.interval >= 1, "samples.interval", self.interval, "null or at least 1")


@dataclass
class FidConfig:
    """FID against COCO's val2014 during training (`callbacks.CocoFID`); a finished run takes `t2i_lm.evaluate`."""

    interval: int | None = None  # optimizer steps between measurements; null: none
    coco: str | None = None  # folder with annotations/captions_val2014.json and val2014/*.jpg
    weights: str | None = None  # of torch-fidelity's Inception: a file, or `hub:ORG/NAME/FILE`
    weights_sha256: str | None = None  # another file is refused
    features: int = 2048  # layer of the network, by its width; others than 2048 are for tests
    prompts: int = 1000  # captions drawn; the distance depends on it

    def __post_init__(self) -> None:
        require(self.interval is None or self.interval >= 1, "fid.interval", self.interval, "null or at least 1")
        for key in ("coco", "weights"):
            given = getattr(self, key) is not None
            require(self.interval is None or given, f"fid.{key}", None, f"a path for fid.interval={self.interval}")
        require(self.features in FID_FEATURES, "fid.features", self.features, "64, 192, 768 or 2048")
        require(self.prompts >= 2, "fid.prompts", self.prompts, "at least 2")


@dataclass
class AlignConfig:
    """Contrastive alignment of image rows with text rows (Section 3.2); the batch is N = `data.batch_size`."""

    logit_scale_init: float = 1 / 0.07  # inverse temperature; the paper names neither, both are CLIP's
    logit_scale_max: float = 100.0
    mask_duplicates: bool = True  # pairs that share a caption or an image are no negatives of each other
    shuffle_pairs: bool = False  # control: every image keeps a caption of another one
    neighbors: int = 5  # text tokens listed for every image id

    def __post_init__(self) -> None:
        require(self.logit_scale_init > 0, "align.logit_scale_init", self.logit_scale_init, "a positive value")
        require(
            self.logit_scale_max >= self.logit_scale_init,
            "align.logit_scale_max",
            self.logit_scale_max,
            f"at least align.logit_scale_init={self.logit_scale_init:g}",
        )
        require(self.neighbors >= 1, "align.neighbors", self.neighbors, "at least 1")


@dataclass
class RunConfig:
    """Where a run's folder is made."""

    dir: str = "runs"


LOSS_BACKENDS = ("fused", "torch")


@dataclass
class ForgettingConfig:
    """What is measured of the language model before, during and after training; nothing where `interval` is null."""

    interval: int | None = None  # optimizer steps between measurements; also before the first and after the last step
    text: str | None = None  # held-out text: .txt, .txt.gz, a folder of them, or a hub name
    rows: int = 64  # evenly spaced rows of it
    length: int = 256  # ids of a row
    tasks: str | None = None  # folder of questions, NAME.jsonl[.gz] (probes/questions.py says in which forms)
    questions: int = 100  # evenly spaced questions of each
    completion_tokens: int = 32
    prompts: list[str] = field(default_factory=list)  # completed beside those of Table 1

    def __post_init__(self) -> None:
        require(self.interval is None or self.interval >= 1, "forgetting.interval", self.interval, "null or at least 1")
        for key in ("rows", "length", "questions", "completion_tokens"):
            require(getattr(self, key) >= 1, f"forgetting.{key}", getattr(self, key), "at least 1")
        if self.interval is not None and self.text is None:
            raise ValueError(
                f"forgetting.text=null: forgetting.interval={self.interval} needs held-out text, "
                "for example forgetting.text=heldout.txt.gz"
            )


@dataclass
class LossConfig:
    """What is differentiated; what is logged stays the plain loss.

    The loss is the mean over targets, weighted by modality (boundary tokens keep 1), with the z-loss added to each.
    """

    text_weight: float = 1.0  # 0: captions condition the images but are not learnt
    image_weight: float = 1.0
    replay_weight: float = 1.0  # of data.replay_path's text
    backend: str = "fused"  # or torch: its own chunked loss, in float32 and slower, for comparison
    z: float = 0.0  # factor of logsumexp squared, which keeps logits small (PaLM's z-loss, there 1e-4); 0: none

    def __post_init__(self) -> None:
        one_of("loss.backend", self.backend, LOSS_BACKENDS)
        for key in ("text_weight", "image_weight", "replay_weight", "z"):
            require(getattr(self, key) >= 0, f"loss.{key}", getattr(self, key), "0 or more")

    @property
    def weighted(self) -> bool:
        """Whether any modality's factor is not 1."""
        return (self.text_weight, self.image_weight, self.replay_weight) != (1, 1, 1)


@dataclass
class DistilConfig:
    """Distillation from the frozen initial model on text: captions and replay."""

    weight: float = 0.0  # factor of KL(initial || trained) over the text rows, nats, at every text target

    def __post_init__(self) -> None:
        require(self.weight >= 0, "distil.weight", self.weight, "0 or more")


@dataclass
class LoraConfig:
    """Low-rank adapters on the linear layers of attention and feed-forward (extra `lora`); those stay frozen."""

    rank: int = 0  # 0: none
    alpha: float = 16.0  # the adapters' product is scaled by alpha / rank

    def __post_init__(self) -> None:
        require(self.rank >= 0, "lora.rank", self.rank, "0 or more")
        require(self.alpha > 0, "lora.alpha", self.alpha, "a positive value")
