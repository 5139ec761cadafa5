"""Search for a pair of comparable runs, and the error with the command that makes the missing one."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from t2i_lm.compare import main as compare
from t2i_lm.comparison import comparability
from t2i_lm.figures import main
from t2i_lm.plots.groups import Group
from t2i_lm.plots.pairing import find_group, find_pair
from t2i_lm.storage.run_folder import Run
from tests.plots.synthetic_runs import write_run


def chosen(root: Path, **named: Path) -> tuple[str, str]:
    """Dates and times of the two run folders."""
    pair = find_pair(root, **named)
    return pair.pretrained.folder.name[:15], pair.scratch.folder.name[:15]


def test_the_newest_matching_pair_is_chosen(runs: Path) -> None:
    write_run(runs, "t2i_scratch", "20260302-100000", config={"seed": 1})
    assert chosen(runs) == ("20260301-100000", "20260301-110000")
    write_run(runs, "t2i_pretrained", "20260228-100000", config={"seed": 1})
    assert chosen(runs) == ("20260228-100000", "20260302-100000")
    write_run(runs, "t2i_pretrained", "20260303-100000")
    assert chosen(runs) == ("20260303-100000", "20260301-110000")
    write_run(runs, "t2i_scratch", "20260301-120000")
    assert chosen(runs) == ("20260303-100000", "20260301-120000")


@pytest.mark.parametrize(
    ("config", "data_hash", "named"),
    [
        ({"seed": 3}, "0123456789abcdef", "seed: 0 and 3"),
        ({"scale": "flickr8k"}, "0123456789abcdef", "scale: demo and flickr8k"),
        ({"trainer.max_steps": 200}, "0123456789abcdef", "trainer.max_steps: 300 and 200"),
        ({"log.interval": 10}, "0123456789abcdef", "log.interval: 5 and 10"),
        ({"log.ema": 0.9}, "0123456789abcdef", "log.ema: 0.95 and 0.9"),
        ({}, "fedcba9876543210", "data hash: 0123456789abcdef and fedcba9876543210"),
        ({}, None, "data hash: 0123456789abcdef and None"),
    ],
)
def test_runs_that_do_not_pair_are_listed_with_their_differences(
    config: dict[str, Any], data_hash: str | None, named: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    write_run(root, "t2i_pretrained", "20260301-100000")
    write_run(root, "t2i_scratch", "20260301-110000", config=config, data_hash=data_hash)
    with pytest.raises(ValueError, match=r"^no run from pre-trained and run from random") as caught:
        find_pair(root)
    message = str(caught.value)
    assert "t2i_pretrained/20260301-100000-demo  data hash=0123456789abcdef" in message
    differing = message.partition("differ in\n")[2].partition("to make")[0]
    assert [line.strip() for line in differing.splitlines()] == [named]
    assert "python -m t2i_lm.train experiments/t2i_scratch.yaml --scale demo" in message


def test_speed_and_measurements_are_no_difference(runs: Path) -> None:
    quick = {
        "data.pad_to_multiple_of": 32,
        "trainer.packing": True,
        "trainer.threads": 4,
        "trainer.activation_checkpointing": True,
    }
    quick |= {"fid.interval": 100, "fid.prompts": 64, "samples.prompts": 0, "forgetting.interval": 100}
    write_run(runs, "t2i_scratch", "20260302-100000", config=quick)
    assert chosen(runs) == ("20260301-100000", "20260302-100000")
    assert not find_pair(runs).uncontrolled()


def test_a_newer_pair_is_chosen_only_if_no_pair_is_controlled(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained", "20260301-100000")
    write_run(tmp_path, "t2i_scratch", "20260303-100000", config={"trainer.fp8": True})
    assert find_pair(tmp_path).uncontrolled() == {"trainer.fp8": (False, True)}
    write_run(tmp_path, "t2i_scratch", "20260302-100000")
    assert chosen(tmp_path) == ("20260301-100000", "20260302-100000")


def test_the_config_of_each_run_is_compared_once_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, arm in product(range(4), ("t2i_pretrained", "t2i_scratch")):
        write_run(tmp_path, arm, f"20260301-10000{number}", config={"seed": number}, steps=5)
    read: list[Run] = []
    values = comparability.config_values

    def counted(run: Run) -> dict[str, Any]:
        read.append(run)
        return values(run)

    monkeypatch.setattr(comparability, "config_values", counted)
    assert chosen(tmp_path) == ("20260301-100003", "20260301-100003")
    assert len(read) == 8 + 2  # the chosen pair once more, in all keys
    group = Group({"pretrained": "t2i_pretrained", "scratch": "t2i_scratch"}, "make study")
    assert {run.config["seed"] for run in find_group(tmp_path, group).values()} == {3}
    assert len(read) == 8 + 2 + 8


def test_two_unknown_data_hashes_do_not_match(tmp_path: Path) -> None:
    for name in ("t2i_pretrained", "t2i_scratch"):
        write_run(tmp_path, name, data_hash=None)
    with pytest.raises(ValueError, match="data hash: None and None"):
        find_pair(tmp_path)


def test_the_suggested_command_sets_the_keys_that_differ(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_pretrained", config={"seed": 4, "optim.lr": 0.001, "data.path": "a b"})
    write_run(tmp_path, "t2i_scratch", config={"trainer.threads": 4})
    with pytest.raises(ValueError, match="to make the partner of the first") as caught:
        find_pair(tmp_path)
    last = str(caught.value).splitlines()[-1].strip()
    assert last == (
        "python -m t2i_lm.train experiments/t2i_scratch.yaml --scale demo seed=4 'data.path=a b' optim.lr=0.001"
    )


def test_one_arm_alone_gets_the_command_for_the_other(tmp_path: Path) -> None:
    write_run(tmp_path, "t2i_scratch", config={"seed": 2})
    with pytest.raises(ValueError, match="to make the partner of t2i_scratch/") as caught:
        find_pair(tmp_path)
    command_line = str(caught.value).splitlines()[-1]
    assert "experiments/t2i_pretrained.yaml --scale demo seed=2" in command_line
    assert "trainer.max_steps=300 log.interval=5 log.ema=0.95" in command_line


def test_without_runs_the_error_has_both_commands_and_only_figure_2_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # as in a fresh clone
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no run from pre-trained")
    assert "runs found: none" in error
    assert "make exp-pretrained SCALE=demo\n  make exp-scratch SCALE=demo" in error
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {"figure2"}


def test_a_folder_of_runs_that_is_named_and_absent_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent"
    for command in (main, compare):
        assert command(["--runs", str(absent), "--out", str(tmp_path / "out")]) == 2
        assert capsys.readouterr().err == f"error: --runs {absent}: no such folder\n"
    assert not (tmp_path / "out").exists()


def test_runs_in_folders_of_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("t2i_pretrained", "t2i_scratch"):
        write_run(tmp_path / "study" / "optim.lr=1e-3", name)
    for figure in ("4", "inits", "remedies"):
        assert main(["--runs", str(tmp_path), "--out", str(tmp_path / "out"), "--figure", figure]) == 2
        error = capsys.readouterr().err
        assert f"such runs lie in 1 folders below it, for example --runs {tmp_path}/study/optim.lr=1e-3" in error
        assert "among ;" not in error


def test_a_damaged_or_empty_run_is_skipped_and_named_in_the_error(runs: Path) -> None:
    broken = write_run(runs, "t2i_scratch", "20260401-100000")
    (broken / "config.yaml").write_text("a: [")
    write_run(runs, "t2i_scratch", "20260402-100000", steps=0, finished=False)
    torn = write_run(runs, "t2i_scratch", "20260403-100000")
    (torn / "report.json").write_text('{"val": ')
    assert chosen(runs) == ("20260301-100000", "20260301-110000")
    lonely = write_run(runs, "t2i_pretrained", "20260404-100000", config={"seed": 9})
    with pytest.raises(ValueError, match="differ in") as caught:
        find_pair(runs, pretrained=lonely)
    assert "t2i_scratch/20260401-100000-demo  unreadable: " in str(caught.value)
    assert "t2i_scratch/20260402-100000-demo  no training step logged yet" in str(caught.value)
    assert "t2i_scratch/20260403-100000-demo  unreadable: " in str(caught.value)


def test_named_runs_are_used_and_the_other_arm_is_found(runs: Path) -> None:
    older = write_run(runs, "t2i_pretrained", "20260101-100000")
    assert chosen(runs, pretrained=older) == ("20260101-100000", "20260301-110000")
    elsewhere = write_run(runs.parent / "kept", "t2i_scratch", "20250101-000000")
    assert chosen(runs, pretrained=older, scratch=elsewhere) == (
        "20260101-100000",
        "20250101-000000",
    )


def test_a_named_run_of_the_wrong_arm_is_refused(runs: Path) -> None:
    scratch = next((runs / "t2i_scratch").iterdir())
    message = "init='random', expected 'pretrained'"
    with pytest.raises(ValueError, match=f"--pretrained .*{message}"):
        find_pair(runs, pretrained=scratch)
    with pytest.raises(ValueError, match=r"--scratch .*absent: unreadable: .* is not a run folder"):
        find_pair(runs, scratch=runs / "absent")


def test_a_named_run_without_captions_is_no_arm_of_a_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("uncond_pretrained", "uncond_scratch")
    one, two = (write_run(tmp_path, name, config={"task": "unconditional"}) for name in names)
    assert main(["--figure", "4", "--pretrained", str(one), "--scratch", str(two), "--out", str(tmp_path)]) == 2
    assert "--pretrained" in (said := capsys.readouterr().err)
    assert "its config has task='unconditional', expected 'text_to_image'" in said
