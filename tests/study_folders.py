"""Finished runs of a study without training: real configs, losses from a formula."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import save_experiment
from t2i_lm.data.scenes.version import SCENES, SCENES_FORMAT
from t2i_lm.storage.run_folder import CONFIG, ENVIRONMENT, METRICS, REPORT
from t2i_lm.training.resume import NUMERICS
from t2i_lm.training.study import StudyRun
from tests.plots.synthetic_runs import forgetting_entry

Loss = Callable[[ExperimentConfig], float]


def finish(runs: list[StudyRun], loss: Loss, sd: float = 0.01, first: int = 0, **environment: Any) -> list[Path]:
    """Writes the folder of every run, whose held-out losses are `loss` with noise of its arm, setting and seed.

    The folders are named by numbers from `first` on.
    """
    return [_write(run.job.config, loss, sd, number, environment) for number, run in enumerate(runs, first)]


def _write(config: ExperimentConfig, loss: Loss, sd: float, number: int, environment: dict[str, Any]) -> Path:
    folder = Path(config.run.dir) / config.name / f"20260301-{100000 + number}-{config.scale}"
    folder.mkdir(parents=True)
    save_experiment(config, folder / CONFIG)
    known = {
        "git": "a" * 40,
        "stream_hash": "b" * 64,
        "precision": "32-true",
        "data_hash": "0" * 16,
        SCENES: SCENES_FORMAT,
    }
    (folder / ENVIRONMENT).write_text(json.dumps({**known, "numerics": NUMERICS, **environment}))
    noise = random.Random(f"{config.name} {config.optim.lr} {config.trainer.max_steps} {config.seed}").gauss(0, sd)
    final = loss(config) + noise
    steps = config.trainer.max_steps
    lines = []
    for step in (0, steps // 2, steps):
        nll = final + 3 * (1 - step / steps)
        tokens = step * config.data.batch_size * config.data.length
        entry = {"nll": nll, "ppl": 2.0, "nll_sum": nll * 100, "count": 100}
        head = {"step": step, "samples": 1, "tokens_nominal": tokens, "tokens_real": tokens, "lr": 0.0, "time": 0.0}
        val = dict.fromkeys(("text", "image", "boundary", "all"), entry)
        lines.append({**head, "val/iid": val, "val/compositional": val})
        if step:
            train = {modality: {**entry, "nll_ema": nll, "ppl_ema": 2.0} for modality in val}
            scalars = {"scalars": {"logit_scale": 20.0}} if config.task == "align" else {}
            lines.append({**head, "train": train, "interval": steps, "ema": 0.95, **scalars})
        if config.forgetting.interval is not None:
            lines.append({**head, "forgetting": forgetting_entry((5 + noise) * step / steps)})
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = {"experiment": config.name, "steps": steps, "wall_s": steps / 10, "seed": config.seed}
    (folder / REPORT).write_text(json.dumps(report))
    return folder
