"""Whole runs through the command line: real parts, tiny sizes."""

import json
import math
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from t2i_lm.storage.run_folder import Run, read_run, run_folders
from t2i_lm.train import main
from tests.callbacks.toy_run import server
from tests.runs import (
    PRETRAINED,
    QUICK,
    SCRATCH,
    Forked,
    Launched,
    checkpoints,
    curve,
    doubled_points,
    losses,
    same_losses,
    succeed,
    train,
    weights,
    without_newest,
)
from tests.small_reports import SCENES


def test_a_run_writes_all_its_files(pretrained: Run) -> None:
    folder = pretrained.folder
    for name in ("config.yaml", "env.json", "metrics.jsonl", "report.json", "samples/grid.png"):
        assert (folder / name).is_file(), name
    assert [record["step"] for record in pretrained.records("train")] == [2, 4, 6, 8]
    assert [record["step"] for record in pretrained.validations()] == [0, 4, 8]
    assert len(list((folder / "checkpoints").glob("*.ckpt"))) == 2
    assert pretrained.report is not None
    assert pretrained.report["tokens_nominal"] == pretrained.metrics[-1]["tokens_nominal"] == 8 * 8 * 112
    for part in (pretrained.report["iid"], pretrained.report["compositional"]):
        assert part["preference"]["colour"]["of"] == 2
        for share, entries in (("right", part["samples"]["accuracy"]), ("preferred", part["preference"])):
            assert "background" in entries
            for entry in entries.values():
                assert 0 <= entry[share] <= 1
                assert entry["se"] == pytest.approx(math.sqrt(entry[share] * (1 - entry[share]) / entry["of"]))
        assert part["ceiling"]["scenes"] == SCENES
        assert part["samples"]["accuracy"].keys() <= part["ceiling"]["accuracy"].keys()
    for name in ("grid_compositional", "originals", "originals_compositional"):
        assert (folder / "samples" / f"{name}.png").is_file()
    assert pretrained.report["text_floor_nll"] > pretrained.report["image_floor_nll"] > 0
    for split in pretrained.validation_splits:
        assert pretrained.report[f"val/{split}"] == pretrained.validations(split)[-1]["val"]
    assert "val" not in pretrained.report
    assert pretrained.report["truncated_captions"] < 0.5


def test_the_split_reproduces_the_total(pretrained: Run) -> None:
    for record in pretrained.metrics:
        assert losses(record).keys() in ({"train"}, {"val/iid", "val/compositional"})
        for values in losses(record).values():
            for field in ("nll_sum", "count"):
                parts = sum(values[name][field] for name in ("text", "image", "boundary"))
                assert values["all"][field] == pytest.approx(parts, rel=1e-12)
            assert values["all"]["ppl"] == pytest.approx(math.exp(values["all"]["nll"]))
    last = pretrained.records("train")[-1]
    assert last["samples"] == 8 * 8
    assert last["tokens_nominal"] == 8 * 8 * 112
    # Real tokens are targets and the first token of each sequence.
    counted = sum(record["train"]["all"]["count"] for record in pretrained.records("train"))
    assert last["tokens_real"] == counted + 64


def test_ema_is_of_the_loss_and_bias_corrected(pretrained: Run) -> None:
    ema = 0.0
    for number, record in enumerate(pretrained.records("train"), start=1):
        entry = record["train"]["image"]
        ema = 0.95 * ema + 0.05 * entry["nll"]
        assert entry["nll_ema"] == pytest.approx(ema / (1 - 0.95**number), rel=1e-12)
        assert entry["ppl_ema"] == pytest.approx(math.exp(entry["nll_ema"]), rel=1e-12)


def test_both_arms_see_one_stream(pretrained: Run, scratch: Run) -> None:
    for key in ("stream_hash", "data_hash", "tokenizers", "new_rows_seed"):
        assert pretrained.environment[key] == scratch.environment[key] is not None
    for ours, theirs in zip(pretrained.records("train"), scratch.records("train"), strict=True):
        assert ours["train"]["text"]["count"] == theirs["train"]["text"]["count"]


def test_the_random_arm_starts_at_ln_v_plus_a_half(scratch: Run) -> None:
    vocabulary = 512 + 7 + 32
    first = scratch.validations()[0]["val"]["all"]["nll"]
    assert first == pytest.approx(math.log(vocabulary) + 0.5, abs=0.15)


@pytest.mark.slow
def test_an_equal_run_is_equal_bit_for_bit(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    again = train(PRETRAINED, tmp_path, *tiny)
    assert curve(again) == curve(pretrained)
    for name, tensor in weights(again).items():
        assert torch.equal(tensor, weights(pretrained)[name]), name


def test_samples_that_fail_during_training_end_no_run(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr("t2i_lm.evaluation.report.captioned_grid", fail)
    run = train(PRETRAINED, tmp_path, *tiny, *QUICK, "samples.interval=4", "samples.grid=2")
    assert capsys.readouterr().err.count("no samples at step 4: RuntimeError: no memory\n") == 1
    assert run.report is not None


@pytest.mark.slow
def test_samples_during_training_are_logged_and_change_nothing(
    pretrained: Run, tiny: list[str], tmp_path: Path
) -> None:
    run = train(PRETRAINED, tmp_path, *tiny, "samples.interval=4", "samples.grid=2", "log.logger=tensorboard")
    drawn = run.records("prompt_accuracy")
    assert [line["step"] for line in drawn] == [4, 8]
    assert all(0 <= share <= 1 for line in drawn for share in line["prompt_accuracy"].values())
    assert {"step-00000004.png", "step-00000008.png"} <= {path.name for path in (run.folder / "samples").iterdir()}
    others = [record for record in curve(run) if "prompt_accuracy" not in record]
    assert others == curve(pretrained)
    assert all(torch.equal(value, weights(pretrained)[name]) for name, value in weights(run).items())


@pytest.mark.slow
def test_accumulation_gives_the_same_losses(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    split = train(PRETRAINED, tmp_path, *tiny, "trainer.accumulate_grad_batches=4")
    same_losses(split, pretrained, 1e-5)


@pytest.mark.slow
def test_bfloat16_trains_to_nearly_the_same_losses(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    low = train(PRETRAINED, tmp_path, *tiny, "trainer.precision=bf16-mixed", "samples.prompts=0")
    same_losses(low, pretrained, 2e-2)
    assert low.metrics != pretrained.metrics


@pytest.mark.slow
def test_two_processes_equal_one(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    ranks = ("trainer.strategy=ddp", "trainer.devices=2")
    succeed(Forked("t2i_lm.train", PRETRAINED, *tiny, *QUICK, *ranks, f"run.dir={tmp_path}"))
    assert len(run_folders(tmp_path)) == 1
    same_losses(read_run(run_folders(tmp_path)[0]), pretrained, 1e-6)


@pytest.mark.slow
def test_a_stopped_run_resumes_like_an_unbroken_one(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    """SIGTERM between steps, also to loader workers: saved, exit code 143; the resumed run equals the unbroken one."""
    process = Forked("t2i_lm.train", PRETRAINED, *tiny, f"run.dir={tmp_path}", "data.workers=1")
    metrics = wait_for_lines(process, tmp_path, 2)
    process.signal_group(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "--resume" in output
    assert len(metrics.read_text().splitlines()) < len(pretrained.metrics)
    assert main([PRETRAINED, "--resume", "latest", *tiny, f"run.dir={tmp_path}"]) == 0
    resumed = read_run(metrics.parent)
    assert curve(resumed) == curve(pretrained)


def wait_for_lines(process: Launched, root: Path, lines: int) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        for path in root.glob("*/*/metrics.jsonl"):
            if len(path.read_text().splitlines()) >= lines:
                return path
        time.sleep(0.02)
    raise AssertionError(process.communicate()[0] if process.poll() is not None else "no metrics in time")


# A long enough run to be killed six times, a checkpoint after each step.
KILLED = ("trainer.max_steps=20", "trainer.val_check_interval=10", "trainer.checkpoint_interval=1")


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit(tiny: list[str], tmp_path: Path) -> None:
    """kill -9 at six seeded instants, half of them inside a save, changes no number and leaves no litter."""
    settings = [*tiny, *KILLED, *QUICK, "log.logger=tensorboard"]
    unbroken = train(PRETRAINED, tmp_path / "unbroken", *settings)
    root, rng, saves = tmp_path / "killed", random.Random(0), 0
    for kill in range(6):
        arguments = [PRETRAINED, *(["--resume", "latest"] if kill else []), *settings, f"run.dir={root}"]
        # A fork of this process, whose threads have run, may crash.
        process = server.Process(target=main, args=(arguments,))
        before = list(root.glob("*/*/checkpoints/*.ckpt"))
        process.start()
        in_save = kill % 2 == 0
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            if list(root.glob("*/*/checkpoints/*.ckpt")) != before:
                break
            time.sleep(0.002)
        if in_save:
            while process.is_alive() and not list(root.glob("*/*/checkpoints/*.tmp")):
                pass
        else:
            time.sleep(rng.uniform(0, 0.05))
        assert process.is_alive(), "the run was over before it could be killed"
        process.kill()
        process.join()
        saves += bool(list(root.glob("*/*/checkpoints/*.tmp")))
    assert saves >= 1
    resumed = train(PRETRAINED, root, "--resume", "latest", *settings)
    assert len(run_folders(root)) == 1
    assert curve(resumed) == curve(unbroken)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, weights(unbroken)[name]), name
    assert not list(resumed.folder.glob("**/*.tmp"))
    assert not doubled_points(resumed)


def test_a_finished_run_is_never_overwritten(
    pretrained: Run, tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (pretrained.folder / "metrics.jsonl").read_bytes()
    assert main([PRETRAINED, "--resume", str(pretrained.folder), *tiny]) == 2
    assert "finished" in capsys.readouterr().err
    assert (pretrained.folder / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_while_it_reports_only_reports_again(pretrained: Run, tiny: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "t2i_pretrained" / pretrained.folder.name
    shutil.copytree(pretrained.folder, folder)
    (folder / "report.json").unlink()
    assert main([PRETRAINED, "--resume", str(folder)]) == 0
    again = read_run(folder)
    assert curve(again) == curve(pretrained)
    assert again.report is not None
    assert pretrained.report is not None
    for name in ("iid", "val/iid", "val/compositional"):
        assert again.report[name] == pretrained.report[name]


def test_a_run_killed_in_a_line_after_its_last_checkpoint_is_finished(pretrained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "t2i_pretrained" / pretrained.folder.name
    shutil.copytree(pretrained.folder, folder)
    (folder / "report.json").unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert b'"val' in lines[-1]
    (folder / "metrics.jsonl").write_bytes(b"".join(lines)[:-20])
    assert main([PRETRAINED, "--resume", str(folder)]) == 0
    assert curve(read_run(folder)) == curve(pretrained)


def test_the_time_of_a_run_is_that_of_all_its_sessions(pretrained: Run, tmp_path: Path) -> None:
    folder = without_newest(pretrained, tmp_path)
    at_step_6 = checkpoints(read_run(folder))[-1]
    before: float = torch.load(at_step_6, weights_only=True)["callbacks"]["WallTime"]["seconds"]
    started = time.monotonic()
    assert main([PRETRAINED, "--resume", str(folder)]) == 0
    again = read_run(folder)
    assert again.report
    assert pretrained.report
    assert 0 < before < pretrained.report["wall_s"] + 0.05  # rounded
    assert before < again.report["wall_s"] + 0.05 < before + time.monotonic() - started + 0.1


def test_another_config_is_refused_on_resume(
    pretrained: Run, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "t2i_pretrained" / "20260101-000000-demo"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_bytes((pretrained.folder / "config.yaml").read_bytes())
    assert main([PRETRAINED, "--resume", str(folder), "optim.lr=0.7"]) == 2
    assert "optim.lr=0.7" in capsys.readouterr().err


def test_a_wrong_tokenizer_for_the_backbone_is_refused(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = json.loads((Path(tiny[0].split("=")[1]) / "config.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(small))
    assert main([SCRATCH, *tiny, f"backbone.config={tmp_path}/small.json", f"run.dir={tmp_path}"]) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_an_unwritable_run_folder_is_named(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([SCRATCH, *tiny, f"run.dir={tmp_path}/file"]) == 2
    assert "run.dir" in capsys.readouterr().err
