"""A run on remote shards: the losses of one on the folder that they were prepared in, also after a resume."""

from pathlib import Path

import pytest

from t2i_lm.data.shards.format import read_index
from t2i_lm.evaluation.parts import failed
from t2i_lm.storage.run_folder import read_run
from t2i_lm.train import main
from tests.runs import PRETRAINED, QUICK, curve, train

pytestmark = pytest.mark.slow


def test_a_run_on_remote_shards_has_the_losses_of_one_on_the_prepared_folder(
    tiny: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    common = [*tiny, *QUICK, "data.shuffle_parts=4", f"data.cache_dir={cache}"]
    prepared = train(PRETRAINED, tmp_path / "prepared", *common, "data.part_size=10")
    (folder,) = cache.glob("scenes-*")
    assert len((read_index(folder) or {})["splits"]["train"]["parts"]) > 4
    remote = ["data.source=shards", f"data.path=file://{folder}", "data.train_size=null", "data.val_size=null"]
    ours = train(PRETRAINED, tmp_path / "remote", *common, *remote)
    assert curve(ours) == curve(prepared)
    for key in ("stream_hash", "data_hash"):
        assert ours.environment[key] == prepared.environment[key]
    assert list(cache.glob("remote-*/files/*"))
    assert ours.report is not None
    assert not failed(ours.report), "token shards have no images, which is no failure"
    # A run that stopped after its last checkpoint validates on, with the order that it began with.
    (ours.folder / "report.json").unlink()
    assert main([PRETRAINED, "--resume", str(ours.folder)]) == 0
    assert curve(read_run(ours.folder)) == curve(prepared)
