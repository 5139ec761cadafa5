"""A cache as huggingface_hub lays it out, and no network."""

from pathlib import Path

import pytest

COMMIT = "0" * 40


def offline_snapshot(folder: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a folder the cache; returns that of the files of a repository's only commit, which is not made."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    held = folder / f"models--{repository.replace('/', '--')}"
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text(COMMIT)
    (held / "snapshots").mkdir()
    return held / "snapshots" / COMMIT
