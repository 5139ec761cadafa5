"""Which keys of an experiment name files, may change when a run is resumed, and change what is computed."""

from typing import Any

# Keys that may select a plug-in.
PLUGIN_KEYS = ("backbone.path", "text_tokenizer.path", "image_tokenizer.path", "data.source")
# Keys of files and folders: `~` is the home folder, and a relative path starts where the run was started.
PATH_KEYS = (
    "aligned_rows",
    "backbone.path",
    "backbone.config",
    "text_tokenizer.path",
    "image_tokenizer.path",
    "data.path",
    "data.val_path",
    "data.second_val_path",
    "data.cache_dir",
    "data.replay_path",
    "fid.coco",
    "fid.weights",
    "forgetting.text",
    "forgetting.second_text",
    "forgetting.tasks",
    "run.dir",
)

# Keys that change no curve, in three groups; `samples.` stands for all keys of the section.
# 1. Where a run works, what it prints, and limits at which it stops. These may change when it is resumed.
RESUMABLE = (
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.accelerator",
    "trainer.threads",
    "trainer.rank_timeout",
    "trainer.phase_timeout",
    "trainer.checkpoint_interval",
    "trainer.keep_steps",
    "data.workers",
    "data.remote_cache_gib",
    "log.logger",
    "data.max_reject_share",
    "data.max_recurring_share",
    "data.max_truncated_share",
)
# 2. Where files lie, and what they must be.
PLACES = ("run.", "data.cache_dir", "image_tokenizer.expect", "allow_code")
# 3. What else a run measures, and at what cost it computes the same. Runs that differ here report other things.
REPORTED = (
    "samples.",
    "fid.",
    "forgetting.",
    "trainer.packing",
    "trainer.activation_checkpointing",
    "data.pad_to_multiple_of",
)

# What a key must be whose values are compared.
COMPARED = "a key that changes what a run computes or reports (runs that differ in others alone count as one)"

# Keys that decide the model, the optimizer's groups, the order of the data or an average: they cannot change within a
# run.
FIXED = (
    "name",
    "task",
    "scale",
    "seed",
    "init",
    "tune",
    "freeze",
    "modality_experts",
    "image_tokenizer.warmup_fraction",
    "image_tokenizer.words",
    "image_tokenizer.caption_weight",
    "image_tokenizer.model.",
    "new_rows",
    "loss_rows",
    "backbone.",
    "lora.",
    "optim.name",
    "optim.decay",
    "data.source",
    "data.batch_size",
    "data.seed",
    "trainer.accumulate_grad_batches",
    "log.ema",
)
# Keys that may change within a run, but not from or to 0, where its checkpoint has other parts.
SWITCHES = ("data.replay_ratio", "optim.l2_sp")


def cannot_change(key: str, before: Any, now: Any) -> bool:
    """Whether a dotted key cannot change from one value to another within a run."""
    return is_fixed(key) or (key in SWITCHES and bool(before) != bool(now))


def is_fixed(key: str) -> bool:
    """Whether a dotted key cannot change within a run."""
    return _among(key, FIXED) and key not in PATH_KEYS


def may_move(key: str) -> bool:
    """Whether a dotted key may change on resume: where a run works and where its files lie, whose content is hashed."""
    return _among(key, (*RESUMABLE, *PLACES, *PATH_KEYS))


def is_neutral(key: str) -> bool:
    """Whether a dotted key changes no curve."""
    return _among(key, (*RESUMABLE, *PLACES, *REPORTED))


def is_reported(key: str) -> bool:
    """Whether a key changes no curve, but what a run reports beside its curves."""
    return _among(key, REPORTED)


def is_compared(key: str) -> bool:
    """Whether runs that differ in a key alone are different runs; else either stands for the other."""
    return is_reported(key) or not is_neutral(key)


def _among(key: str, group: tuple[str, ...]) -> bool:
    return any(key == one or (one.endswith(".") and key.startswith(one)) for one in group)
