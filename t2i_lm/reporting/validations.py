"""Validations of a run on its primary split."""

from typing import Any

from t2i_lm.storage.run_folder import Run


def validations(run: Run, split: str | None = None) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl with the values of a validation split under `val`.

    Args:
        run: the run.
        split: its name; None for the primary one.
    """
    lines: list[dict[str, Any]] = run.validations(split) if hasattr(run, "validations") else run.records("val")
    return lines


def last_nll(run: Run, modality: str, split: str | None = None) -> float | None:
    """Loss of a modality (nats/token) at the last validation; None without one."""
    lines = validations(run, split)
    entry = lines[-1]["val"].get(modality, {}) if lines else {}
    return float(entry["nll"]) if "nll" in entry else None


def splits(run: Run) -> tuple[str, ...]:
    """Names of the validation splits; empty where there is one."""
    names: tuple[str, ...] = getattr(run, "validation_splits", ())
    return names
