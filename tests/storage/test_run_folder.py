"""Reading and creating run folders: finished, unfinished and damaged."""

import copy
import json
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from t2i_lm.comparison.arms import finished_runs
from t2i_lm.storage import run_folder
from t2i_lm.storage.run_folder import (
    CONFIG,
    METRICS,
    environment,
    find_run,
    folders_below,
    new_run_folder,
    read_run,
    require_no_links,
    run_folders,
)
from tests.plots.synthetic_runs import read_lines, write_run

SCALE_NAMES = ("demo", "demo-1", "demo_long", "my-demo")


def test_a_finished_run_is_read_completely(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "t2i_scratch", config={"seed": 7})
    run = read_run(folder)
    assert (run.name, run.folder) == ("t2i_scratch", folder)
    assert run.config == yaml.safe_load((folder / "config.yaml").read_text())
    assert run.config["seed"] == 7
    assert run.environment == json.loads((folder / "env.json").read_text())
    assert run.report == json.loads((folder / "report.json").read_text())
    assert run.records("train") == read_lines(folder, "train")
    assert [line["step"] for line in run.validations()] == [0, 100, 200, 300]


def test_validations_are_those_of_the_primary_split_or_of_the_named_one(tmp_path: Path) -> None:
    one = read_run(write_run(tmp_path, "t2i_scratch"))
    assert one.validation_splits == ()
    assert one.validations() == one.records("val")
    assert one.validations("iid") == []
    two = read_run(write_run(tmp_path, "t2i_pretrained", splits=("compositional", "iid")))
    assert two.validation_splits == ("iid", "compositional")
    assert two.records("val") == []
    for name, lines in (("iid", two.validations()), ("compositional", two.validations("compositional"))):
        assert [line["val"] for line in lines] == [line[f"val/{name}"] for line in two.records("val/iid")]
    assert two.validations("iid") == two.validations() != two.validations("compositional")


def test_an_unfinished_run_has_no_report(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "t2i_scratch", steps=40, finished=False))
    assert run.report is None
    assert run.metrics[-1]["step"] == 40


@pytest.mark.parametrize("end", [1, 40, -2])
def test_an_incomplete_last_line_is_skipped(tmp_path: Path, end: int) -> None:
    folder = write_run(tmp_path, "t2i_scratch", finished=False)
    whole = read_run(folder).metrics
    *lines, last = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join(lines) + last[:end])
    assert read_run(folder).metrics == whole[:-1]


@pytest.mark.parametrize(
    ("line", "message"),
    [("[1]", r"metrics\.jsonl line 1 is damaged: it holds no keys and values"), ('{"val": {}}', "a line has no step")],
)
def test_a_line_that_no_run_writes_is_damage(line: str, message: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path, "t2i_pretrained")
    (folder / METRICS).write_text(f"{line}\n")
    with pytest.raises(ValueError, match=message):
        read_run(folder)
    notes: list[str] = []
    assert finished_runs(tmp_path, "t2i_pretrained", notes) == []
    assert "metrics.jsonl" in notes[0]


def test_an_absent_value_is_named_with_its_file_and_copies_of_runs_keep_their_values(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, "t2i_pretrained"))
    assert run.config.get("nothing") is None
    assert pickle.loads(pickle.dumps(run)) == copy.deepcopy(run) == run
    for read, name in (
        (lambda: run.config["data"]["nothing"], "config.yaml has no data.nothing"),
        (lambda: run.environment["nothing"], "env.json has no nothing"),
        (lambda: run.report["nothing"], "report.json has no nothing"),
    ):
        with pytest.raises(ValueError, match=f"{run.folder}/{name}"):
            read()


def test_a_run_without_logs_reads_as_empty(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "t2i_scratch", finished=False)
    (folder / METRICS).unlink()
    (folder / "env.json").unlink()
    run = read_run(folder)
    assert (run.metrics, run.environment, run.records("train")) == ([], {}, [])


def test_a_folder_without_a_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is not a run folder: it has no config\.yaml"):
        read_run(tmp_path / "nothing")


def test_runs_are_listed_by_time_across_experiments(tmp_path: Path) -> None:
    second = write_run(tmp_path, "t2i_pretrained", "20260301-000000")
    third = write_run(tmp_path, "t2i_scratch", "20260301-000001")
    first = write_run(tmp_path, "t2i_scratch", "20251231-235959")
    (tmp_path / "t2i_scratch" / "notes").mkdir()
    assert run_folders(tmp_path) == [first, second, third]
    assert run_folders(tmp_path, "t2i_scratch") == [first, third]
    assert run_folders(tmp_path / "absent") == []


def test_runs_behind_links_are_found_once_and_cyclic_links_end(tmp_path: Path) -> None:
    root, disk = tmp_path / "runs", tmp_path / "disk"
    own = write_run(root / "study", "t2i_pretrained")
    moved = write_run(disk, "t2i_scratch", "20260301-000000")
    (root / "study" / "t2i_scratch").symlink_to(disk / "t2i_scratch")
    (root / "moved").symlink_to(disk)
    (root / "best").symlink_to(own)
    for link, target in ((root / "again", root), (disk / "up", tmp_path), (disk / "own", disk), (root / "gone", "x")):
        link.symlink_to(target)
    (own / "checkpoints").symlink_to(write_run(tmp_path / "other", "t2i_scratch").parent)  # on another disk
    linked = root / "moved" / "t2i_scratch" / moved.name
    assert folders_below(root) == [own, linked]
    assert folders_below(root, "t2i_scratch") == [linked]
    assert folders_below(own) == [own]
    assert folders_below(root / "study", "t2i_scratch") == [root / "study" / "t2i_scratch" / moved.name]
    assert folders_below(root / "absent") == []


def test_runs_started_in_one_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda _: "20260301-120000")
    folders = [new_run_folder(tmp_path, "t2i_scratch", "demo") for _ in range(3)]
    assert [folder.name for folder in folders] == [
        "20260301-120000-demo",
        "20260301-120000-demo-1",
        "20260301-120000-demo-2",
    ]
    assert all(folder.is_dir() for folder in folders)


def test_a_folder_that_cannot_be_created_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a folder should be")
    with pytest.raises(ValueError, match=r"run\.dir=.*runs: cannot create"):
        new_run_folder(tmp_path / "runs", "t2i_scratch", "demo")


def test_the_environment_is_json_with_extra_keys() -> None:
    read = json.loads(json.dumps(environment(data_hash="abc")))
    assert read["data_hash"] == "abc"
    assert read["python"].count(".") == 2
    assert read["versions"]["numpy"]
    assert {"git", "git_dirty", "started", "platform", "cpu_count"} <= read.keys()


def test_reading_runs_imports_no_torch() -> None:
    code = "import sys, t2i_lm.storage.run_folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("name", ["events.log", "report.json", "samples", "tb", "samples/step-00000001.png"])
def test_a_link_out_of_a_run_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs", "t2i_scratch")
    (folder / "checkpoints").symlink_to(tmp_path)  # on a larger disk
    (folder / "env.link").symlink_to("env.json")
    require_no_links(folder)
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{name} is a link to .*elsewhere, and a run writes nothing outside"):
        require_no_links(folder)


@pytest.mark.parametrize("name", ["[v2]", "a*", "x?"])
def test_runs_are_found_by_a_name_with_characters_of_patterns(name: str, tmp_path: Path) -> None:
    folders = {one: tmp_path / one / "20260301-100000-demo" for one in (name, "v", "ab", "xx")}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "config.yaml").touch()
    assert run_folders(tmp_path, name) == [folders[name]]


@pytest.mark.parametrize(
    "name", ["old", "latest", "20260101-000003-demo-old", "20260101-000003-demo copy", "2026-demo"]
)
def test_a_renamed_or_copied_run_is_not_the_newest_and_is_used_by_its_path(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = write_run(tmp_path / "runs", "t2i_scratch", "20260101-000002")
    aside = write_run(tmp_path / "runs", "t2i_scratch", "20260101-000003").rename(newest.with_name(name))
    assert run_folders(tmp_path / "runs") == [newest]
    assert find_run(tmp_path / "runs") == find_run(tmp_path / "runs" / "t2i_scratch") == newest
    left_out = f"note: {aside} is left out: its name is not DATE-TIME-SCALE; give its own path to use it\n"
    assert capsys.readouterr().err == left_out
    assert find_run(aside) == aside


def test_a_run_of_a_damaged_config_keeps_its_place_and_is_refused_where_it_is_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "t2i_scratch")
    for content in (b"a: [", b"\xff"):
        (folder / CONFIG).write_bytes(content)
        assert run_folders(tmp_path) == [folder]


def test_runs_of_a_scale_are_not_those_of_one_whose_name_begins_like_it(tmp_path: Path) -> None:
    folders = [tmp_path / "t2i_scratch" / f"20260101-00000{number}-{scale}" for number, scale in enumerate(SCALE_NAMES)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / CONFIG).touch()
    assert run_folders(tmp_path, "t2i_scratch", "demo") == folders[:2]
    assert run_folders(tmp_path, "t2i_scratch") == folders


def test_the_repository_is_recorded_only_where_it_tracks_this_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package installed in a .venv lies inside of the repository of somebody else's project."""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    installed = tmp_path / ".venv" / "run_folder.py"
    installed.parent.mkdir()
    installed.touch()
    (tmp_path / "own.py").touch()
    git("init", "-q")
    git("add", "own.py")
    git("commit", "-qm", "own")
    (tmp_path / "own.py").write_text("changed = True")
    monkeypatch.setattr(run_folder, "__file__", str(installed))
    found = environment()
    assert (found["git"], found["git_dirty"]) == (None, False)
    git("add", "-f", ".venv")
    found = environment()
    assert (found["git"], found["git_dirty"]) == (git("rev-parse", "HEAD").strip(), True)
