"""The paper's claims by section of the page, with where it makes them and what makes the runs here.

Paper: "Pre-trained Language Models Do Not Help Auto-regressive Text-to-Image Generation" (arXiv 2311.16201).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from t2i_lm.comparison.relearning import relearning_command
from t2i_lm.plots import tradeoff
from t2i_lm.plots.groups import FIGURE5, FIGURE6, FORGETTING, INITS
from t2i_lm.plots.pairing import ARMS

SWEPT = (
    '"learning rates from 0.00005 to 0.0003 and batch size from 0.5M to 2M tokens" had "no significant influences on '
    'the conclusions".'
)
PAIR = {arm: experiment for arm, (experiment, _, _) in ARMS.items()}


@dataclass(frozen=True)
class Claim:
    """A section of the page before anything is measured.

    Attributes:
        title: heading.
        paper: what the paper says, quoted or in brief.
        source: its section, figure or table; empty for what is beyond the paper.
        command: what makes the runs.
        figures: names in the catalogue.
        experiments: by arm, the experiments that it compares.
    """

    title: str
    paper: str
    source: str
    command: str
    figures: tuple[str, ...] = ()
    experiments: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The figure or table of the paper that the section repeats; empty for the others."""
        first = self.source.partition(",")[0]
        return first if first.startswith(("Figure", "Table")) else ""


CLAIMS: dict[str, Claim] = {
    "figure1": Claim(
        "Images as tokens",
        "An image tokenizer turns 256 x 256 pixels into 1,024 tokens of 16,384, from which images are well "
        "reconstructed; the language model's embedding and output layers are expanded by their rows.",
        "Figure 1, Section 2.1",
        "make exp-pretrained",
        ("1",),
    ),
    "figure2": Claim(
        "Published systems",
        '"Auto-regressive and diffusion based models achieve similar performances on text-to-image generation. '
        "However, while all the diffusion models leverage pre-trained language models, all the auto-regressive models "
        'do not."',
        "Figure 2",
        "python -m t2i_lm.evaluate --checkpoint RUN --coco COCO --weights FILE",
        ("2",),
    ),
    "figure3": Claim(
        "Pre-trained or random weights: all tokens",
        '"across the entire 100B token training regimen, the loss of the pre-trained model aligns closely with that of '
        'the randomly initialized one."',
        "Figure 3, Section 2.2",
        "make exp-pretrained exp-scratch",
        ("3",),
        PAIR,
    ),
    "figure4": Claim(
        "Pre-trained or random weights: text and image tokens",
        '"any benefit the pre-trained model offers in text loss diminishes soon during training. In contrast, for '
        'image tokens, there is no difference between the pre-trained and randomly initialized models."',
        "Figure 4, Section 2.2",
        "make exp-pretrained exp-scratch",
        ("4",),
        PAIR,
    ),
    "samples": Claim(
        "Samples",
        'Pre-trained language models achieve "the same loss and image generation quality as the model that is entirely '
        'randomly initialized"; no measure of quality is given.',
        "Section 1",
        "make exp-pretrained exp-scratch",
    ),
    "table1": Claim(
        "Completions before and after",
        "After 5B tokens \"both the model's world knowledge and its in-context learning ability are entirely "
        'diminished".',
        "Table 1, Section 2.2",
        FORGETTING.command,
        experiments=FORGETTING.experiments,
    ),
    "figure5": Claim(
        "Images without captions",
        '"pre-trained language models yield the same loss as models initialized randomly"; of the partly tuned ones '
        '"none of these configurations achieves as low a loss as a fully tunable model".',
        "Figure 5, Section 3.1",
        FIGURE5.command,
        ("5",),
        FIGURE5.experiments,
    ),
    "figure6": Claim(
        "Contrastive alignment of image and text rows",
        '"the contrastive loss plateaus quickly, indicating a difficulty in aligning text and image tokens directly at '
        'a bag-of-words level."',
        "Figure 6, Section 3.2",
        FIGURE6.command,
        ("6",),
        FIGURE6.experiments,
    ),
    "inits": Claim(
        "Initializations between pre-trained and random",
        'With the aligned image rows as initialization, "there is no discernible improvement". Shuffled entries, and '
        "the body or the rows alone, are not in the paper.",
        "Section 3.2",
        INITS.command,
        ("inits",),
        INITS.experiments,
    ),
    "positions": Claim(
        "Positions",
        "Not discussed. The released open_lm-1b rotates over heads instead of positions (head_rotary), so the paper's "
        "pre-trained model has no position information beyond the causal mask.",
        "Section 2.1 names the model",
        "python -m t2i_lm.study experiments/study.yaml",
    ),
    "forgetting": Claim(
        "Forgetting",
        "\"We observe a severe deterioration of the model's language capability, such as knowledge and in-context "
        'learning, after a small amount of training."',
        "Section 2.2, Table 1",
        FORGETTING.command,
        ("forgetting",),
        FORGETTING.experiments,
    ),
    "relearning": Claim(
        "Relearning",
        "Not measured: whether the language is gone or only suppressed.",
        "",
        " ".join(["python", "-m", *relearning_command("RUN")]),
        ("relearning",),
        PAIR,
    ),
    "remedies": Claim(
        "Remedies",
        '"exploring methods to avoid catastrophic forgetting could be a promising future research direction."',
        "Limitations",
        tradeoff.COMMAND,
        ("remedies",),
    ),
    "budget": Claim(
        "Gap against training tokens",
        '"across the entire 100B token training regimen, the loss of the pre-trained model aligns closely with that of '
        'the randomly initialized one"; shorter budgets are points on those curves, not runs of their own.',
        "Section 2.2",
        "python -m t2i_lm.study experiments/plans/data_budget.yaml",
        ("gap",),
        PAIR,
    ),
    "probes": Claim(
        "Probes: tokens, rows, states, attention and gradients",
        'The explanation given for Figures 4 to 6, from losses and the nearest text tokens of image rows: "image '
        'tokens possess significantly different semantics compared to text tokens", and "the text tokens in the '
        'image-text datasets are too simple compared to normal language model pre-training data".',
        "Abstract",
        "python -m t2i_lm.probe runs/t2i_pretrained runs/t2i_scratch",
    ),
    "sweeps": Claim(
        "Learning rate and other sweeps",
        SWEPT,
        "Section 2.1",
        "python -m t2i_lm.sweep optim.lr=1.5e-3,3e-3,6e-3",
    ),
    "grids": Claim(
        "Sweeps over two keys",
        f"{SWEPT} Whether both were changed at once is not stated.",
        "Section 2.1",
        "python -m t2i_lm.sweep optim.lr=1.5e-3,3e-3,6e-3 data.batch_size=8,16,32",
    ),
}


def claim_of_figure(name: str) -> str | None:
    """The section of a catalogue figure; None for one that no section names."""
    return next((key for key, claim in CLAIMS.items() if name in claim.figures), None)
