"""Runs on a dataset that is streamed: both arms see one order; a run that loses its data goes on where it was."""

from pathlib import Path

import pytest

from t2i_lm.data.shards import remote
from t2i_lm.storage.run_folder import read_run, run_folders
from t2i_lm.train import main
from tests.data.shards.parquet_files import serve, write
from tests.runs import PRETRAINED, QUICK, SCRATCH, curve, resume_from_middle, train

pytestmark = pytest.mark.slow


@pytest.fixture
def streamed(tiny: list[str], tmp_path: Path) -> list[str]:
    """Overrides that stream, with parts in a cache of the test's own."""
    sizes = ("data.train_size=null", "data.val_size=null", "data.shuffle_parts=2", "data.length=110")
    return [*tiny, "data.source=hub_stream", *sizes, f"data.cache_dir={tmp_path}/cache"]


def test_both_arms_see_one_order_and_a_run_resumes_by_position_where_its_parts_are_gone(
    streamed: list[str], tmp_path: Path
) -> None:
    local = [*streamed, f"data.path={write(tmp_path / 'set')}"]
    whole = train(PRETRAINED, tmp_path / "whole", *local, "samples.preference_scenes=0")
    other = train(SCRATCH, tmp_path / "other", *local, *QUICK)
    for key in ("data_hash", "stream_hash"):
        assert whole.environment[key] == other.environment[key]
    figures = {file.name for file in whole.folder.rglob("*.png")}
    assert "originals.png" in figures  # the images of the prompts, read again

    def forget(_: Path) -> None:
        made = list((tmp_path / "cache").glob("hub_stream-live-*/made-cpu/*.arrow"))
        assert made
        for file in made:
            file.unlink()

    resumed = resume_from_middle(
        PRETRAINED, tmp_path / "resumed", whole, *local, "samples.preference_scenes=0", first=forget
    )
    assert curve(resumed) == curve(whole)


def test_a_run_that_loses_its_data_ends_with_the_files_name_and_is_resumed(
    streamed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "WAIT_S", 0.0)
    monkeypatch.setattr("t2i_lm.data.datamodules.AHEAD", 0)
    with serve(write(tmp_path / "set")) as server:
        remote_ = [*streamed, *QUICK, f"data.path={server.url}"]
        whole = train(PRETRAINED, tmp_path / "whole", *remote_)
        for file in (tmp_path / "cache").glob("hub_stream-live-*/made-cpu/*.arrow"):
            file.unlink()
        server.lost_after = 13  # requests of parts of files: some row groups are read, and no more
        assert main([PRETRAINED, *remote_, f"run.dir={tmp_path}/cut"]) == 2
        said = capsys.readouterr().err
        assert "error: " in said
        assert "parquet row group" in said
        assert "(4 tries); --resume continues the run" in said.replace("\n", " ")
        (folder,) = run_folders(tmp_path / "cut")
        assert 0 < len(read_run(folder).records("train")) < len(whole.records("train"))
        server.lost_after = None
        assert main([PRETRAINED, "--resume", str(folder), *remote_]) == 0
        assert curve(read_run(folder)) == curve(whole)
