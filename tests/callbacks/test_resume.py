"""A run that is killed, stopped or starved and then resumed equals an unbroken one, bit for bit."""

import json
import os
import random
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks import DurableCheckpointIO, EventLog, find_resumable
from callbacks.checkpoints import NOT_STARTED, checkpoints, step_of, was_not_started
from callbacks.files.checkpoint_io import digest_of
from tests.callbacks.toy_model import LENGTH, VALIDATION, Toy
from tests.callbacks.toy_run import CHECKPOINTS, EVENTS, METRICS, finish, free_port, lines, run_to_end, start

pytestmark = pytest.mark.slow

KILLED = -signal.SIGKILL
# Instants at which a run is killed; more of them with T2I_LM_KILLS=200.
SEEDS = range(int(os.environ.get("T2I_LM_KILLS", "10")))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that others are compared with; counts the file operations of its saves."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run_to_end(Toy(folder, harm={"count_operations": True})) == 0
    return folder


def litter(folder: Path) -> list[Path]:
    """Files of a run that nothing will read."""
    orphans = [path for path in folder.rglob("*.sha256") if not path.with_suffix("").is_file()]
    return [*folder.rglob("*.tmp"), *orphans]


def newest_step(folder: Path) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    found = find_resumable(folder / CHECKPOINTS)
    return step_of(found) if found else 0


def test_the_reference_validates_at_step_0_and_on_schedule_and_keeps_the_newest_checkpoints(unbroken: Path) -> None:
    records = lines(unbroken)
    assert [record["step"] for record in records if "val" in record] == [0, 6, 12, 18, 24]
    assert [record["step"] for record in records if "train" in record] == [4, 8, 12, 16, 20, 24]
    assert [record["step"] for record in records if "witness" in record] == list(range(1, 25))
    assert [step_of(path) for path in checkpoints(unbroken / CHECKPOINTS)] == [20, 24]
    assert litter(unbroken) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_run_resumes_like_an_unbroken_one(unbroken: Path, tmp_path: Path, seed: int) -> None:
    # Even seeds: inside a save in the background, at one of its writes, syncs and renames; of every other one, steps
    # pass between these. Odd seeds: at any time of the run.
    draw = random.Random(seed)
    operations = int((unbroken / "operations").read_text())
    harm: dict[str, Any]
    if seed % 2 == 0:
        harm = {"at_operation": draw.randint(1, operations), "slow_write": 0.001 * (seed % 4 == 0)}
    else:
        clock = [json.loads(line).get("time") for line in (unbroken / METRICS).read_text().splitlines()]
        times = [time for time in clock if time is not None]
        harm = {"kill_after": draw.uniform(0, times[-1] - times[0])}
    code = run_to_end(Toy(tmp_path, harm=harm))
    assert code == KILLED or (seed % 2 == 1 and code == 0)  # a timer can come too late, an operation cannot
    reached = max([record["step"] for record in lines_so_far(tmp_path)], default=0)
    # A save is complete before the next begins.
    assert reached - newest_step(tmp_path) <= 2 * 5, "a checkpoint at most two intervals old exists at any instant"
    if code != 0:
        assert run_to_end(Toy(tmp_path)) == 0
    assert lines(tmp_path) == lines(unbroken)
    assert litter(tmp_path) == []


def lines_so_far(folder: Path) -> list[dict[str, Any]]:
    """Lines of a run that may have been killed before its first."""
    return lines(folder) if (folder / METRICS).is_file() else []


def test_a_run_killed_in_every_save_of_its_life_still_ends_like_an_unbroken_one(unbroken: Path, tmp_path: Path) -> None:
    operations = int((unbroken / "operations").read_text()) // 5  # of one save
    for kill in range(1, 5):  # each process gets a little further
        assert run_to_end(Toy(tmp_path, harm={"at_operation": operations + 7 * kill})) == KILLED
    assert run_to_end(Toy(tmp_path)) == 0
    assert lines(tmp_path) == lines(unbroken)


# Where a signal arrives; `make test-faults` sends it at more steps.
PLACES = [("step", 13), ("validation", 12), ("validation", 0), ("work after validation", 12)]
MORE_PLACES = [("step", step) for step in (3, 9, 20)]
MORE_PLACES += [(where, step) for where in ("validation", "work after validation") for step in (6, 18)]


CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 138, signal.SIGINT: 130}
SIGNALLED = [(number, *place) for place in PLACES + MORE_PLACES for number in CODES]
if len(SEEDS) < 200:  # every signal at one place, and one signal at every place
    SIGNALLED = [(number, *PLACES[0]) for number in CODES] + [(signal.SIGTERM, *place) for place in PLACES[1:]]


@pytest.mark.parametrize(("number", "where", "step"), SIGNALLED)
def test_a_signalled_run_saves_exits_with_its_code_and_resumes_exactly(
    unbroken: Path, tmp_path: Path, number: signal.Signals, where: str, step: int
) -> None:
    harm = {"signal_in": where, "at_step": step, "signal": number}
    assert run_to_end(Toy(tmp_path, harm=harm)) == CODES[number]
    # A signal in a step lets the step end; one in a validation does not let that end.
    stopped_at = step + 1 if where == "step" else step
    assert newest_step(tmp_path) == stopped_at
    if where == "validation":
        assert step not in [record["step"] for record in lines_so_far(tmp_path) if "val" in record]
    assert run_to_end(Toy(tmp_path)) == 0
    assert lines(tmp_path) == lines(unbroken)


def test_a_validation_cut_short_twice_is_written_once(unbroken: Path, tmp_path: Path) -> None:
    harm = {"signal_in": "validation", "at_step": 12, "signal": signal.SIGTERM}
    for _ in range(2):
        assert run_to_end(Toy(tmp_path, harm=harm)) == 143
    # The third process validates, and is killed before it saves again.
    assert run_to_end(Toy(tmp_path, harm={"signal_in": "step", "at_step": 13, "signal": signal.SIGKILL})) == KILLED
    assert run_to_end(Toy(tmp_path)) == 0
    assert lines(tmp_path) == lines(unbroken)


SPLITS = ("val/iid", "val/compositional")


@pytest.fixture(scope="module")
def unbroken_splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run with two validation splits."""
    folder = tmp_path_factory.mktemp("splits")
    assert run_to_end(Toy(folder, validations=SPLITS)) == 0
    return folder


def test_every_validation_line_holds_both_splits_and_the_run_is_the_same(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_to_end(Toy(one, plain=True)) == run_to_end(Toy(two, plain=True, validations=SPLITS)) == 0
    for alone, both in zip(lines(one), lines(two), strict=True):
        assert {key: value for key, value in both.items() if key not in SPLITS} == {
            key: value for key, value in alone.items() if key != "val"
        }
        assert both.get(SPLITS[0]) == alone.get("val")
        if SPLITS[0] in both:
            first, second = (both[split]["all"] for split in SPLITS)
            assert first["count"] == second["count"] == VALIDATION * (LENGTH - 1)
            assert first["nll"] != second["nll"]


@pytest.mark.parametrize("loader", [0, 1], ids=SPLITS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["sigterm", "sigkill"])
@pytest.mark.parametrize("step", [0, 12])
def test_a_run_stopped_in_either_validation_split_resumes_exactly(
    unbroken_splits: Path, tmp_path: Path, loader: int, number: int, step: int
) -> None:
    harm = {"signal_in": "validation", "at_step": step, "signal": number, "loader": loader}
    assert run_to_end(Toy(tmp_path, validations=SPLITS, harm=harm)) in (KILLED, 143)
    assert step not in [line["step"] for line in lines_so_far(tmp_path) if SPLITS[0] in line]
    assert run_to_end(Toy(tmp_path, validations=SPLITS)) == 0
    assert lines(tmp_path) == lines(unbroken_splits)


@pytest.mark.parametrize("loader", [0, 1], ids=SPLITS)
def test_two_ranks_stopped_in_either_validation_split_resume_exactly(tmp_path: Path, loader: int) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert finish(*start_ranks(whole, validations=SPLITS)) == [0, 0]
    harm = {"signal_in": "validation", "at_step": 12, "signal": signal.SIGTERM, "ranks": [1], "loader": loader}
    assert finish(*start_ranks(stopped, validations=SPLITS, **harm), timeout=60) == [143, 143]
    assert finish(*start_ranks(stopped, validations=SPLITS)) == [0, 0]
    assert lines(stopped) == lines(whole)


def test_two_ranks_sum_both_splits_like_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_to_end(Toy(one, plain=True, validations=SPLITS)) == 0
    assert finish(*start_ranks(two, plain=True, validations=SPLITS)) == [0, 0]
    for alone, shared in zip(lines(one), lines(two), strict=True):
        for split in alone.keys() & {"train", *SPLITS}:
            for name, entry in alone[split].items():
                assert entry == pytest.approx(shared[split][name], rel=1e-6)


def test_an_error_between_steps_leaves_the_last_whole_step_saved(unbroken: Path, tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path, harm={"raise_at": 9})) == 1
    assert newest_step(tmp_path) == 9
    assert run_to_end(Toy(tmp_path)) == 0
    assert lines(tmp_path) == lines(unbroken)


def test_an_error_inside_a_step_saves_nothing_of_it(unbroken: Path, tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path, harm={"raise_after_update_of": 9})) == 1
    assert newest_step(tmp_path) == 5
    assert run_to_end(Toy(tmp_path)) == 0
    assert lines(tmp_path) == lines(unbroken)


def test_a_signal_that_a_launcher_passes_on_again_does_not_cut_the_save_short(tmp_path: Path) -> None:
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        folder = tmp_path / str(code)
        harm = {"signal_in": "step", "at_step": 13, "signal": number, "again_after": 0.01}
        assert run_to_end(Toy(folder, harm=harm)) == code
        assert newest_step(folder) == 14


def test_a_second_ctrl_c_stops_at_once_without_saving(unbroken: Path, tmp_path: Path) -> None:
    harm = {"signal_in": "step", "at_step": 13, "signal": signal.SIGINT, "again_after": 1.1}
    assert run_to_end(Toy(tmp_path, harm=harm)) == -signal.SIGINT
    assert newest_step(tmp_path) == 10
    assert "Ctrl-C stops without" in (tmp_path / "output.txt").read_text()
    assert run_to_end(Toy(tmp_path)) == 0
    assert lines(tmp_path) == lines(unbroken)


def test_resuming_a_finished_run_changes_nothing(unbroken: Path) -> None:
    before = (unbroken / METRICS).read_bytes()
    assert run_to_end(Toy(unbroken)) == 0
    assert (unbroken / METRICS).read_bytes() == before


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_logs_it(unbroken: Path, tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path, harm={"signal_in": "step", "at_step": 17, "signal": signal.SIGKILL})) == KILLED
    newest = checkpoints(tmp_path / CHECKPOINTS)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert run_to_end(Toy(tmp_path)) == 0
    assert EventLog(tmp_path / EVENTS).counts() == {"corrupt-checkpoint": 1}
    assert newest.name in (tmp_path / EVENTS).read_text()
    assert lines(tmp_path) == lines(unbroken)


def test_a_full_disk_leaves_the_old_checkpoint_and_the_run_goes_on(unbroken: Path, tmp_path: Path) -> None:
    operations = int((unbroken / "operations").read_text()) // 5
    harm = {"at_operation": operations + operations // 2, "then": "full"}
    assert run_to_end(Toy(tmp_path, steps=24, harm=harm)) == 0
    events = EventLog(tmp_path / EVENTS).read()
    assert [kind for _, kind, _ in events] == ["save-failed"]
    assert "step-00000010" in events[0][2]
    assert "No space left on device" in events[0][2]
    assert lines(tmp_path) == lines(unbroken)
    assert litter(tmp_path) == []


def test_a_disk_that_stays_full_ends_the_run_with_a_message_and_the_old_checkpoint(tmp_path: Path) -> None:
    assert run_to_end(Toy(tmp_path, steps=10)) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / CHECKPOINTS).iterdir()}
    # Files may not grow beyond 20,000 bytes: enough for metrics, too little for a checkpoint.
    assert run_to_end(Toy(tmp_path, steps=12, harm={"file_size": 20_000})) == 1
    assert {path.name: path.read_bytes() for path in (tmp_path / CHECKPOINTS).iterdir()} == before
    printed = (tmp_path / "output.txt").read_text()
    assert "could not write checkpoint" in printed
    assert "earlier checkpoints are intact" in printed
    assert EventLog(tmp_path / EVENTS).counts() == {}, "the save that ended the run is not repeated"


def test_two_ranks_write_the_sums_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert run_to_end(Toy(one, plain=True)) == 0
    assert finish(*start_ranks(two, plain=True)) == [0, 0]
    assert_equal_but_for_rounding(split_lines(one), split_lines(two))


def assert_equal_but_for_rounding(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Counts equal, losses within float32 rounding of a sum in another order."""
    for alone, shared in zip(one, other, strict=True):
        head = ("step", "samples", "tokens_nominal", "tokens_real", "lr")
        assert [alone[name] for name in head] == [shared[name] for name in head]
        key = "val" if "val" in alone else "train"
        for name, entry in alone[key].items():
            assert entry["count"] == shared[key][name]["count"]
            assert entry == pytest.approx(shared[key][name], rel=1e-6)


def split_lines(folder: Path) -> list[dict[str, Any]]:
    """Lines that carry losses by modality."""
    return [line for line in lines(folder) if "train" in line or "val" in line]


def start_ranks(
    folder: Path, plain: bool = False, validations: tuple[str, ...] = ("val",), **harm: Any
) -> list[BaseProcess]:
    """Both ranks of a run."""
    same: dict[str, Any] = {"world": 2, "port": free_port(), "plain": plain, "validations": validations, "harm": harm}
    return [start(Toy(folder, rank=rank, **same)) for rank in range(2)]


STOPPED = [
    (ranks, where, step)
    for where, step in (("step", 13), ("validation", 12), ("work after validation", 12))
    for ranks in ([0], [1], [0, 1])
    if where == "step" or ranks == [1] or len(SEEDS) >= 200
]


@pytest.mark.parametrize(("ranks", "where", "step"), STOPPED)
def test_one_signalled_rank_stops_both_and_the_pair_resumes_exactly(
    unbroken_pair: Path, tmp_path: Path, ranks: list[int], where: str, step: int
) -> None:
    number = signal.SIGUSR1 if where == "step" else signal.SIGTERM
    harm: dict[str, Any] = {"signal_in": where, "at_step": step, "signal": number, "ranks": ranks}
    assert finish(*start_ranks(tmp_path, **harm), timeout=30) == [128 + number] * 2
    assert newest_step(tmp_path) == (step + 1 if where == "step" else step)
    assert finish(*start_ranks(tmp_path)) == [0, 0]
    assert lines(tmp_path) == lines(unbroken_pair)


@pytest.fixture(scope="module")
def unbroken_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unbroken run on two ranks."""
    folder = tmp_path_factory.mktemp("pair")
    assert finish(*start_ranks(folder)) == [0, 0]
    return folder


def test_one_rank_signalled_between_the_checkpoint_and_the_first_step_stops_both(
    unbroken_pair: Path, tmp_path: Path
) -> None:
    for where in ("step", "start", "start"):
        harm = {"signal_in": where, "at_step": 13 if where == "step" else 14, "signal": signal.SIGTERM, "ranks": [0]}
        assert finish(*start_ranks(tmp_path, **harm), timeout=30) == [143, 143]
        assert newest_step(tmp_path) == 14
    assert finish(*start_ranks(tmp_path)) == [0, 0]
    assert lines(tmp_path) == lines(unbroken_pair)


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, first: int) -> None:
    unbroken, changed = tmp_path / "unbroken", tmp_path / "changed"
    assert run_to_end(Toy(unbroken, plain=True)) == 0
    # Step 14 lies inside a logging interval: its partial sums change hands.
    harm: dict[str, Any] = {"signal_in": "step", "at_step": 13, "signal": signal.SIGTERM}
    if first == 1:
        assert run_to_end(Toy(changed, plain=True, harm=harm)) == 143
        assert finish(*start_ranks(changed, plain=True)) == [0, 0]
    else:
        assert finish(*start_ranks(changed, plain=True, **harm)) == [143, 143]
        assert run_to_end(Toy(changed, plain=True)) == 0
    assert EventLog(changed / EVENTS).counts() == {"reseeded": 1}
    assert_equal_but_for_rounding(split_lines(unbroken), split_lines(changed))


def test_a_run_stopped_before_its_first_step_says_that_nothing_is_saved(tmp_path: Path) -> None:
    harm = {"signal_in": "validation", "at_step": 0, "signal": signal.SIGUSR1}
    assert run_to_end(Toy(tmp_path, harm=harm)) == 138
    assert "stopped by SIGUSR1 before its first step" in (tmp_path / "output.txt").read_text()
    assert was_not_started(tmp_path / CHECKPOINTS)
    assert run_to_end(Toy(tmp_path, steps=5)) == 0
    assert not was_not_started(tmp_path / CHECKPOINTS)
    assert litter(tmp_path) == []
    assert not (tmp_path / CHECKPOINTS / NOT_STARTED).exists()


def test_a_signal_in_the_last_save_still_stops_the_run(tmp_path: Path) -> None:
    # The report that follows can be long.
    assert run_to_end(Toy(tmp_path, steps=6, harm={"signal_in_save_of": 6})) == 143
    assert newest_step(tmp_path) == 6


@pytest.mark.parametrize("lost", ["absent", "another"])
def test_ranks_load_the_checkpoint_that_rank_0_names_or_all_stop(tmp_path: Path, lost: str) -> None:
    """Rank 1 sees another folder, as on another machine whose file system lags behind."""
    whole, lagging = tmp_path / "whole", tmp_path / "lagging"
    assert finish(*start_ranks(whole, signal_in="step", at_step=12, signal=signal.SIGTERM)) == [143, 143]
    shutil.copytree(whole, lagging)
    newest = checkpoints(lagging / CHECKPOINTS)[-1]
    if lost == "absent":
        newest.unlink()
    else:
        DurableCheckpointIO().save_checkpoint({"global_step": 13}, newest)
    before = {path: path.read_bytes() for path in (whole / CHECKPOINTS).iterdir()}
    port = free_port()
    ranks = [
        start(Toy(folder, rank=rank, world=2, port=port, harm={"resume_folder": True}))
        for rank, folder in enumerate((whole, lagging))
    ]
    assert finish(*ranks) == [1, 1]
    for folder, output in ((whole, "output.txt"), (lagging, "output.txt.1")):
        text = (folder / output).read_text()
        assert "rank 1: " in text
        assert newest.name in text
        assert "all ranks stop" in text
    assert {path: path.read_bytes() for path in (whole / CHECKPOINTS).iterdir()} == before
    shutil.copytree(whole, lagging, dirs_exist_ok=True)
    port = free_port()
    folders = (whole, lagging)
    ranks = [
        start(Toy(folder, rank=rank, world=2, port=port, harm={"resume_folder": True}))
        for rank, folder in enumerate(folders)
    ]
    assert finish(*ranks) == [0, 0]


def test_checkpoints_are_read_with_weights_only(unbroken: Path) -> None:
    newest = checkpoints(unbroken / CHECKPOINTS)[-1]
    assert torch.load(newest, weights_only=True)["global_step"] == 24
    assert digest_of(newest).read_text().split()[1] == newest.name
    assert DurableCheckpointIO().load_checkpoint(newest, weights_only=False)["global_step"] == 24
