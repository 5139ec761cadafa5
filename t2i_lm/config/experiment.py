"""An experiment: its sections, values derived from several keys, and the rules between keys.

Standard library only. `load.py` merges YAML files into this frozen dataclass; a change is `dataclasses.replace`.
A wrong value raises a ValueError that names the key, the value and the allowed values.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from t2i_lm.config.forgetting import NOVELS, ForgettingConfig
from t2i_lm.config.image_tokenizer import ImageTokenizerConfig
from t2i_lm.config.key_groups import PLUGIN_KEYS
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

# Whether a config is refused, for which key, and what is expected there.
Rule = tuple[bool, str, str]


def is_file_name(name: str) -> bool:
    """Whether a name is that of one file or folder, without a way to another one."""
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def stays_inside(path: str) -> bool:
    """Whether a path names a folder below the one that it starts from."""
    parts = path.split("/")
    return all(part not in (".", "..") for part in parts) and parts[0] != "" and "\0" not in path


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
        for refused, key, expected in rules(self):
            require(not refused, key, self.value(key), expected)

    def value(self, key: str) -> Any:
        """The value of a dotted key."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

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
        """A line for each key without effect: of a decoder where none is trained, and an unused `aligned_rows`."""
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


def rules(config: ExperimentConfig) -> Iterator[Rule]:
    """Rules between keys, in the order in which they are checked."""
    yield from code_rules(config)
    yield from task_rules(config)
    yield from remedy_rules(config)
    yield from sharding_rules(config)
    yield from step_rules(config)


def code_rules(config: ExperimentConfig) -> Iterator[Rule]:
    """Code outside of packages."""
    expected = "a path or a plug-in; code: runs code, which requires allow_code=true"
    for key in PLUGIN_KEYS:
        code = (config.value(key) or "").startswith(CODE)
        yield code and not config.allow_code, key, expected


def task_rules(config: ExperimentConfig) -> Iterator[Rule]:
    """What each task takes."""
    task, data = f"task={config.task}", config.data
    text, image_tokenizer, align = (config.task == name for name in ("text", "image_tokenizer", "align"))
    yield text != (data.source == "text"), "data.source", f"{'' if text else 'not '}text with {task}"
    yield (text or image_tokenizer) and config.init != "random", "init", f"random, with which {task} starts"
    yield config.loss_rows != "all" and config.task != "unconditional", "loss_rows", f"all with {task}"
    yield data.control not in (None, *CONTROLS), "data.control", f"null or one of {', '.join(CONTROLS)}"
    yield data.control is not None and not text, "data.control", f"null with {task}"
    ratio = data.text_ratio is not None
    yield ratio and config.task != "text_to_image", "data.text_ratio", f"null with {task}"
    joined = f"random or all with data.text_ratio={data.text_ratio}, which is of the mean length of all captions"
    yield ratio and data.captions == "first", "data.captions", joined
    yield config.fid.interval is not None and config.task != "text_to_image", "fid.interval", f"null with {task}"
    guided = config.task == "unconditional" and config.samples.guidance != 1
    yield guided, "samples.guidance", f"1 with {task}, whose images have no caption to be guided by"
    for key, plain, word in (
        ("trainer.packing", False, "false"),
        ("trainer.fp8", False, "false"),
        ("trainer.autotune", False, "false"),
        ("loss.backend", "fused", "fused"),
        ("optim.name", "adamw", "adamw"),
    ):
        no_language_model = f"{word}, {task} trains no language model"
        yield (align or image_tokenizer) and config.value(key) != plain, key, no_language_model
    kept = config.task in KEEPS_LANGUAGE
    yield requests_forgetting(config) and not kept, "forgetting.interval", f"null, {task} keeps no language model"
    if image_tokenizer:
        yield from image_tokenizer_rules(config)
    if align:
        yield from alignment_rules(config)
    aligned_twice = config.init == "aligned" and config.new_rows not in ("random", "aligned")
    yield aligned_twice, "new_rows", "random or aligned with init=aligned, whose image rows are aligned"


def image_tokenizer_rules(config: ExperimentConfig) -> Iterator[Rule]:
    """What the training of an image tokenizer takes."""
    task, data, settings = f"task={config.task}", config.data, config.image_tokenizer
    yield not data.has_images, "data.source", f"a source of images with {task}"
    yield config.tune != "all", "tune", f"all with {task}"
    yield bool(config.freeze), "freeze", f"an empty list with {task}"
    cell = settings.model.cell
    yield settings.size % cell != 0, "image_tokenizer.size", f"a multiple of {cell}, the side of an id"
    if settings.caption_weight > 0:
        whole = f"1, image_tokenizer.caption_weight={settings.caption_weight:g} compares the whole batch"
        yield config.trainer.accumulate_grad_batches != 1, "trainer.accumulate_grad_batches", whole
        yield data.captions == "all", "data.captions", f"first or random with {task}, which takes each image once"
        yield below_a_batch(config, "captions are compared")


def alignment_rules(config: ExperimentConfig) -> Iterator[Rule]:
    """What an alignment takes."""
    task = f"task={config.task}"
    rows_alone = f"{task} trains the image rows alone, from random ones"
    yield config.tune != "all", "tune", f"all, {rows_alone}"
    yield bool(config.freeze), "freeze", f"an empty list, {rows_alone}"
    yield config.new_rows != "random", "new_rows", f"random, {rows_alone}"
    yield config.init == "aligned", "init", f"another than aligned, {rows_alone}"
    whole = f"1, {task} takes its negatives from the whole batch"
    yield config.trainer.accumulate_grad_batches != 1, "trainer.accumulate_grad_batches", whole
    yield below_a_batch(config, f"{task} validates")


def below_a_batch(config: ExperimentConfig, what: str) -> Rule:
    """The rule of a contrastive loss, of which `what` is done on whole batches."""
    size, batch = config.data.val_size, config.data.batch_size
    whole = f"on whole batches of data.batch_size={batch}, since the loss depends on their size"
    return size is not None and size < batch, "data.val_size", f"null or at least a batch: {what} {whole}"


def requests_forgetting(config: ExperimentConfig) -> bool:
    """Whether forgetting is requested: a scale's default on shipped text is left out where a run cannot measure."""
    return config.forgetting.interval is not None and config.forgetting.text != NOVELS


def remedy_rules(config: ExperimentConfig) -> Iterator[Rule]:
    """Remedies: what they require, and which exclude each other."""
    task, data, optim = f"task={config.task}", config.data, config.optim
    for key, used in (
        ("loss.text_weight", config.loss.text_weight != 1),
        ("loss.image_weight", config.loss.image_weight != 1),
        ("loss.replay_weight", config.loss.replay_weight != 1),
        ("distil.weight", config.distil.weight > 0),
        ("data.replay_ratio", data.replay_ratio > 0),
        ("lora.rank", config.lora.rank > 0),
        ("modality_experts", config.modality_experts),
        ("optim.gradient_projection", optim.gradient_projection),
    ):
        off = "1" if key.startswith("loss") else "false" if isinstance(config.value(key), bool) else "0"
        yield used and config.task != "text_to_image", key, f"{off} with {task}, it is for task=text_to_image"
    no_language = config.init not in ("pretrained", "aligned")
    no_images = config.task not in ("text_to_image", "unconditional")
    anchors = f"0 with init={config.init} and {task}: it requires an image model with pre-trained weights"
    yield optim.l2_sp > 0 and (no_images or config.init == "random"), "optim.l2_sp", anchors
    frozen = f"all with lora.rank={config.lora.rank}, which freezes all pre-trained weights"
    yield config.lora.rank > 0 and config.tune != "all", "tune", frozen
    no_replay = f"1 with data.replay_ratio={data.replay_ratio:g}"
    yield config.loss.replay_weight != 1 and not data.replay_ratio, "loss.replay_weight", no_replay
    dropped = data.caption_dropout > 0 and config.task != "text_to_image"
    yield dropped, "data.caption_dropout", f"0 with {task}"
    distil = f"0, init={config.init} has no language to distil from"
    yield config.distil.weight > 0 and no_language, "distil.weight", distil
    kept = f"0 with lora.rank={config.lora.rank}, which leaves all pre-trained weights at their initial values"
    yield optim.l2_sp > 0 and config.lora.rank > 0, "optim.l2_sp", kept
    experts = config.modality_experts
    one_half = "false with modality_experts=true, of which a batch may use one half alone"
    yield experts and config.trainer.fp8, "trainer.fp8", one_half
    image_half = "false with modality_experts=true; with freeze=[text_expert] adapters are on the image half alone"
    yield experts and config.lora.image_only, "lora.image_only", image_half
    replayed = "more than 0 with optim.gradient_projection=true, whose second loss is that of replayed text"
    yield optim.gradient_projection and not data.replay_ratio, "data.replay_ratio", replayed


def sharding_rules(config: ExperimentConfig) -> Iterator[Rule]:
    """What sharded weights exclude."""
    task, strategy = f"task={config.task}", config.trainer.strategy
    if strategy not in SHARDED:
        return
    small = config.task in ("align", "image_tokenizer")
    yield small, "trainer.strategy", f"ddp, {task} is small and not sharded"
    sharded = f"trainer.strategy={strategy}"
    yield config.optim.name == "muon", "optim.name", f"adamw with {sharded}, muon needs whole matrices"
    for key in (
        *("forgetting.interval", "fid.interval"),
        *("optim.l2_sp", "optim.gradient_projection", "distil.weight", "lora.rank"),
    ):
        off = "null" if key.endswith("interval") else "false" if key.endswith("projection") else "0"
        requested = requests_forgetting(config) if key == "forgetting.interval" else bool(config.value(key))
        yield requested, key, f"{off} with {sharded}, {key} needs the whole model in every process; or use ddp"


def step_rules(config: ExperimentConfig) -> Iterator[Rule]:
    """Numbers of steps, and batches that are cut over processes."""
    data, optim, trainer = config.data, config.optim, config.trainer
    steps = f"less than trainer.max_steps={trainer.max_steps}"
    yield optim.warmup_steps >= trainer.max_steps, "optim.warmup_steps", steps
    outside = any(not 1 <= step <= trainer.max_steps for step in trainer.keep_steps)
    yield outside, "trainer.keep_steps", f"steps from 1 to trainer.max_steps={trainer.max_steps}"
    share = trainer.processes * trainer.accumulate_grad_batches
    factors = "trainer.devices x trainer.num_nodes x trainer.accumulate_grad_batches"
    yield data.batch_size % share != 0, "data.batch_size", f"a multiple of {share} ({factors})"
    no_pair = optim.gradient_projection and math.ceil(data.replay_ratio * config.micro_batch) >= config.micro_batch
    no_pairs = f"false with micro-batches of {config.micro_batch}, which may hold no caption-image pair"
    yield no_pair, "optim.gradient_projection", no_pairs
