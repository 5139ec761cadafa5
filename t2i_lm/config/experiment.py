"""An experiment: its sections, the rules between them, and which keys change what is computed.

Standard library only. `load.py` merges YAML files into this frozen dataclass; a change is `dataclasses.replace`.
A wrong value raises a ValueError that names the key, the value and the allowed values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from t2i_lm.config.forgetting import NOVELS, ForgettingConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig
from t2i_lm.config.lora import LoraConfig
from t2i_lm.config.sections import (
    CODE,
    SHARDED,
    AlignConfig,
    BackboneConfig,
    DataConfig,
    DistilConfig,
    FidConfig,
    LogConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    Section,
    TextTokenizerConfig,
    TrainerConfig,
    require,
)

SCALES = ("demo", "flickr8k", "paper")  # files of experiments/scale/
TASKS = ("text_to_image", "unconditional", "align", "text", "image_tokenizer")
KEEPS_LANGUAGE = ("text_to_image", "unconditional")
CONTROLS = ("words_shuffled", "brackets", "digits")  # of data/control_text.py
LOSS_ROWS = ("all", "image")
INITS = ("pretrained", "random", "shuffled", "gaussian", "mimetic", "body_only", "embeddings_only", "aligned")
NEW_ROWS = ("random", "mean", "aligned", "codebook", "words")
# Keys that may select a plug-in.
PLUGIN_KEYS = ("backbone.path", "text_tokenizer.path", "image_tokenizer.path", "data.source")
# Keys of files and folders: `~` is the home folder, and a relative path starts where the run was started.
PATH_KEYS = (
    "aligned_rows",
    "backbone.path",
    "backbone.config",
    "text_tokenizer.path",
    "image_tokenizer.path",
    "data.path",
    "data.val_path",
    "data.second_val_path",
    "data.cache_dir",
    "data.replay_path",
    "fid.coco",
    "fid.weights",
    "forgetting.text",
    "forgetting.second_text",
    "forgetting.tasks",
    "run.dir",
)

# Keys that change no curve, in three groups; `samples.` stands for all keys of the section.
# 1. Where a run works, what it prints, and limits at which it stops. These may change when it is resumed.
RESUMABLE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.rank_timeout",
    "trainer.phase_timeout",
    "trainer.checkpoint_interval",
    "trainer.keep_steps",
    "data.workers",
    "data.remote_cache_gib",
    "log.logger",
    "data.max_reject_share",
    "data.max_recurring_share",
    "data.max_truncated_share",
)
# 2. Where files lie, and what they must be.
PLACES = ("run.", "data.cache_dir", "image_tokenizer.expect", "allow_code")
# 3. What else a run measures, and at what cost it computes the same. Runs that differ here report other things.
REPORTED = (
    "samples.",
    "fid.",
    "forgetting.",
    "trainer.packing",
    "trainer.activation_checkpointing",
    "data.pad_to_multiple_of",
)


# Keys that decide the model, the order of the data or an average, and cannot change within a run.
FIXED = (
    "name",
    "task",
    "scale",
    "seed",
    "init",
    "tune",
    "freeze",
    "modality_experts",
    "image_tokenizer.words",
    "image_tokenizer.caption_weight",
    "new_rows",
    "loss_rows",
    "backbone.",
    "lora.",
    "optim.name",
    "data.source",
    "data.batch_size",
    "data.seed",
    "trainer.accumulate_grad_batches",
    "log.ema",
)


def is_file_name(name: str) -> bool:
    """Whether a name is that of one file or folder, without a way to another one."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def stays_inside(path: str) -> bool:
    """Whether a path names a folder below the one that it starts from."""
    parts = path.split("/")
    return all(part not in (".", "..") for part in parts) and parts[0] != "" and "\0" not in path


def is_fixed(key: str) -> bool:
    """Whether a dotted key cannot change within a run."""
    return _among(key, FIXED) and key not in PATH_KEYS


def may_move(key: str) -> bool:
    """Whether a dotted key may change on resume: where a run works and where its files lie, whose content is hashed."""
    return _among(key, (*RESUMABLE, *PLACES, *PATH_KEYS))


def is_neutral(key: str) -> bool:
    """Whether a dotted key changes no curve."""
    return _among(key, (*RESUMABLE, *PLACES, *REPORTED))


def is_reported(key: str) -> bool:
    """Whether a key changes no curve, but what a run reports beside its curves."""
    return _among(key, REPORTED)


def _among(key: str, group: tuple[str, ...]) -> bool:
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in group)


@dataclass(frozen=True)
class ExperimentConfig(Section):
    """One experiment at one scale."""

    name: str = "experiment"
    """Name of the experiment and of its folder of runs."""
    task: str = "text_to_image"
    """`text_to_image`, `unconditional` (images alone), `align` (image rows with text rows), `text` (a language model)
    or `image_tokenizer`."""
    scale: str = "demo"
    """Name of the overlay in scale/, set by `--scale`."""
    seed: int = 0
    """Seed of weights, data order and dropout, in [0, 2**32)."""
    init: str = "pretrained"
    """Initial weights: `pretrained`, `random`, `shuffled` (each pre-trained tensor permuted), `gaussian` (its mean and
    deviation), `mimetic` (with the structure of its attention), `body_only` or `embeddings_only` (the rest random), or
    `aligned` (pre-trained, with image rows from an alignment)."""
    tune: str = "all"
    """Trained parameters of Figure 5, one of TUNE_SETS in models/freeze.py."""
    freeze: list[str] = field(default_factory=list)
    """Groups of FREEZE_GROUPS in models/freeze.py that are frozen, regardless of `tune`; with modality_experts also
    `text_expert` or `image_expert`."""
    modality_experts: bool = False
    """Image positions have norms, attention projections and feed-forward layers of their own, which start as copies of
    the language model's; freeze=[text_expert,text_rows] keeps the language model as it is."""
    new_rows: str = "random"
    """Initial image rows, by the same rule in every arm: `random`, `mean`, `aligned`, `codebook`, or `words` (text rows
    of each code's words, of an image tokenizer that has some). `mean` and `words` use the arm's own text rows."""
    aligned_rows: str | None = None
    """With `aligned`: the file or run folder of an alignment, or `latest`."""
    loss_rows: str = "all"
    """Rows of the softmax: `all`, or with task=unconditional `image`."""
    allow_code: bool = False
    """Permits `code:MODULE:FUNCTION[:ARGUMENT]` in place of a plug-in: runs the code of MODULE, whoever wrote it."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    text_tokenizer: TextTokenizerConfig = field(default_factory=TextTokenizerConfig)
    image_tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    log: LogConfig = field(default_factory=LogConfig)
    samples: SampleConfig = field(default_factory=SampleConfig)
    fid: FidConfig = field(default_factory=FidConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distil: DistilConfig = field(default_factory=DistilConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    forgetting: ForgettingConfig = field(default_factory=ForgettingConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        self.check(stays_inside(self.name), "name", "the name of a folder inside run.dir: no ../, no / in front")
        self.check(is_file_name(self.scale), "scale", "the name of a file in scale/")
        self.one_of("task", TASKS)
        self.one_of("init", INITS)
        self.one_of("new_rows", NEW_ROWS)
        self.one_of("loss_rows", LOSS_ROWS)
        self.check(0 <= self.seed < 2**32, "seed", "a value in [0, 2**32)")
        self.check(not any("," in group for group in self.freeze), "freeze", "names in brackets, such as [ffn,norm]")
        for refused, key, expected in self._rules():
            require(not refused, key, self.value(key), expected)

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    def _rules(self) -> Iterator[tuple[bool, str, str]]:
        """Rules between keys, in the order in which they are checked: (refused, key, expected value)."""
        task, data, optim, trainer = f"task={self.task}", self.data, self.optim, self.trainer
        sharded = f"trainer.strategy={trainer.strategy}"
        for key in PLUGIN_KEYS:
            code = (self.value(key) or "").startswith(CODE)
            yield (
                code and not self.allow_code,
                key,
                "a path or a plug-in; code: runs code, which requires allow_code=true",
            )

        # Tasks
        text, image_tokenizer, align = (self.task == name for name in ("text", "image_tokenizer", "align"))
        yield text != (data.source == "text"), "data.source", f"{'' if text else 'not '}text with {task}"
        yield (text or image_tokenizer) and self.init != "random", "init", f"random, with which {task} starts"
        yield self.loss_rows != "all" and self.task != "unconditional", "loss_rows", f"all with {task}"
        yield data.control not in (None, *CONTROLS), "data.control", f"null or one of {', '.join(CONTROLS)}"
        yield data.control is not None and not text, "data.control", f"null with {task}"
        ratio = data.text_ratio is not None
        yield ratio and self.task != "text_to_image", "data.text_ratio", f"null with {task}"
        joined = f"random or all with data.text_ratio={data.text_ratio}, which is of the mean length of all captions"
        yield ratio and data.captions == "first", "data.captions", joined
        yield self.fid.interval is not None and self.task != "text_to_image", "fid.interval", f"null with {task}"
        for key, plain, word in (
            ("trainer.packing", False, "false"),
            ("trainer.fp8", False, "false"),
            ("trainer.autotune", False, "false"),
            ("loss.backend", "fused", "fused"),
            ("optim.name", "adamw", "adamw"),
        ):
            no_language_model = f"{word}, {task} trains no language model"
            yield (align or image_tokenizer) and self.value(key) != plain, key, no_language_model
        # A scale's default on shipped text is no request: it is left out where a run cannot measure.
        forgetting = self.forgetting.interval is not None and self.forgetting.text != NOVELS
        kept = self.task in KEEPS_LANGUAGE
        yield forgetting and not kept, "forgetting.interval", f"null, {task} keeps no language model"
        yield image_tokenizer and not data.has_images, "data.source", f"a source of images with {task}"
        yield image_tokenizer and self.tune != "all", "tune", f"all with {task}"
        yield image_tokenizer and bool(self.freeze), "freeze", f"an empty list with {task}"
        cell = self.image_tokenizer.model.cell
        whole_cells = self.image_tokenizer.size % cell == 0
        yield image_tokenizer and not whole_cells, "image_tokenizer.size", f"a multiple of {cell}, the side of an id"
        too_few = data.val_size is not None and data.val_size < data.batch_size
        in_batches = f"on whole batches of data.batch_size={data.batch_size}, since the loss depends on their size"
        if image_tokenizer and self.image_tokenizer.caption_weight > 0:
            whole = (
                f"1, image_tokenizer.caption_weight={self.image_tokenizer.caption_weight:g} compares the whole batch"
            )
            yield trainer.accumulate_grad_batches != 1, "trainer.accumulate_grad_batches", whole
            yield data.captions == "all", "data.captions", f"first or random with {task}, which takes each image once"
            yield too_few, "data.val_size", f"null or at least a batch: captions are compared {in_batches}"
        if align:
            rows_alone = f"{task} trains the image rows alone, from random ones"
            yield self.tune != "all", "tune", f"all, {rows_alone}"
            yield bool(self.freeze), "freeze", f"an empty list, {rows_alone}"
            yield self.new_rows != "random", "new_rows", f"random, {rows_alone}"
            yield self.init == "aligned", "init", f"another than aligned, {rows_alone}"
            whole = f"1, {task} takes its negatives from the whole batch"
            yield trainer.accumulate_grad_batches != 1, "trainer.accumulate_grad_batches", whole
            yield too_few, "data.val_size", f"null or at least a batch: {task} validates {in_batches}"

        # Initial weights
        aligned_twice = self.init == "aligned" and self.new_rows not in ("random", "aligned")
        yield aligned_twice, "new_rows", "random or aligned with init=aligned, whose image rows are aligned"

        # Remedies
        for key, used in (
            ("loss.text_weight", self.loss.text_weight != 1),
            ("loss.image_weight", self.loss.image_weight != 1),
            ("loss.replay_weight", self.loss.replay_weight != 1),
            ("distil.weight", self.distil.weight > 0),
            ("data.replay_ratio", data.replay_ratio > 0),
            ("lora.rank", self.lora.rank > 0),
            ("modality_experts", self.modality_experts),
            ("optim.gradient_projection", optim.gradient_projection),
        ):
            off = "1" if key.startswith("loss") else "false" if isinstance(self.value(key), bool) else "0"
            yield used and self.task != "text_to_image", key, f"{off} with {task}, it is for task=text_to_image"
        no_language = self.init not in ("pretrained", "aligned")
        no_images = self.task not in ("text_to_image", "unconditional")
        anchors = f"0 with init={self.init} and {task}: it requires an image model with pre-trained weights"
        yield optim.l2_sp > 0 and (no_images or self.init == "random"), "optim.l2_sp", anchors
        yield (
            self.lora.rank > 0 and self.tune != "all",
            "tune",
            f"all with lora.rank={self.lora.rank}, which freezes all pre-trained weights",
        )
        no_replay = f"1 with data.replay_ratio={data.replay_ratio:g}"
        yield self.loss.replay_weight != 1 and not data.replay_ratio, "loss.replay_weight", no_replay
        dropped = data.caption_dropout > 0 and self.task != "text_to_image"
        yield dropped, "data.caption_dropout", f"0 with {task}"
        distil = f"0, init={self.init} has no language to distil from"
        yield self.distil.weight > 0 and no_language, "distil.weight", distil
        yield (
            optim.l2_sp > 0 and self.lora.rank > 0,
            "optim.l2_sp",
            f"0 with lora.rank={self.lora.rank}, which leaves all pre-trained weights at their initial values",
        )

        experts = self.modality_experts
        yield (
            experts and trainer.fp8,
            "trainer.fp8",
            "false with modality_experts=true, of which a batch may use one half alone",
        )
        yield (
            experts and self.lora.image_only,
            "lora.image_only",
            "false with modality_experts=true; with freeze=[text_expert] adapters are on the image half alone",
        )
        yield (
            optim.gradient_projection and not data.replay_ratio,
            "data.replay_ratio",
            "more than 0 with optim.gradient_projection=true, whose second loss is that of replayed text",
        )

        # Sharded models
        if trainer.strategy in SHARDED:
            yield align or image_tokenizer, "trainer.strategy", f"ddp, {task} is small and not sharded"
            yield optim.name == "muon", "optim.name", f"adamw with {sharded}, muon needs whole matrices"
            for key in (
                *("forgetting.interval", "fid.interval"),
                *("optim.l2_sp", "optim.gradient_projection", "distil.weight", "lora.rank"),
            ):
                off = "null" if key.endswith("interval") else "false" if key.endswith("projection") else "0"
                whole_model = f"{off} with {sharded}, {key} needs the whole model in every process; or use ddp"
                requested = forgetting if key == "forgetting.interval" else bool(self.value(key))
                yield requested, key, whole_model

        # Steps and batches
        steps = f"less than trainer.max_steps={trainer.max_steps}"
        yield optim.warmup_steps >= trainer.max_steps, "optim.warmup_steps", steps
        outside = any(not 1 <= step <= trainer.max_steps for step in trainer.keep_steps)
        yield outside, "trainer.keep_steps", f"steps from 1 to trainer.max_steps={trainer.max_steps}"
        share = trainer.processes * trainer.accumulate_grad_batches
        factors = "trainer.devices x trainer.num_nodes x trainer.accumulate_grad_batches"
        yield data.batch_size % share != 0, "data.batch_size", f"a multiple of {share} ({factors})"
        yield (
            optim.gradient_projection and math.ceil(data.replay_ratio * self.micro_batch) >= self.micro_batch,
            "optim.gradient_projection",
            f"false with micro-batches of {self.micro_batch}, which may hold no caption-image pair",
        )

    @property
    def measures_forgetting(self) -> bool:
        """Whether a run measures forgetting: requested or a scale's default, and possible."""
        possible = self.task in KEEPS_LANGUAGE and self.trainer.strategy not in SHARDED
        return self.forgetting.interval is not None and possible

    @property
    def reads_rows(self) -> bool:
        """Whether an image tokenizer is trained by the text rows of a language model."""
        return self.task == "image_tokenizer" and self.image_tokenizer.reads_rows

    @property
    def image_rows(self) -> str:
        """Initial image rows: `new_rows`, where init=aligned implies aligned."""
        return "aligned" if self.init == "aligned" else self.new_rows

    @property
    def notes(self) -> list[str]:
        """A line for each key that is set and has no effect."""
        decoder = ("trainer.compile", "trainer.activation_checkpointing", "loss.z")
        no_decoder = self.task in ("align", "image_tokenizer")
        unused = {
            key: f"task={self.task} trains no language model" for key in decoder if no_decoder and self.value(key)
        }
        if self.aligned_rows is not None and self.image_rows != "aligned":
            unused["aligned_rows"] = f"init={self.init} and new_rows={self.new_rows} start from no aligned rows"
        return [f"note: {key}={self.value(key)} has no effect: {reason}" for key, reason in unused.items()]

    def require_paths(self) -> None:
        """Checks that every path is set that a run reads, and no path to data that it does not; a dry run does without.

        Raises:
            ValueError: naming the first key.
        """
        images = self.task in ("text_to_image", "unconditional", "align")
        replay = f"text for data.replay_ratio={self.data.replay_ratio}: a .txt or .txt.gz file, or a folder of them"
        for needed, key, expected in (
            (
                self.data.reads_path,
                "data.path",
                f"a path for data.source={self.data.source}",
            ),
            (images, "text_tokenizer.path", f"a path for task={self.task}"),
            (self.reads_rows, "text_tokenizer.path", "that of the language model whose rows the codes are trained by"),
            (self.reads_rows, "backbone.path", "the language model whose text rows the codes are trained by"),
            (images, "image_tokenizer.path", f"a path for task={self.task}"),
            (images and self.init != "random", "backbone.path", f"a checkpoint for init={self.init}"),
            (
                images and self.image_rows == "aligned",
                "aligned_rows",
                "the file or run folder of an alignment, or latest",
            ),
            (self.data.replay_ratio > 0, "data.replay_path", replay),
        ):
            require(not needed or self.value(key) is not None, key, self.value(key), expected)
        unread = self.data.source == "scenes" and self.data.path is not None
        generated = "null with data.source=scenes, which are generated; to read it, name its kind by data.source"
        require(not unread, "data.path", self.data.path, generated)

    @property
    def micro_batch(self) -> int:
        """Samples of one rank in one forward pass."""
        trainer = self.trainer
        return self.data.batch_size // (trainer.processes * trainer.accumulate_grad_batches)
