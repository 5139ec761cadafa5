"""Loggers of other packages."""

from pathlib import Path

import pytest

from t2i_lm.config.load import load_experiment
from t2i_lm.runtime.loggers import build_logger
from tests.runs import PRETRAINED


def test_wandb_tells_runs_apart_and_continues_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_experiment(PRETRAINED, "demo", ["log.logger=wandb"])
    ids = []
    for root in ("here", "here", "there"):
        folder = tmp_path / root / config.name / "20260101-000000-demo"
        folder.mkdir(parents=True, exist_ok=True)
        logger = build_logger(config, folder)
        assert isinstance(logger, WandbLogger)
        assert (logger.name, logger._wandb_init["name"]) == ("t2i_lm", f"{config.name}/{folder.name}")
        assert logger._wandb_init["config"]["optim.lr"] == config.optim.lr
        ids.append(logger.version)
    assert ids[0] == ids[1] != ids[2]
