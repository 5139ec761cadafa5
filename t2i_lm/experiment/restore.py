"""The model of a run folder, trained or initial, without its data, for sampling and evaluation."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from callbacks import CorruptCheckpointError, find_resumable, read_checkpoint
from callbacks.checkpoints import checkpoint_path, checkpoints, step_of
from callbacks.files.checkpoint_io import verify
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_run, require_located
from t2i_lm.config.sections import DistilConfig
from t2i_lm.experiment.build import Environment, Experiment, ImageModel, build, build_model, trained_image_tokenizer
from t2i_lm.models.factory import architecture_hashes, weights_hashes
from t2i_lm.runtime.devices import uses_gpu
from t2i_lm.runtime.launch import global_rank, local_rank
from t2i_lm.storage.reading import reading, reason
from t2i_lm.storage.run_folder import CHECKPOINTS, read_environment, read_run, require_checkpoints


def newest_checkpoint(run: Path) -> Path:
    """The newest intact checkpoint of a run; damaged newer ones are named on stderr.

    Raises:
        ValueError: if there is none.
    """
    require_checkpoints(run)
    notes: list[str] = []
    checkpoint = find_resumable(run / CHECKPOINTS, lambda _, text: notes.append(text))
    if notes and checkpoint is not None:
        notes.append(f"{checkpoint} is used")
    if global_rank() == 0:
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
    if checkpoint is None:
        raise ValueError(f"{run} has no intact checkpoint in {CHECKPOINTS}/")
    return checkpoint


def checkpoint_of_step(run: Path, step: int) -> Path:
    """The checkpoint of a run after an optimizer step.

    Raises:
        ValueError: if there is none, naming the steps that have one, or if it is damaged.
    """
    require_checkpoints(run)
    path = checkpoint_path(run / CHECKPOINTS, step)
    if not path.is_file():
        steps = ", ".join(f"{step_of(other):,}" for other in checkpoints(run / CHECKPOINTS)) or "none"
        raise ValueError(
            f"--step {step}: {run} has no checkpoint of this step; of steps: {steps} (a run keeps the newest two, and "
            "those of trainer.keep_steps)"
        )
    try:
        verify(path)
    except (CorruptCheckpointError, OSError) as error:
        raise ValueError(f"--step {step}: {error}") from error
    return path


def load_trained(run: Path, checkpoint: Path | None = None) -> ImageModel:
    """The model of a run with the weights of a checkpoint, in evaluation mode.

    Args:
        run: the run folder.
        checkpoint: one of its checkpoints, known to be intact; None for the newest intact one.

    Raises:
        ValueError: if the run trains no image model, has no intact checkpoint, or its tokenizers have changed.
    """
    config = image_config(run)
    checkpoint = checkpoint or newest_checkpoint(run)
    model = build_model(without_weights(config))
    _require_same_tokenizers(model, run)
    _load_weights(model.module, checkpoint)
    return _for_evaluation(model, config)


def load_trained_experiment(run: Path, checkpoint: Path) -> Experiment:
    """The experiment of a run of any task with its data and the weights of a checkpoint, in evaluation mode.

    Raises:
        ValueError: if its files are gone, or its data is not that of training.
    """
    config, environment = load_run(run), read_environment(run)
    if config.task == "image_tokenizer":
        return _trained_image_tokenizer(config, environment, checkpoint)
    config = _found(config, run)
    experiment = build(without_weights(config), environment)
    trained_on = environment.get("data_hash")
    if trained_on is not None and experiment.index.get("data_hash") != trained_on:
        raise ValueError(
            f"data.path={config.data.path}: the data has changed since {run} was trained: data hash "
            f"{experiment.index.get('data_hash')}, then {trained_on}"
        )
    _load_weights(experiment.module, checkpoint)
    experiment.config = config
    experiment.module.eval()
    return experiment


def _trained_image_tokenizer(config: ExperimentConfig, environment: Environment, checkpoint: Path) -> Experiment:
    config.require_paths()
    with _fitting(checkpoint):
        experiment = trained_image_tokenizer(config, environment, _state(checkpoint))
    experiment.module.eval()
    return experiment


def _load_weights(module: torch.nn.Module, checkpoint: Path) -> None:
    with _fitting(checkpoint):
        module.load_state_dict(_state(checkpoint))


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    with reading("checkpoint", checkpoint):
        state: dict[str, torch.Tensor] = read_checkpoint(checkpoint, only="state_dict")["state_dict"]
    return state


@contextmanager
def _fitting(checkpoint: Path) -> Iterator[None]:
    """Names a checkpoint whose tensors are not those of the model."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit the run's config.yaml: {reason(error)}") from error


def load_initial(run: Path) -> ImageModel:
    """The model of a run before its first step, rebuilt from its config and seed, in evaluation mode.

    Raises:
        ValueError: if the run trains no image model, or its initial weights or tokenizers are gone or have changed.
    """
    config = image_config(run)
    model = build_model(_without_training_terms(config))
    require_same_backbone(config, run)
    _require_same_tokenizers(model, run)
    return _for_evaluation(model, config)


def require_same_backbone(config: ExperimentConfig, run: Path) -> None:
    """Checks that the files of a run's weights before training are those that it was trained from.

    To be called after they are loaded, since the hash of a plug-in's weights is known from then on.

    Raises:
        ValueError: if they have changed.
    """
    recorded = read_environment(run).get("backbone")
    if recorded is not None and recorded != weights_hashes(config):
        raise ValueError(f"backbone.path={config.backbone.path}: its weights have changed since {run} was trained")


def _for_evaluation(model: ImageModel, config: ExperimentConfig) -> ImageModel:
    """The model in evaluation mode with the run's own config, on the GPU of its image tokenizer."""
    model.config = config
    model.module.eval()
    if uses_gpu(config.trainer.accelerator):
        model.module.to(torch.device("cuda", local_rank()))
    return model


def image_config(run: Path) -> ExperimentConfig:
    """The config of a run that trains an image model.

    Raises:
        ValueError: if it cannot be read, trains another model, or the folder holds collected results.
    """
    require_checkpoints(run)
    config = load_run(run)
    if config.task not in ("text_to_image", "unconditional"):
        raise ValueError(f"{run} is a run of task={config.task}; expected text_to_image or unconditional")
    return _found(config, run)


def _found(config: ExperimentConfig, run: Path) -> ExperimentConfig:
    """The config, if the files are there that its model needs."""
    backbone = () if config.backbone.config is not None else ("backbone.path",)
    require_located(config, run, (*backbone, "text_tokenizer.path", "image_tokenizer.path"))
    return config


def without_weights(config: ExperimentConfig) -> ExperimentConfig:
    """The config of a model whose every weight a checkpoint replaces: only the architecture is read.

    Terms of training go first: some require pre-trained weights.
    """
    return replace(_without_training_terms(config), init="random", new_rows="random", aligned_rows=None)


def _without_training_terms(config: ExperimentConfig) -> ExperimentConfig:
    """The config without what serves training alone.

    These are L2-SP, gradient projection, distillation, the loss backend, and compilation, which would be repeated for
    each of the many shapes of an evaluation.
    """
    optim, loss = replace(config.optim, l2_sp=0.0, gradient_projection=False), replace(config.loss, backend="fused")
    trainer = replace(config.trainer, compile=False, autotune=False)
    return replace(config, distil=DistilConfig(), optim=optim, loss=loss, trainer=trainer)


def _require_same_tokenizers(model: ImageModel, run: Path) -> None:
    """Checks the hashes of tokenizers, and of the JSON of architectures, against env.json.

    Ids are specific to the tokenizers of training; a checkpoint's weights fit several architectures.
    """
    environment = read_run(run).environment
    trained = environment.get("tokenizers") or {}
    for name, tokenizer in (("text", model.text), ("image", model.image)):
        sha256 = trained.get(name, tokenizer.sha256)
        if tokenizer.sha256 != sha256:
            raise ValueError(
                f"{name}_tokenizer.path holds another file (sha256 {tokenizer.sha256[:12]}) than when "
                f"{run} was trained ({sha256[:12]})"
            )
    found = architecture_hashes(model.config)
    for name, sha256 in (environment.get("configs") or {}).items():
        if found.get(name, sha256) != sha256:
            raise ValueError(
                f"{name}: its config.json is another (sha256 {found[name][:12]}) than when {run} was trained "
                f"({sha256[:12]})"
            )
