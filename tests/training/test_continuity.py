"""A run continues with the files that it started from, or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import open_text
from t2i_lm.storage.run_folder import CONFIG, ENVIRONMENT, OWNER, REPORT, Run
from t2i_lm.storage.sealed import sealed
from t2i_lm.train import main
from t2i_lm.training.continuity import require_same_files
from t2i_lm.training.resume import HASHES
from t2i_lm.training.resumption import find_resumption
from tests.runs import PRETRAINED, without_newest
from tests.storage.test_owner import entry, holding


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def change(folder: Path, key: str, value: Any) -> None:
    """Changes an entry of env.json, by dotted key; None removes it."""
    file = folder / ENVIRONMENT
    recorded = json.loads(file.read_text())
    *path, name = key.split("/")
    place = recorded
    for part in path:
        place = place[part]
    assert name in place
    place.pop(name)
    if value is not None:
        place[name] = value
    file.write_text(json.dumps(sealed(recorded)))


@pytest.mark.parametrize(
    "key",
    ["data_hash", "tokenizers/text", "tokenizers/image", "backbone/model.safetensors", "configs/backbone", "precision"],
    ids=str,
)
def test_a_difference_is_refused_by_name_and_nothing_is_written(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    folder = without_newest(pretrained, tmp_path)
    value = "other" if key == "precision" else ("0" if key == "data_hash" else "0123") * 16
    change(folder, key, value)
    before = contents(folder)
    assert main([PRETRAINED, "--resume", str(folder)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    now = pretrained.environment
    for part in key.split("/"):
        now = now[part]
    name = key.replace("/", ".")
    assert f"--resume {folder}: {name} is {value[:16]} in env.json, now {str(now)[:16]}. Restore" in error
    assert contents(folder) == before


def test_the_precision_that_a_stopped_run_advises_is_accepted_and_recorded(pretrained: Run, tmp_path: Path) -> None:
    folder = without_newest(pretrained, tmp_path)
    other = "bf16-mixed" if pretrained.environment["precision"] == "32-true" else "32-true"
    change_of_key = [f"trainer.precision={other}", "--allow-mismatch", "trainer.precision"]
    assert main([PRETRAINED, "--resume", str(folder), *change_of_key]) == 0
    environment = json.loads((folder / ENVIRONMENT).read_text())
    assert environment["precision"] == other
    assert {"trainer.precision", "precision"} == {entry["key"] for entry in environment["changes"]}


def test_tokenizers_and_backbone_are_compared_before_any_preparation(pretrained: Run, tmp_path: Path) -> None:
    folder = without_newest(pretrained, tmp_path)
    config = load_experiment(folder / CONFIG)
    require_same_files(config, find_resumption(folder))
    shutil.copyfile(open_text(config).path, tmp_path / "text.model")
    with (tmp_path / "text.model").open("ab") as file:
        file.write(b"\x1a\x00")  # an empty field
    changed = load_experiment(folder / CONFIG, None, [f"text_tokenizer.path={tmp_path}/text.model"])
    with pytest.raises(ValueError, match=r"--resume .*: tokenizers\.text is \w{16} in env\.json, now \w{16}\."):
        require_same_files(changed, find_resumption(folder))


def test_what_an_older_run_did_not_record_and_texts_that_have_changed_are_noted(
    probed: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "t2i_pretrained" / probed.folder.name
    shutil.copytree(probed.folder, folder)
    (folder / REPORT).unlink()
    for key in ("backbone", "data_hash"):
        assert key in HASHES
        change(folder, key, None)
    change(folder, "contents/forgetting.text", "content of another text")
    assert main([PRETRAINED, "--resume", str(folder)]) == 0
    notes = capsys.readouterr().err
    assert f"note: {folder / ENVIRONMENT} does not record data_hash, backbone: not compared" in notes
    text = probed.config["forgetting"]["text"]
    assert f"note: forgetting.text={text} has changed since {folder} was started" in notes


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_run_that_is_being_written_is_refused_and_one_that_was_is_not(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_newest(pretrained, tmp_path)
    config = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(config.replace(str(pretrained.folder.parents[1]), str(tmp_path)))
    with holding(folder / OWNER) as process:
        before = contents(folder)
        for arguments in ([str(folder)], ["latest", f"run.dir={tmp_path}"]):
            assert main([PRETRAINED, "--resume", *arguments]) == 2
            assert f"{folder} is being written by process {process.pid} on" in capsys.readouterr().err
        assert contents(folder) == before
    (folder / "held").unlink()
    entry(folder / OWNER, born="1")  # of a process that was killed
    assert main([PRETRAINED, "--resume", str(folder), "samples.prompts=2"]) == 0
    assert not (folder / OWNER).exists()
