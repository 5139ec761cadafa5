"""Arms of `python -m t2i_lm.remedies`: the pre-trained arm without a remedy, then with each remedy."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.runtime.command_line import NO_SAMPLES

BASE = Path("experiments/t2i_pretrained.yaml")
FOLDER = "remedies"  # beside the base experiment


def remedy_experiments(
    text: str,
    replay: str | None,
    tasks: str | None,
    only: Sequence[str],
    scale: str,
    overrides: Sequence[str],
    base: Path = BASE,
) -> list[ExperimentConfig]:
    """The arms to train, the one without a remedy first. Prints which are left out, and why.

    Args:
        text: held-out text that forgetting is measured on.
        replay: text to replay; without it, remedies that replay are left out.
        tasks: folder of questions that forgetting is measured on.
        only: names of remedies; empty for all.
        scale: name of the overlay.
        overrides: `key=value` strings for every arm.
        base: the experiment without a remedy.

    Raises:
        ValueError: on an unknown remedy, key or value, or a missing path.
    """
    files = {file.stem: file for file in sorted((base.parent / FOLDER).glob("*.yaml"))}
    if not files:
        raise ValueError(f"no remedies in {base.parent / FOLDER}")
    if replay is not None and Path(replay).resolve() == Path(text).resolve():
        raise ValueError(f"--replay {replay}: this is the text that --text measures on; give another one")
    for name in only:
        if name not in files:
            raise ValueError(f"--only {name}: expected one of {', '.join(files)}")
    shared = [*NO_SAMPLES, f"forgetting.text={text}"]
    shared += [f"forgetting.tasks={tasks}"] if tasks else []
    shared += [f"data.replay_path={replay}"] if replay else []
    # By default, forgetting is measured whenever the run is validated.
    default = load_experiment(base, scale, [*shared, *overrides])
    shared.append(f"forgetting.interval={default.forgetting.interval or default.trainer.val_check_interval}")
    configs = []
    for file in [base, *(file for name, file in files.items() if not only or name in only)]:
        config = load_experiment(file, scale, [*shared, *overrides])
        if lacking := _lacking(config):
            print(f"left out: {config.name} requires {lacking}")
            continue
        config.require_paths()
        configs.append(config)
    return configs


def _lacking(config: ExperimentConfig) -> str | None:
    """An option or package that an arm requires and that is not there."""
    if config.data.replayed and config.data.replay_path is None:
        return "text to replay: --replay PATH"
    if config.lora.rank and find_spec("peft") is None:
        return "peft: pip install 't2i_lm[lora]'"
    return None
