"""A trained model from its run folder, without its data: what sampling and evaluation start from."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from callbacks import find_resumable
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.config.sections import DistilConfig
from t2i_lm.experiment.build import ImageModel, build_model
from t2i_lm.runtime.devices import global_rank, local_rank, uses_gpu
from t2i_lm.storage.run_folder import CHECKPOINTS, CONFIG, read_run


def newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run; a newer one that is damaged is named on stderr.

    Raises:
        ValueError: if there is none.
    """
    damaged: list[str] = []
    checkpoint = find_resumable(run / CHECKPOINTS, lambda _, text: damaged.append(text))
    if global_rank() == 0:
        for text in damaged:
            print(f"note: {text}", file=sys.stderr)
    if checkpoint is None:
        raise ValueError(f"{run} has no whole checkpoint in {CHECKPOINTS}/")
    if damaged and global_rank() == 0:
        print(f"note: {checkpoint} is used", file=sys.stderr)
    return checkpoint


def load_trained(run: Path, checkpoint: Path | None = None) -> ImageModel:
    """The model of a run with the weights of a checkpoint, for evaluation.

    Args:
        run: the run folder.
        checkpoint: one of its checkpoints, known to be whole; its newest whole one where this is None.

    Raises:
        ValueError: if the run trains no image model, has no whole checkpoint, or its tokenizers have changed.
    """
    config = image_config(run)
    checkpoint = checkpoint or newest_checkpoint(run)
    # Every weight is replaced, so none is read; the architecture still comes from the backbone's own config.
    model = build_model(_without_training_terms(replace(config, init="random", new_rows="random", aligned_rows=None)))
    _require_same_tokenizers(model, run)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    try:
        model.module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{checkpoint} does not fit the run's config.yaml: {error}") from error
    return _for_evaluation(model, config)


def load_initial(run: Path) -> ImageModel:
    """The model of a run as it was before its first step, for evaluation: built again from the run's config and seed.

    Raises:
        ValueError: if the run trains no image model, what it started from is gone, or its tokenizers have changed.
    """
    config = image_config(run)
    model = build_model(_without_training_terms(config))
    _require_same_tokenizers(model, run)
    return _for_evaluation(model, config)


def _for_evaluation(model: ImageModel, config: ExperimentConfig) -> ImageModel:
    """For evaluation as the run's own config says, on the GPU that its image tokenizer is on."""
    model.config = config
    model.module.eval()
    if uses_gpu(config.trainer.accelerator):
        model.module.to(torch.device("cuda", local_rank()))
    return model


def image_config(run: Path) -> ExperimentConfig:
    """A run's config.

    Raises:
        ValueError: if it cannot be read, or the run trains no image model.
    """
    config = load_experiment(run / CONFIG)
    if config.task not in ("text_to_image", "unconditional"):
        raise ValueError(f"{run} is a run of task={config.task}; expected text_to_image or unconditional")
    return config


def _without_training_terms(config: ExperimentConfig) -> ExperimentConfig:
    """Without what only training computes or compares with."""
    optim, loss = replace(config.optim, l2_sp=0.0), replace(config.loss, backend="fused")
    return replace(config, distil=DistilConfig(), optim=optim, loss=loss)


def _require_same_tokenizers(model: ImageModel, run: Path) -> None:
    """Ids mean something only to the tokenizers that the run was trained with."""
    used = (read_run(run).environment.get("tokenizers") or {}).items()
    here = {"text": model.text.sha256, "image": model.image.sha256}
    for name, sha256 in used:
        if here.get(name, sha256) != sha256:
            raise ValueError(
                f"{name}_tokenizer.path holds another file (sha256 {here[name][:12]}) than when "
                f"{run} was trained ({sha256[:12]})"
            )
