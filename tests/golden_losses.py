"""The first 20 losses of every shipped experiment at a tiny scale, in float32 on one thread of a CPU.

`python -m tests.golden_losses` writes them to golden_losses.json again, after a change that is meant to change them.
"""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from t2i_lm.storage.run_folder import Run
from tests.evaluation.tiny_tasks import TEXT
from tests.runs import EXPERIMENTS, QUICK, train

FILE = Path(__file__).with_name("golden_losses.json")
# Models of fixed bits, so that losses depend on no initialization by torch and no training of a tokenizer.
MODELS = FILE.with_name("data_files") / "old_run"
STEPS = 20
NAMES = sorted(
    path.relative_to(EXPERIMENTS).with_suffix("").as_posix()
    for folder in (EXPERIMENTS, EXPERIMENTS / "remedies")
    for path in folder.glob("*.yaml")
    if path.stem not in ("base", "study")
)
COMMON = (
    *QUICK,
    f"trainer.max_steps={STEPS}",
    f"trainer.val_check_interval={STEPS}",
    f"trainer.checkpoint_interval={STEPS}",
    "trainer.threads=1",
    "trainer.precision=32-true",
    "data.train_size=60",
    "data.val_size=8",
    "data.batch_size=8",
    "optim.warmup_steps=5",
    "log.interval=1",
    "log.logger=none",
    "forgetting.interval=null",
)
TOKENIZERS = (
    f"backbone.path={MODELS}/lm",
    f"text_tokenizer.path={MODELS}/text.model",
    f"image_tokenizer.path={MODELS}/vq",
    "image_tokenizer.size=64",
)


def overrides(name: str, folder: Path) -> list[str]:
    """Overrides that shrink an experiment; `folder` holds the text of those that read one, and all runs."""
    changes = [*COMMON, f"data.cache_dir={folder}/cache"]
    if name.startswith("image_tokenizer"):
        sizes = ("block_out_channels=[16,16]", "codes=16")
        return [*changes, *TOKENIZERS[:2], *(f"image_tokenizer.model.{size}" for size in sizes)]
    if name == "text_lm":
        model = [f"backbone.config={MODELS}/lm/config.json", f"text_tokenizer.path={MODELS}/text.model"]
        model += ["data.length=32", "data.max_recurring_share=1"]
        return [*changes, *model, *(f"data.{key}={folder}/text.txt" for key in ("path", "val_path"))]
    if name == "t2i_aligned":
        changes.append(f"aligned_rows={next((folder / 'align').glob('align/*'))}")
    if "replay" in name or "projection" in name:
        changes.append(f"data.replay_path={folder}/text.txt")
    return [*changes, *TOKENIZERS]


def losses(run: Run) -> list[float]:
    """One per step, to six digits."""
    found = []
    for record in run.records("train"):
        values = record["train"]
        loss = values["loss"] if "loss" in values else values.get("all", values.get("text"))["nll"]
        found.append(float(f"{loss:.6g}"))
    return found


def train_all(folder: Path) -> dict[str, list[float]]:
    (folder / "text.txt").write_text("\f".join("\n\n".join(TEXT[start : start + 20]) for start in (0, 20, 40)))
    names = [name for name in NAMES if find_spec("peft") or not name.startswith("remedies/lora")]
    return {
        name: losses(train(f"{EXPERIMENTS}/{name}.yaml", folder / name, *overrides(name, folder))) for name in names
    }


def write(losses: dict[str, list[float]], file: Path) -> None:
    """One line per experiment."""
    head = {"command": "python -m tests.golden_losses", "torch": torch.__version__.split("+")[0]}
    lines = [f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in losses.items()]
    head_lines = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
    file.write_text(f'{{\n{head_lines} "losses": {{\n' + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write(train_all(Path(folder)), FILE)
