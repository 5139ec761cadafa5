"""Every key of an experiment. Standard library only; values are checked in `__post_init__`.

`load.py` merges the YAML files into this dataclass and its sections (`sections.py`). A wrong value raises a
ValueError that names the key, the value and what is allowed.
"""

from dataclasses import dataclass, field

from t2i_lm.config.sections import (
    SHARDED,
    AlignConfig,
    BackboneConfig,
    DataConfig,
    DistilConfig,
    FidConfig,
    ForgettingConfig,
    ImageTokenizerConfig,
    LogConfig,
    LoraConfig,
    LossConfig,
    OptimConfig,
    RunConfig,
    SampleConfig,
    TextTokenizerConfig,
    TrainerConfig,
    one_of,
    require,
)

SCALES = ("demo", "flickr8k", "paper")  # files of experiments/scale/
TASKS = ("text_to_image", "unconditional", "align", "text", "image_tokenizer")
LOSS_ROWS = ("all", "image")
INITS = ("pretrained", "random", "shuffled", "body_only", "embeddings_only", "aligned")
NEW_ROWS = ("random", "mean", "aligned", "codebook")

# What may change when a run goes on: where it runs and what it prints, never what it computes.
RESUMABLE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.checkpoint_interval",
    "data.workers",
    "log.logger",
)


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
    new_rows: str = "random"  # what the image rows start from, the same in every arm
    aligned_rows: str | None = None  # file or run folder of an alignment, or `latest`; for init or new_rows aligned
    loss_rows: str = "all"  # of task=unconditional: softmax over the whole vocabulary, or the image rows alone
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
        one_of("task", self.task, TASKS)
        one_of("init", self.init, INITS)
        one_of("new_rows", self.new_rows, NEW_ROWS)
        one_of("loss_rows", self.loss_rows, LOSS_ROWS)
        if self.loss_rows != "all" and self.task != "unconditional":
            raise ValueError(f"loss_rows={self.loss_rows!r} is for task=unconditional, not task={self.task!r}")
        require(0 <= self.seed < 2**32, "seed", self.seed, "a value in [0, 2**32)")
        require(
            self.optim.warmup_steps < self.trainer.max_steps,
            "optim.warmup_steps",
            self.optim.warmup_steps,
            f"less than trainer.max_steps={self.trainer.max_steps}",
        )
        if self.task in ("text", "image_tokenizer") and self.init != "random":
            raise ValueError(f"init={self.init!r}: task={self.task} starts from random weights")
        if self.fid.interval is not None and self.task != "text_to_image":
            raise ValueError(f"fid.interval={self.fid.interval}: task={self.task} draws no captions; use null")
        if self.init == "aligned" and self.new_rows not in ("random", "aligned"):
            raise ValueError(f"new_rows={self.new_rows!r} contradicts init='aligned', whose image rows are aligned")
        if self.task == "align":
            self._check_align()
        if self.trainer.strategy in SHARDED:
            self._check_sharded()
        if self.task == "image_tokenizer" and (self.freeze or self.tune != "all"):
            raise ValueError("freeze and tune are for language models, not task=image_tokenizer")
        if self.task in ("align", "image_tokenizer"):
            self._check_no_language_model()
        self._check_remedies()
        if (self.task == "text") != (self.data.source == "text"):
            raise ValueError(f"data.source={self.data.source!r} does not fit task={self.task!r}")
        ranks = self.trainer.devices * self.trainer.num_nodes
        share = ranks * self.trainer.accumulate_grad_batches
        require(
            self.data.batch_size % share == 0,
            "data.batch_size",
            self.data.batch_size,
            f"a multiple of {share} (trainer.devices x trainer.num_nodes x trainer.accumulate_grad_batches)",
        )

    def _check_no_language_model(self) -> None:
        for key, value, plain, word in (
            ("trainer.packing", self.trainer.packing, False, "false"),
            ("trainer.fp8", self.trainer.fp8, False, "false"),
            ("loss.backend", self.loss.backend, "fused", "fused"),
            ("forgetting.interval", self.forgetting.interval, None, "null"),
        ):
            require(value == plain, key, value, f"{word}, task={self.task} trains no language model")

    def _check_remedies(self) -> None:
        used = {
            "loss": self.loss.weighted,
            "distil.weight": self.distil.weight > 0,
            "data.replay_ratio": self.data.replay_ratio > 0,
            "lora.rank": self.lora.rank > 0,
        }
        for key in (name for name, on in used.items() if on):
            if self.task != "text_to_image":
                raise ValueError(f"{key} is for task=text_to_image, not task={self.task!r}")
        if self.distil.weight and self.init not in ("pretrained", "aligned"):
            raise ValueError(f"distil.weight={self.distil.weight}: init={self.init!r} has no language to distil from")
        if self.optim.l2_sp and self.lora.rank:
            raise ValueError(
                f"optim.l2_sp={self.optim.l2_sp} contradicts lora.rank={self.lora.rank}, which leaves all pre-trained "
                "weights where they began: expected one of them to be 0"
            )

    def _check_align(self) -> None:
        if self.freeze or self.tune != "all" or self.new_rows != "random" or self.init == "aligned":
            raise ValueError("task=align learns the image rows alone, from a random draw: leave freeze, tune, new_rows")
        if self.trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "trainer.accumulate_grad_batches: task=align takes its negatives from the whole batch; use 1"
            )
        if self.data.val_size is not None and self.data.val_size < self.data.batch_size:
            raise ValueError(
                f"data.val_size={self.data.val_size}: task=align validates on whole batches of "
                f"data.batch_size={self.data.batch_size}, since the loss depends on their size"
            )

    def _check_sharded(self) -> None:
        strategy = self.trainer.strategy
        if self.task in ("align", "image_tokenizer"):
            raise ValueError(f"trainer.strategy={strategy!r}: task={self.task} is small and not sharded; use ddp")
        if self.optim.name == "muon":
            raise ValueError(f"trainer.strategy={strategy!r}: optim.name=muon needs whole matrices; use adamw")
        whole = {
            "forgetting.interval": self.forgetting.interval is not None,
            "fid.interval": self.fid.interval is not None,
            "optim.l2_sp": self.optim.l2_sp > 0,
            "distil.weight": self.distil.weight > 0,
            "lora.rank": self.lora.rank > 0,
        }
        for key in (name for name, on in whole.items() if on):
            raise ValueError(f"trainer.strategy={strategy!r}: {key} needs the whole model in every process; use ddp")

    @property
    def image_rows(self) -> str:
        """What the image rows start from: `new_rows`, which init=aligned implies."""
        return "aligned" if self.init == "aligned" else self.new_rows

    def require_paths(self) -> None:
        """Checks that every path is given without which the experiment cannot run; a dry run does without.

        Raises:
            ValueError: naming the first key.
        """
        needed = {"data.path": (self.data.path, f"a path for data.source={self.data.source}")}
        if self.data.source == "scenes":
            del needed["data.path"]
        if self.task in ("text_to_image", "unconditional", "align"):
            for name in ("text_tokenizer", "image_tokenizer"):
                needed[f"{name}.path"] = (getattr(self, name).path, f"a path for task={self.task}")
            if self.init != "random":
                needed["backbone.path"] = (self.backbone.path, f"a checkpoint for init={self.init}")
            if self.image_rows == "aligned":
                needed["aligned_rows"] = (self.aligned_rows, "the file or run folder of an alignment, or latest")
        if self.data.replay_ratio:
            needed["data.replay_path"] = (
                self.data.replay_path,
                f"text for data.replay_ratio={self.data.replay_ratio}: a .txt or .txt.gz file, or a folder of them",
            )
        for key, (path, expected) in needed.items():
            require(path is not None, key, path, expected)

    @property
    def micro_batch(self) -> int:
        """Samples of one rank in one forward pass."""
        trainer = self.trainer
        return self.data.batch_size // (trainer.devices * trainer.num_nodes * trainer.accumulate_grad_batches)
