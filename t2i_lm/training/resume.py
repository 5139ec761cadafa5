"""Rules of `--resume`: which run continues, and what its config may change."""

from collections.abc import Sequence
from pathlib import Path

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.key_groups import RESUMABLE, cannot_change, is_fixed
from t2i_lm.config.load import flatten, load_experiment, located
from t2i_lm.config.values import key_types
from t2i_lm.runtime.command_line import SCALE
from t2i_lm.storage.run_folder import CONFIG, ENVIRONMENT, REPORT, find_run, require_checkpoints, run_folders

# Version of what the code computes, raised when the same config and seed train to other numbers.
NUMERICS = 1
LATEST = "latest"
# Entries of env.json that are compared on resume: hashes, versions and the precision.
HASHES = ("data_hash", "replay_hash", "tokenizers", "backbone", "configs", "plugins", "numerics", "precision")


def chosen_experiment(experiment: Path, scale: str, overrides: Sequence[str]) -> ExperimentConfig:
    """The config of an experiment at a scale, or of a run's config.yaml, which has its own.

    Raises:
        ValueError: if another scale is chosen for that.
    """
    if not (experiment.name == CONFIG and (experiment.parent / ENVIRONMENT).is_file()):
        return load_experiment(experiment, scale, overrides)
    config = load_experiment(experiment, None, overrides)
    if scale not in (config.scale, SCALE):
        raise ValueError(f"--scale {scale}: {experiment} has the scale of its run, {config.scale}; leave --scale out")
    return config


def resumed_run(
    resume: str, experiment: Path, scale: str, overrides: Sequence[str], allowed: Sequence[str] = ()
) -> tuple[ExperimentConfig, Path]:
    """The config and folder of the run to continue.

    Args:
        resume: a run folder, or `latest` for the newest unfinished run of the experiment at this scale.
        experiment: experiment YAML, or the config.yaml of a run, whose name must be the run's.
        scale: name of the overlay; used for `latest` only.
        overrides: `key=value` strings, of RESUMABLE or `allowed` keys where the value differs from the run's.
        allowed: keys whose value may change, and names of hashes that may differ.

    Raises:
        ValueError: if there is no such run, it is finished or of another experiment, or an override changes any other
            key.
    """
    _require_known(allowed)
    if resume == LATEST:
        folder = _latest_unfinished(chosen_experiment(experiment, scale, overrides))
    else:
        folder = find_run(Path(resume))
        require_checkpoints(folder)
        require_unfinished(folder)
    saved = flatten(load_experiment(folder / CONFIG))
    name = chosen_experiment(experiment, scale, []).name
    if saved["name"] != name and not saved["name"].startswith(f"{name}_"):  # ablate appends what it freezes
        raise ValueError(f"--resume {folder}: this is a run of {saved['name']}, not of {experiment} ({name})")
    config = load_experiment(folder / CONFIG, None, overrides)
    for key, value in flatten(config).items():
        is_final = cannot_change(key, saved[key], value)
        if value != saved[key] and key not in RESUMABLE and (key not in allowed or is_final):
            other = "" if is_final else f", or accept the change by --allow-mismatch {key}"
            raise ValueError(
                f"--resume {folder}: {key}={value!r} differs from the run's config.yaml ({saved[key]!r}); "
                f"start a new run instead{other}"
            )
    return located(config, folder), folder


def _require_known(allowed: Sequence[str]) -> None:
    for key in allowed:
        if key.split(".")[0] not in HASHES and (key not in key_types() or is_fixed(key)):
            hashes = ", ".join(HASHES)
            raise ValueError(
                f"--allow-mismatch {key}: expected a key that may change within a run, such as optim.lr, or the "
                f"name of a hash in env.json ({hashes}; of several, with a dot, such as tokenizers.text)"
            )


def require_unfinished(folder: Path) -> None:
    """Checks that a run has no report yet.

    Raises:
        ValueError: if it has one.
    """
    if (folder / REPORT).is_file():
        raise ValueError(f"--resume {folder}: this run is finished, and a finished run is never overwritten")


def _latest_unfinished(config: ExperimentConfig) -> Path:
    runs = run_folders(Path(config.run.dir), config.name, config.scale)
    unfinished = [folder for folder in runs if not (folder / REPORT).is_file()]
    if not unfinished:
        raise ValueError(
            f"--resume latest: no unfinished run of {config.name} at scale {config.scale} in {config.run.dir}; "
            "leave --resume out to start one"
        )
    return unfinished[-1]
