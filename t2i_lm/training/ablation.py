"""Experiments of `python -m t2i_lm.ablate`: one with parameters frozen, or all arms of Figure 5."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.models.freeze import ALL_GROUPS, TUNE_SETS

DEFAULT = "experiments/uncond_pretrained.yaml"


def ablated_experiments(
    words: Sequence[str],
    scale: str,
    freeze: Iterable[str] | None = None,
    tune: str | None = None,
    arms: Iterable[str] = (),
) -> list[ExperimentConfig]:
    """The experiment with other parameters frozen, or those beside it.

    Args:
        words: experiment YAML (DEFAULT if absent) and `key=value` strings, in any order.
        scale: name of the overlay.
        freeze: groups to freeze, exactly these.
        tune: else, set of the paper to tune; everything else is frozen.
        arms: else, names of experiments, returned as they are from the folder of the YAML, which must be one of them.

    Raises:
        ValueError: on an unknown group, set, key or value, several experiments, or an override of what `freeze` or
            `tune` decides.
    """
    overrides = [word for word in words if "=" in word]
    files = [word for word in words if "=" not in word] or [DEFAULT]
    if len(files) > 1:
        raise ValueError(f"one experiment at a time, got {' and '.join(files)}")
    path = Path(files[0])
    option = "--freeze" if freeze else None if tune is None else "--tune"
    decided = next((word for word in overrides if option and word.partition("=")[0] in ("freeze", "tune")), None)
    if decided is not None:
        raise ValueError(f"{decided}: {option} decides what is frozen; leave one of them out")
    if freeze:
        groups = list(dict.fromkeys(freeze))
        for group in groups:
            if group not in ALL_GROUPS:
                raise ValueError(f"--freeze {group}: expected one of {', '.join(ALL_GROUPS)}")
        changes, suffix = [f"freeze=[{','.join(groups)}]", "tune=all"], f"freeze_{'_'.join(groups)}"
    elif tune is not None:
        if tune not in TUNE_SETS:
            raise ValueError(f"--tune {tune}: expected one of {', '.join(TUNE_SETS)}")
        changes, suffix = [f"tune={tune}", "freeze=[]"], f"tune_{tune}"
    else:
        arms = [*arms]
        if path.stem not in arms:
            raise ValueError(f"--all {path}: expected one of {', '.join(arms)}, which are trained from its folder")
        return [load_experiment(path.with_name(f"{arm}.yaml"), scale, overrides) for arm in arms]
    name = load_experiment(path, scale, overrides).name
    return [load_experiment(path, scale, [*overrides, *changes, f"name={name}_{suffix}"])]
