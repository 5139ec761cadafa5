"""Ranks that are stopped, killed, hung or refused: the others end soon and name them; long work is no hang.

T2I_LM_RANKS is the number of ranks that are stopped at seeded instants; with less than 10, a share of the faults runs.
"""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from t2i_lm.storage.run_folder import Run
from tests.callbacks.toy_model import Toy
from tests.callbacks.toy_run import finish, free_port, server, start
from tests.runs import PRETRAINED, QUICK, launch_module, without_newest
from tests.slurm import task_environment
from tests.test_evaluate import in_process
from tests.test_train import wait_for_lines
from tests.training.test_ranks import RANK_S, errors, in_step, start_ranks
from tests.two_ranks import environments

pytestmark = pytest.mark.slow

STOPPED = int(os.environ.get("T2I_LM_RANKS", "1"))
all_faults = pytest.mark.skipif(STOPPED < 10, reason="make test-faults")
# Enough steps for any instant; of a few milliseconds each.
LONG = ("trainer.max_steps=4000", "trainer.val_check_interval=4000", "trainer.checkpoint_interval=100")
TWO = ("trainer.strategy=ddp", "trainer.devices=2", "trainer.rank_timeout=5")


def children(process: "subprocess.Popen[str]") -> list[int]:
    """Running processes that a process started, and theirs."""
    found = []
    for pid in subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()[1:]:
        number, parent, command = pid.split(None, 2)
        if int(parent) == process.pid and "t2i_lm.train" in command:
            found.append(int(number))
    return found


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=all_faults)])
def test_a_killed_rank_is_named_by_the_other(tmp_path: Path, rank: int) -> None:
    ranks = start_ranks(tmp_path, **in_step(14, signal_in="step", signal=signal.SIGKILL, ranks=[rank]))
    codes = finish(*ranks)
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 1)
    (line,) = errors(tmp_path, 1 - rank)
    # On a busy machine it may die before the other has read its first beat.
    died = rf"\({os.uname().nodename}, process {ranks[rank].pid}\) has died, last seen "
    assert re.search(rf"rank {rank} of 2 ({died}|did not arrive )", line)


@pytest.mark.parametrize(("rank", "where", "text"), [(1, "step", "in step 14"), (0, "loader", "reading the batch of")])
def test_the_rank_that_others_wait_for_is_named_and_shows_its_stack(
    tmp_path: Path, rank: int, where: str, text: str
) -> None:
    harm = in_step(14, sleep_in=where, seconds=100, ranks=[rank])
    assert finish(*start_ranks(tmp_path, **harm)) == [1, 1]
    for one in range(2):
        (line,) = errors(tmp_path, one)
        pattern = rf"rank {rank} of 2 \(.*\) has made no progress for \d+ s, {text}.*, while rank {1 - rank} waits\."
        assert re.search(pattern, line)
        log = (tmp_path / ("output.txt" if one == 0 else "output.txt.1")).read_text()
        assert ("time.sleep" in log) == (one == rank)


@all_faults
def test_long_phases_are_no_hang(tmp_path: Path) -> None:
    """Building, a validation and a step are longer than the limit; so is a stop of all ranks by a scheduler."""
    harm = {"sleep_in": "validation", "at_step": 6, "seconds": 2.5 * RANK_S, "ranks": [1]}
    ranks = start_ranks(tmp_path, building_s=1.5 * RANK_S, **harm)
    time.sleep(2 * RANK_S)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in ranks:
            assert process.pid is not None
            os.kill(process.pid, number)
        time.sleep(1.5 * RANK_S)
    assert finish(*ranks) == [0, 0]


@all_faults
def test_a_signal_while_another_rank_is_stopped_ends_the_run_sooner(tmp_path: Path) -> None:
    ranks = start_ranks(tmp_path, 60, **in_step(14, signal_in="step", signal=signal.SIGSTOP, ranks=[1]))
    events, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 60
    while '"step": 12' not in (events.read_text() if events.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    assert ranks[0].pid is not None
    os.kill(ranks[0].pid, signal.SIGTERM)
    assert finish(*ranks, timeout=25) == [143, -signal.SIGKILL]
    (line,) = errors(tmp_path, 0)
    assert "rank 1 of 2" in line
    assert "SIGTERM was received, and this rank cannot save without it" in line


@all_faults
def test_the_rest_of_three_ranks_name_the_same_one(tmp_path: Path) -> None:
    harm = in_step(14, signal_in="step", signal=signal.SIGSTOP, ranks=[1])
    assert finish(*start_ranks(tmp_path, world=3, **harm)) == [1, -signal.SIGKILL, 1]
    assert errors(tmp_path, 0) == errors(tmp_path, 2)


@pytest.mark.parametrize("seed", range(STOPPED))
def test_a_rank_stopped_at_any_instant_is_named(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rank, port = draw.randrange(2), free_port()
    ranks = [start(Toy(tmp_path, steps=10**6, rank=number, world=2, port=port, rank_s=5.0)) for number in range(2)]
    time.sleep(draw.uniform(0, 20) if STOPPED > 1 else 5)
    victim = ranks[rank].pid
    assert victim is not None
    os.kill(victim, signal.SIGSTOP)
    stopped = time.monotonic()
    ranks[1 - rank].join(60)
    seconds = time.monotonic() - stopped
    codes = finish(*ranks)
    text = (tmp_path / ("output.txt" if rank == 1 else "output.txt.1")).read_text()
    assert codes[1 - rank] == 1, text
    assert re.search(rf"error: rank {rank} of 2 .*(not answered for 5 s|did not arrive)", text), text
    assert seconds < 20
    print(f"rank {rank} named {seconds:.1f} s after it was stopped")


@pytest.mark.parametrize(
    ("launcher", "number", "reason"),
    [
        ("torchrun", signal.SIGSTOP, "not answered for 5 s"),
        pytest.param("torchrun", signal.SIGKILL, "died, last seen", marks=all_faults),
        pytest.param("lightning", signal.SIGSTOP, "not answered for 5 s", marks=all_faults),
        pytest.param("lightning", signal.SIGKILL, "died, last seen", marks=all_faults),
    ],
)
def test_a_rank_of_a_launcher_is_named_and_none_is_left(
    tiny: list[str], tmp_path: Path, launcher: str, number: int, reason: str
) -> None:
    arguments = [PRETRAINED, *tiny, *QUICK, *LONG, *TWO, f"run.dir={tmp_path}"]
    if launcher == "lightning":
        process = launch_module("t2i_lm.train", *arguments)
    else:
        torchrun = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m"]
        process = launch_module(*torchrun, "t2i_lm.train", *arguments)
    wait_for_lines(process, tmp_path, 3)
    ranks = children(process)
    os.kill(ranks[-1], number)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert re.search(rf"error: rank 1 of 2 \(.*, process {ranks[-1]}\) has {reason}", output), output
    assert "continue with --resume" in output or "start the run again" in output
    deadline = time.monotonic() + 40  # torchrun itself kills workers that do not end
    while any(map(exists, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(exists, ranks))


@all_faults
def test_ranks_under_srun_end_with_the_reason_for_which_rank_0_refuses_to_resume(
    pretrained: Run, tiny: list[str], tmp_path: Path
) -> None:
    folder = without_newest(pretrained, tmp_path)
    for file in (folder / "checkpoints").glob("*.sha256"):
        file.unlink()
    port, started = free_port(), time.monotonic()
    changes = [*tiny, "trainer.strategy=ddp", "trainer.devices=2", "--resume", str(folder)]
    ranks = [launch_module("t2i_lm.train", PRETRAINED, *changes, **task_environment(rank, port)) for rank in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 1], outputs
    assert "no checkpoint can be verified" in outputs[0]
    assert re.search(r"error: rank 0 of 2 .* failed .*no checkpoint can be verified", outputs[1]), outputs[1]
    assert time.monotonic() - started < 60


def with_log(log: Path, *given: Any) -> None:
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    in_process(*given)


@all_faults
def test_a_killed_rank_ends_the_evaluation_of_the_other(evaluate_command: list[str], tmp_path: Path) -> None:
    arguments = [*evaluate_command, "--out", str(tmp_path / "out")]
    ranks = [
        server.Process(target=with_log, args=(tmp_path / f"log.{rank}", arguments, environment, rank))
        for rank, environment in enumerate(environments())
    ]
    for process in ranks:
        process.start()
    assert finish(*ranks) == [1, -signal.SIGKILL]
    last = (tmp_path / "log.0").read_text().splitlines()[-1]
    assert re.fullmatch(r"error: rank 1 of 2 \(.*\) has died, last seen in the evaluation\. The same command .*", last)
