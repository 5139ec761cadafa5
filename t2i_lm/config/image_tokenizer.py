"""The section `image_tokenizer` of an experiment. Standard library only."""

from dataclasses import dataclass, field

from t2i_lm.config.sections import Section

ENCODE_PRECISIONS = ("float32", "bfloat16")
MOVQGAN_SIZES = ("67M", "102M", "270M")
GROUPS = 16  # of the group norms, which divide the channels
CODE_WORDS = ("captions", "frequent")  # of data/code_words.py


@dataclass(frozen=True)
class VQModelConfig(Section, prefix="image_tokenizer.model"):
    """Architecture of a trained image tokenizer: a small diffusers `VQModel` behind a pixel-unshuffle."""

    patch: int = 4
    """Side of the pixel-unshuffle, in pixels."""
    block_out_channels: list[int] = field(default_factory=lambda: [64, 128])
    """Channels of each level, multiples of 16; each level after the first halves the resolution."""
    layers_per_block: int = 1
    """ResNet layers per level."""
    latent_channels: int = 8
    """Channels before quantization."""
    codes: int = 512
    """Code vectors, which are the image ids."""
    code_dim: int = 8
    """Width of a code vector."""

    def __post_init__(self) -> None:
        self.at_least(1, "patch", "layers_per_block", "latent_channels", "codes", "code_dim")
        channels = self.block_out_channels
        allowed = f"at least one positive multiple of {GROUPS}"
        self.check(
            bool(channels) and all(one > 0 and one % GROUPS == 0 for one in channels), "block_out_channels", allowed
        )

    @property
    def cell(self) -> int:
        """Side of the pixels of one id."""
        return int(self.patch * 2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True)
class ImageTokenizerConfig(Section, prefix="image_tokenizer"):
    """The image tokenizer: the weights at `path`, or how task=image_tokenizer trains one."""

    path: str | None = None
    """A folder that `t2i_lm.export` wrote, of a diffusers `VQModel`, of a pipeline with one, or of a VQ model of
    `transformers`; a MoVQGAN `.ckpt`; also `asset:image_tokenizer`, `hf://ORG/NAME/FILE` or a plug-in."""
    expect: str | None = None
    """Size of a MoVQGAN checkpoint: 67M, 102M or 270M; another is refused. null: any."""
    size: int = 64
    """Side of the images in pixels after the center crop, a multiple of 8."""
    pixel_range: list[float] | None = None
    """Values of black and of white of a diffusers or `transformers` folder, such as [0, 1]; null: as its files say."""
    precision: str = "float32"
    """Precision of encoding: float32, or bfloat16, which is refused where it changes more than 0.1 % of the ids."""
    model: VQModelConfig = field(default_factory=VQModelConfig)
    """Architecture of a trained tokenizer."""
    warmup_fraction: float = 0.4
    """Share of the steps without quantization, in [0, 1)."""
    restart_every: int = 100
    """Steps between replacements of unused codes."""
    commitment: float = 0.25
    """Weight of the commitment loss."""
    edge_weight: float = 0.0
    """Weight of the loss on image gradients."""
    caption_weight: float = 0.0
    """Weight of a contrastive loss between the codes of an image and the words of its caption, as rows of the language
    model at backbone.path; the temperature is that of `align`. 0: none."""
    words: str | None = None
    """Ties every code to a word, by the rows of the language model at backbone.path: those of the training captions
    first (`captions`), or the most frequent English ones that are one piece (`frequent`). null: free codes."""

    def __post_init__(self) -> None:
        self.one_of("expect", MOVQGAN_SIZES)
        self.one_of("precision", ENCODE_PRECISIONS)
        self.check(self.size >= 8 and self.size % 8 == 0, "size", "a multiple of 8")
        ends = [0, 1] if self.pixel_range is None else self.pixel_range
        self.check(len(ends) == 2 and ends[0] < ends[1], "pixel_range", "null or two increasing values")
        self.below_one("warmup_fraction")
        self.at_least(1, "restart_every")
        self.at_least(0, "caption_weight", "commitment", "edge_weight")
        self.one_of("words", CODE_WORDS)

    @property
    def reads_rows(self) -> bool:
        """Whether training one reads the text rows of a language model."""
        return self.caption_weight > 0 or self.words is not None
