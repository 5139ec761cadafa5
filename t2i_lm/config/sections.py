"""The sections of an experiment (`experiment.py`), each a frozen dataclass that checks its values.

Standard library only. A wrong value raises a ValueError that names the key, the value and the allowed values.
`docs/configuration.md` is made from the docstrings of the keys.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

SOURCES = ("scenes", "image_folder", "parquet", "webdataset", "hub", "hub_stream", "shards", "text")
IMAGES_BY_PATH = ("image_folder", "parquet", "webdataset")
OPENED_BY_PATH = (*IMAGES_BY_PATH, "text")
CAPTION_CHOICES = ("first", "random", "all")
LOGGERS = ("tensorboard", "csv", "wandb", "none")
OPTIMIZERS = ("adamw", "muon")
DECAYS = ("all", "matrices")
STRATEGIES = ("auto", "ddp", "fsdp2", "hsdp")
SHARDED = ("fsdp2", "hsdp")
FID_FEATURES = (64, 192, 768, 2048)
PRECISIONS = ("auto", "32-true", "bf16-mixed")
LOSS_BACKENDS = ("fused", "torch")
# `plugin:NAME[:ARGUMENT]`, `code:MODULE:FUNCTION[:ARGUMENT]` (`runtime/plugins.py`); `asset:NAME` (`assets/`).
PLUGIN, CODE, ASSET = "plugin:", "code:", "asset:"


def is_plugin(value: str | None) -> bool:
    """Whether the value of a key selects a plug-in."""
    return value is not None and value.startswith((PLUGIN, CODE))


def require(condition: bool, key: str, value: Any, allowed: str) -> None:
    """Raises the ValueError of a wrong value."""
    if not condition:
        raise ValueError(f"{key}={value!r}: expected {allowed}")


class Section:
    """Base of the sections: checks that name a key in full. A key whose default is null may also be null."""

    prefix: ClassVar[str] = ""

    def __init_subclass__(cls, prefix: str = "") -> None:
        cls.prefix = f"{prefix}." if prefix else ""

    def check(self, condition: bool, name: str, allowed: str) -> None:
        """Any condition on the key `name`."""
        require(condition, f"{self.prefix}{name}", getattr(self, name), allowed)

    def at_least(self, least: int, *names: str) -> None:
        """Keys of numbers with a smallest value."""
        for name in names:
            value, null = getattr(self, name), self._null(name)
            self.check(value is None or value >= least, name, null + (f"at least {least}" if least else "0 or more"))

    def positive(self, *names: str) -> None:
        """Keys of numbers above 0."""
        for name in names:
            self.check(getattr(self, name) > 0, name, "a positive value")

    def share(self, *names: str) -> None:
        """Keys of numbers in [0, 1]."""
        for name in names:
            self.check(0 <= getattr(self, name) <= 1, name, "a value in [0, 1]")

    def below_one(self, *names: str) -> None:
        """Keys of numbers in [0, 1)."""
        for name in names:
            self.check(0 <= getattr(self, name) < 1, name, "a value in [0, 1)")

    def one_of(self, name: str, allowed: Collection[str]) -> None:
        """A key of names."""
        value = getattr(self, name)
        self.check(value is None or value in allowed, name, f"{self._null(name)}one of {', '.join(allowed)}")

    def _null(self, name: str) -> str:
        return "null or " if getattr(type(self), name, 0) is None else ""


@dataclass(frozen=True)
class BackboneConfig(Section, prefix="backbone"):
    """The language model: `config` is its architecture, `path` its pre-trained weights."""

    path: str | None = None
    """Weights: an open_lm `.pt` or safetensors file, its folder, or a `transformers` folder; also `asset:NAME`,
    `hf://ORG/NAME[/FILE]` or a plug-in (docs/plugins.md)."""
    config: str | None = None
    """Architecture: a preset of config/presets.py, an open_lm model JSON, or a `transformers` folder; null: config.json
    beside `path`."""
    positional: str | None = None
    """Replaces the architecture's positional_embedding_type."""
    seq_len: int | None = None
    """Positions of the rotary tables, where more than the architecture's."""

    def __post_init__(self) -> None:
        self.at_least(1, "seq_len")


@dataclass(frozen=True)
class TextTokenizerConfig(Section, prefix="text_tokenizer"):
    """The text tokenizer, which must be the backbone's."""

    path: str | None = None
    """A sentencepiece model or a `tokenizer.json`; also `asset:lm_rotary/text_tokenizer.model`, `hf://ORG/NAME/FILE` or
    a plug-in. null: task=text trains a sentencepiece model."""
    document_start: str | None = None
    """Token in front of every document, such as `<bos>`, or `none`; null: as the model's own files say."""
    document_end: str | None = None
    """Token behind every document, such as `<eos>`; null: as the model's own files say."""
    vocab_size: int = 4096
    """Pieces of a trained model, more than 259."""
    train_paragraphs: int = 100_000
    """Evenly spaced paragraphs that a model is trained on."""

    def __post_init__(self) -> None:
        self.check(self.vocab_size > 259, "vocab_size", "more than 259")
        self.at_least(1, "train_paragraphs")


@dataclass(frozen=True)
class DataConfig(Section, prefix="data"):
    """Data and batches."""

    source: str = "scenes"
    """`scenes` (generated), `image_folder`, `parquet`, `webdataset`, `hub` or `hub_stream` (Hugging Face datasets),
    `shards` (token shards prepared elsewhere), `text` (task=text), or a plug-in."""
    path: str | None = None
    """File, folder or name of a Hugging Face dataset, for every source but `scenes`; of `shards` and `hub_stream` also
    a URL."""
    val_path: str | None = None
    """Held-out data; null: validation data in `path` by name, or a twentieth of its images. task=text requires it."""
    second_val_path: str | None = None
    """A second held-out set, such as photographs of another domain: measured as `val/second`, the other as
    `val/first`."""
    train_size: int | None = None
    """Training samples taken from the source; null: all. `scenes` requires a number."""
    val_size: int | None = None
    """Held-out samples taken from the source; null: all. `scenes` requires a number, of each validation split."""
    seed: int = 0
    """Seed of generated scenes, not of the run."""
    hold_out_pairs: bool = True
    """With `scenes`: keeps some color-shape pairs out of training; `val/compositional` has those, `val/iid` others."""
    batch_size: int = 64
    """Global batch size in sequences, split over ranks and accumulation."""
    length: int = 128
    """Positions of a sequence, pads included."""
    captions: str = "random"
    """Of several captions of an image: the `first`, a `random` one per epoch, or `all`, each a sample of its own."""
    caption_dropout: float = 0.0
    """Share of training captions left empty, in [0, 1), for classifier-free guidance."""
    control: str | None = None
    """With task=text, what replaces the words of documents: `words_shuffled`, `brackets` (nested pairs) or `digits`."""
    text_ratio: float | None = None
    """Text ids per image id in training, in (0, 1]: captions of an image are joined, or some left out, as with
    caption_dropout; null: one caption each. Scenes have several captions where they are joined."""
    max_reject_share: float = 0.01
    """Largest share of unusable samples, in [0, 1]; above it the preparation, or task=image_tokenizer, stops."""
    max_recurring_share: float = 0.0
    """Largest share of validation images whose ids are also a training image's, or of held-out documents that are also
    trained on, in [0, 1]; scenes are only counted."""
    max_truncated_share: float = 1.0
    """Largest share of captions longer than the text budget of `length`, which are cut, in [0, 1]."""
    cache_dir: str = "cache"
    """Folder of prepared token shards."""
    part_size: int = 8192
    """Samples per part of the shards: the most that an interrupted preparation loses."""
    shuffle_parts: int | None = None
    """Parts whose samples are mixed at a time; null: all samples are. Remote shards and `hub_stream` require it
    (docs/data.md)."""
    remote_cache_gib: float = 16.0
    """Disk, in GiB, that the parts of remote shards, or those made of a streamed dataset, take in cache_dir at most."""
    workers: int = 0
    """Processes that load batches; 0: the training process."""
    pad_to_multiple_of: int = 8
    """A micro-batch is as long as its longest sequence, rounded up to a multiple of this; the loss does not change."""
    replay_path: str | None = None
    """Plain text in place of pairs, read where replay_ratio > 0."""
    replay_ratio: float = 0.0
    """Share of each batch's sequences that are windows of replay_path, in [0, 1); a whole number of sequences."""

    def __post_init__(self) -> None:
        if not is_plugin(self.source):
            self.check(self.source in SOURCES, "source", f"one of {', '.join(SOURCES)}, or plugin:NAME")
            readers = f"null where data.source={self.source}; {', '.join(OPENED_BY_PATH)} read one"
            self.check(self.val_path is None or self.source in OPENED_BY_PATH, "val_path", readers)
        images = f"null where data.source={self.source}; {', '.join(IMAGES_BY_PATH)} read one"
        self.check(self.second_val_path is None or self.source in IMAGES_BY_PATH, "second_val_path", images)
        self.one_of("captions", CAPTION_CHOICES)
        self.at_least(1, "batch_size", "length", "part_size", "pad_to_multiple_of", "train_size", "val_size")
        self.at_least(1, "shuffle_parts")
        self.at_least(0, "workers")
        self.positive("remote_cache_gib")
        self.below_one("caption_dropout")
        self.check(self.text_ratio is None or 0 < self.text_ratio <= 1, "text_ratio", "null or a value in (0, 1]")
        both = self.text_ratio is not None and self.caption_dropout > 0
        self.check(not both, "caption_dropout", "0 where data.text_ratio is given, which empties captions too")
        self.share("max_reject_share", "max_recurring_share", "max_truncated_share")
        self.check(
            0 <= self.replay_ratio < 1 and abs(self.replay_ratio * self.batch_size - self.replayed) < 1e-9,
            "replay_ratio",
            f"a value in [0, 1) that gives a whole number of data.batch_size={self.batch_size} sequences",
        )

    @property
    def reads_path(self) -> bool:
        """Whether the source requires `path`: neither scenes nor plug-ins do."""
        return self.source != "scenes" and not is_plugin(self.source)

    @property
    def paths(self) -> dict[str, str]:
        """The paths that are given, by key: training data, and what is held out."""
        found = {f"data.{name}": getattr(self, name) for name in ("path", "val_path", "second_val_path")}
        return {key: path for key, path in found.items() if path is not None}

    @property
    def has_images(self) -> bool:
        """Whether the source has images: token shards hold only their ids."""
        return self.source != "shards"

    @property
    def replayed(self) -> int:
        """Sequences of a batch that are replayed text."""
        return round(self.replay_ratio * self.batch_size)


@dataclass(frozen=True)
class OptimConfig(Section, prefix="optim"):
    """The optimizer with warm-up and cosine decay (Section 2.1); values that the paper does not state are open_lm's."""

    name: str = "adamw"
    """`adamw` or `muon`."""
    lr: float = 3e-4
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates of moments, each in [0, 1)."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    decay: str = "all"
    """Parameters that are decayed: `all`, or `matrices`."""
    warmup_steps: int = 2000
    """Optimizer steps of linear warm-up, fewer than trainer.max_steps."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end of the cosine, as a share of `lr`; 1: constant after the warm-up."""
    grad_clip: float = 1.0
    """Largest norm of the gradients."""
    l2_sp: float = 0.0
    """Pull of pre-trained weights to their initial values, in place of their decay (L2-SP); 0: none."""
    gradient_projection: bool = False
    """Where the gradients of caption-image pairs and of replayed text conflict, projects each onto the normal plane of
    the other (PCGrad); requires data.replay_ratio."""

    def __post_init__(self) -> None:
        self.one_of("name", OPTIMIZERS)
        self.one_of("decay", DECAYS)
        self.positive("lr", "grad_clip")
        self.check(len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "betas", "two values in [0, 1)")
        self.at_least(0, "weight_decay", "warmup_steps", "l2_sp")
        self.share("final_lr_ratio")


@dataclass(frozen=True)
class TrainerConfig(Section, prefix="trainer"):
    """Lightning's Trainer, by its own names, and how the model is run."""

    max_steps: int = 100_000
    """Optimizer steps."""
    accelerator: str = "auto"
    """`auto`, `cpu`, `gpu` or `cuda`. Losses are summed in float64, which Apple's MPS does not have."""
    devices: int = 1
    """Processes per node, one per GPU."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "auto"
    """`auto`, `ddp`, `fsdp2` (sharded over all processes) or `hsdp` (sharded within a node, copied between nodes)."""
    precision: str = "auto"
    """`32-true`, `bf16-mixed`, or `auto`: bf16-mixed where the device computes in bfloat16, else 32-true."""
    accumulate_grad_batches: int = 1
    """Micro-batches per optimizer step; under fsdp2 and hsdp, whole gradients are kept between them."""
    activation_checkpointing: bool = False
    """Recomputes blocks in the backward pass: less memory, a third more time, the same values."""
    packing: bool = False
    """Layers skip pads: the same loss and gradients; a demo step on a CPU takes 6 % less time."""
    fp8: bool = False
    """Linear layers multiply in float8 (extra `fp8`, NVIDIA GPUs from Ada on): curves change and are not comparable."""
    compile: bool = False
    """torch.compile of each block; eager, with a message, where there is no C++ compiler."""
    autotune: bool = False
    """Compiled matrix products by the fastest of several kernels, timed as the run starts (minutes); GPUs only."""
    val_check_interval: int = 1000
    """Optimizer steps between validations."""
    checkpoint_interval: int = 1000
    """Optimizer steps between checkpoints."""
    keep_steps: list[int] = field(default_factory=list)
    """Steps whose checkpoints are saved and kept, such as [200, 400], beside the newest two."""
    threads: int | None = None
    """CPU threads per process; null: OMP_NUM_THREADS, else the cores within a container's CPU quota, divided by
    `devices`."""
    skip_loss_above: float | None = None
    """Skips steps, on all processes alike, whose loss exceeds this multiple of its moving average; null: none."""
    rank_timeout: float = 60.0
    """Seconds without a sign of life of a process, or progress of its step, after which the run ends and names it."""
    phase_timeout: float = 1800.0
    """The same for progress while it builds, compiles, validates, saves or measures."""

    def __post_init__(self) -> None:
        self.one_of("strategy", STRATEGIES)
        self.one_of("precision", PRECISIONS)
        self.check(not (self.packing and self.compile), "packing", "false with trainer.compile=true: shapes vary")
        self.check(self.compile or not self.autotune, "autotune", "false without trainer.compile=true")
        self.at_least(1, "max_steps", "devices", "num_nodes", "accumulate_grad_batches")
        self.at_least(1, "val_check_interval", "checkpoint_interval", "threads")
        self.positive("rank_timeout", "phase_timeout")
        self.check(self.skip_loss_above is None or self.skip_loss_above > 1, "skip_loss_above", "null or more than 1")

    @property
    def processes(self) -> int:
        """Number of processes that train together."""
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class LogConfig(Section, prefix="log"):
    """Logging of curves."""

    interval: int = 10
    """Optimizer steps per point of a curve; equal in both arms."""
    ema: float = 0.95
    """Smoothing of the curves of Figures 3 to 5, in [0, 1)."""
    logger: str = "tensorboard"
    """`tensorboard`, `csv`, `wandb` or `none`; metrics.jsonl is always written."""

    def __post_init__(self) -> None:
        self.at_least(1, "interval")
        self.below_one("ema")
        self.one_of("logger", LOGGERS)


@dataclass(frozen=True)
class SampleConfig(Section, prefix="samples"):
    """Sampled images of a text-to-image run, and measurements on them at its end."""

    prompts: int = 64
    """Held-out prompts that are sampled; 0: none."""
    grid: int = 16
    """Samples shown in the grid."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_k: int | None = None
    """Most likely ids that are sampled from; null: all."""
    top_p: float | None = None
    """Probability mass that is sampled from, in (0, 1]; null: all."""
    guidance: float = 1.0
    """Scale of classifier-free guidance, meant for runs with data.caption_dropout above 0; 1: none."""
    interval: int | None = None
    """Optimizer steps between grids during training; null, or a sharded model: only at the end."""
    preference_scenes: int = 500
    """Held-out scenes for caption preference, of each validation split, with data.source=scenes."""

    def __post_init__(self) -> None:
        self.at_least(0, "prompts", "grid", "preference_scenes", "guidance")
        self.at_least(1, "top_k", "interval")
        self.positive("temperature")
        self.check(self.top_p is None or 0 < self.top_p <= 1, "top_p", "null or a value in (0, 1]")


@dataclass(frozen=True)
class FidConfig(Section, prefix="fid"):
    """FID against COCO val2014 during training (`callbacks.CocoFID`); of a finished run: `t2i_lm.evaluate`."""

    interval: int | None = None
    """Optimizer steps between measurements; null: none."""
    coco: str | None = None
    """Folder with annotations/captions_val2014.json and val2014/*.jpg."""
    weights: str | None = None
    """Weights of torch-fidelity's Inception: a file, or `hf://ORG/NAME/FILE`."""
    weights_sha256: str | None = None
    """Hash of the weights; another file is refused. null: any."""
    features: int = 2048
    """Layer of the network, by its width: 64, 192, 768 or 2048; others than 2048 are for tests."""
    prompts: int = 1000
    """Captions sampled, at least 2; the distance depends on their number."""

    def __post_init__(self) -> None:
        self.at_least(1, "interval")
        for name in ("coco", "weights"):
            present = self.interval is None or getattr(self, name) is not None
            self.check(present, name, f"a path for fid.interval={self.interval}")
        self.check(self.features in FID_FEATURES, "features", "64, 192, 768 or 2048")
        self.at_least(2, "prompts")


@dataclass(frozen=True)
class AlignConfig(Section, prefix="align"):
    """Contrastive alignment of image rows with text rows (Section 3.2); the batch is N = `data.batch_size`.

    Temperature and `mask_duplicates` are also those of `image_tokenizer.caption_weight`.
    """

    logit_scale_init: float = 1 / 0.07
    """Initial inverse temperature; the paper names none, this and the largest are CLIP's."""
    logit_scale_max: float = 100.0
    """Largest inverse temperature."""
    mask_duplicates: bool = True
    """Pairs that share a caption or an image are no negatives of each other."""
    shuffle_pairs: bool = False
    """Control: every image gets the caption of another one."""
    neighbors: int = 5
    """Text tokens listed per image id."""

    def __post_init__(self) -> None:
        self.positive("logit_scale_init")
        least = self.logit_scale_init
        self.check(self.logit_scale_max >= least, "logit_scale_max", f"at least align.logit_scale_init={least:g}")
        self.at_least(1, "neighbors")


@dataclass(frozen=True)
class LossConfig(Section, prefix="loss"):
    """The loss that is differentiated; the logged loss stays plain cross-entropy.

    It is the mean over targets, weighted by modality (boundary tokens keep 1), plus the z-loss of each.
    """

    text_weight: float = 1.0
    """Weight of text targets; 0: captions condition the images but are not trained on."""
    image_weight: float = 1.0
    """Weight of image targets."""
    replay_weight: float = 1.0
    """Weight of targets in data.replay_path's text."""
    backend: str = "fused"
    """`fused`, or `torch`: PyTorch's own chunked loss, in float32 and slower, for comparison."""
    z: float = 0.0
    """Factor of logsumexp squared, which keeps logits small (PaLM's z-loss, there 1e-4); 0: none."""

    def __post_init__(self) -> None:
        self.one_of("backend", LOSS_BACKENDS)
        self.at_least(0, "text_weight", "image_weight", "replay_weight", "z")

    @property
    def weighted(self) -> bool:
        """Whether any modality's weight is not 1."""
        return (self.text_weight, self.image_weight, self.replay_weight) != (1, 1, 1)


@dataclass(frozen=True)
class DistilConfig(Section, prefix="distil"):
    """Distillation from the frozen initial model on text: captions and replay."""

    weight: float = 0.0
    """Factor of KL(initial || trained) over the text rows, in nats per text target; 0: none."""

    def __post_init__(self) -> None:
        self.at_least(0, "weight")


@dataclass(frozen=True)
class RunConfig(Section, prefix="run"):
    """Run folders."""

    dir: str = "runs"
    """Folder of run folders; a run lies in DIR/NAME/DATE-TIME-SCALE."""
