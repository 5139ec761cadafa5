"""Forgetting measured during a run, and wrong settings of it and of the remedies, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_lm.config.load import load_experiment
from t2i_lm.evaluate import main as evaluate
from t2i_lm.evaluation.forgetting import BASELINE, forgetting_report
from t2i_lm.experiment.restore import load_trained
from t2i_lm.models.decoder import Block
from t2i_lm.storage.run_folder import Run
from t2i_lm.storage.sealed import sealed
from t2i_lm.train import main
from tests.evaluation.tiny_tasks import TEXT, write_tasks
from tests.runs import PRETRAINED, curve, resume_from_middle, weights


def test_forgetting_is_measured_before_during_and_after_and_changes_nothing(probed: Run, pretrained: Run) -> None:
    lines = probed.records("forgetting")
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    assert [line["tokens_nominal"] for line in lines] == [step * 8 * 112 for step in (0, 3, 6, 8)]
    for line in lines:
        text = line["forgetting"]["text"]
        assert text["text_rows"]["nll"] < text["all_rows"]["nll"]
        assert text["text_rows"]["se"] > 0
        assert set(line["forgetting"]["tasks"]) == {"arc", "lambada.v2", "wino"}
    assert lines[0]["forgetting"]["text"]["text_rows"]["change"] == 0
    assert lines[-1]["forgetting"]["text"]["text_rows"]["change"] != 0
    assert [record for record in curve(probed) if "forgetting" not in record] == curve(pretrained)
    assert all(torch.equal(value, weights(pretrained)[name]) for name, value in weights(probed).items())


def test_a_probed_run_leaves_table_1_and_curves(probed: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert probed.report is not None
    assert probed.report["forgetting"] == probed.records("forgetting")[-1]["forgetting"]
    table = (probed.folder / "completions.md").read_text()
    assert "Simply put, the theory of relativity states that" in table
    assert f"after {8 * 8 * 112:,} tokens" in table
    assert len((probed.folder / "completions.csv").read_text().splitlines()) > 4
    events = EventAccumulator(str(probed.folder / "tb"))
    events.Reload()
    points = events.Scalars("forgetting/text/text_rows/nll")
    assert [point.step for point in points] == [step * 8 * 112 for step in (0, 3, 6, 8)]


def test_a_finished_run_reproduces_its_last_measurement(probed: Run) -> None:
    model = load_trained(probed.folder)
    assert (
        forgetting_report(model, model.config.forgetting, probed.folder)
        == (probed.records("forgetting")[-1]["forgetting"])
    )


def test_the_demos_measurements_take_at_most_a_fiftieth_of_its_training(
    probed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By positions, of which a training step computes each three times; by time some percent (docs/evaluation.md)."""
    demo, positions = load_experiment(PRETRAINED, "demo"), 0
    forward = Block.forward

    def counted(self: Block, x_BTD: Tensor, *more: Any) -> Tensor:
        nonlocal positions
        positions += x_BTD.shape[:2].numel()
        return forward(self, x_BTD, *more)

    model = load_trained(probed.folder)
    monkeypatch.setattr(Block, "forward", counted)
    forgetting_report(model, demo.forgetting)
    trainer, interval = demo.trainer, demo.forgetting.interval
    assert interval is not None
    measurements = 1 + trainer.max_steps // interval
    trained = 3 * trainer.max_steps * demo.data.batch_size * demo.data.length * model.decoder.config.n_layers
    print(f"{measurements * positions / trained:.2%} of the training")
    assert 0.005 < measurements * positions / trained <= 0.02


def test_evaluate_reproduces_the_last_measurement_of_a_run(
    probed: Run, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["--checkpoint", str(probed.folder), "--out", str(out), "--tasks", str(book.parent / "tasks")]
    same = [*command, "--forgetting", str(book)]
    assert evaluate([*same, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "6 rows of 32 ids" in said
    assert "100 questions each of arc, lambada.v2, wino" in said
    assert not out.exists()
    assert evaluate(same) == 0
    assert "note:" not in capsys.readouterr().err
    found = json.loads((out / "forgetting.json").read_text())
    last = probed.records("forgetting")[-1]["forgetting"]
    assert {key: found[key] for key in last} == last
    assert found["settings"]["completion_tokens"] == 4


def test_evaluate_on_another_text_reports_no_change(
    probed: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\f".join("\n\n".join(TEXT[start : start + 20][::-1]) for start in (0, 20, 40)))
    command = ["--checkpoint", str(probed.folder), "--forgetting", str(other), "--out", str(tmp_path / "out")]
    assert evaluate(command) == 0
    assert capsys.readouterr().err.count("note: no change for text: forgetting_before.json holds other rows") == 1
    found = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert (found["text"]["rows"], found["text"]["targets"]) == (6, 6 * 32)  # of as many rows as before training
    assert "change" not in found["text"]["text_rows"]
    assert found["note"].startswith("no change for text")


def test_evaluate_overwrites_no_result_of_other_settings(
    probed: Run, pretrained: Run, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(book.read_text() + " and stars")
    out = tmp_path / "out"
    command = ["--checkpoint", str(probed.folder), "--rows", "2", "--out", str(out), "--forgetting"]
    assert evaluate([*command, str(book)]) == 0
    first = (out / "forgetting.json").read_bytes()
    elsewhere = tmp_path / "book.txt"
    elsewhere.write_text(book.read_text())
    assert evaluate([*command, str(elsewhere)]) == 0  # the same text: replaced
    assert json.loads((out / "forgetting.json").read_text())["text"] == json.loads(first)["text"]

    first = (out / "forgetting.json").read_bytes()
    tasks = ["--tasks", str(book.parent / "tasks")]
    run = [str(pretrained.folder) if word == str(probed.folder) else word for word in command]
    for words, differing in (
        ([*command, str(other)], "text_sha256="),
        ([*command, str(book), "--rows", "3"], "rows=2, now 3"),
        ([*command, str(book), *tasks], "tasks_sha256={}, now {'arc'"),
        ([*run, str(book), "--length", "32"], "checkpoint_sha256="),
    ):
        for dry in ([], ["--dry-run"]):
            assert evaluate([*words, *dry]) == 2
            said = capsys.readouterr().err
            assert f"{out / 'forgetting.json'} holds a result of other settings (" in said
            assert differing in said
            assert "--out" in said
    assert (out / "forgetting.json").read_bytes() == first
    both = [*command[:-2], str(tmp_path / "both"), "--forgetting", str(book)]
    assert evaluate([*both, "--second-text", str(other)]) == 0
    assert evaluate(both) == 2
    assert "second_text_sha256=" in capsys.readouterr().err
    unknown = json.loads(first)
    del unknown["made_with"]
    (out / "forgetting.json").write_text(json.dumps(sealed(unknown)))
    assert evaluate([*command, str(book)]) == 2
    assert "does not name its settings" in capsys.readouterr().err
    (out / "forgetting.json").write_bytes(first.replace(b'"nll": ', b'"nll": 1', 1))
    assert evaluate([*command, str(book)]) == 2
    said = f"{out / 'forgetting.json'} is damaged: its digest differs from its entries; restore it from a copy, or"
    assert said in capsys.readouterr().err


def test_evaluate_refuses_wrong_inputs_before_loading_a_model(
    probed: Run,
    pretrained: Run,
    book: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    out = ["--out", str(tmp_path / "out")]
    tasks, bare, blank = tmp_path / "tasks", tmp_path / "bare", tmp_path / "blank.txt"
    write_tasks(tasks, '\n{"query": 1, "choices": ["a"], "gold": 0}')
    (bare / "checkpoints").mkdir(parents=True)
    (bare / "config.yaml").write_text((probed.folder / "config.yaml").read_text())
    blank.write_text(" \n")

    def refused(run: Path, *words: str) -> str:
        for dry in ([], ["--dry-run"]):
            assert evaluate(["--checkpoint", str(run), *out, *words, *dry]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    text = ["--forgetting", str(book)]
    assert "lambada.v2.jsonl line 2: query=1: expected a text" in refused(probed.folder, *text, "--tasks", str(tasks))
    assert "--tasks nowhere: no such folder" in refused(probed.folder, *text, "--tasks", "nowhere")
    assert "--rows 0: expected at least 1" in refused(probed.folder, *text, "--rows", "0")
    assert "--questions requires --tasks" in refused(probed.folder, *text, "--questions", "3")
    assert f"--forgetting {blank}: there is no text in it" in refused(probed.folder, "--forgetting", str(blank))
    for name in (str(tmp_path / "none"), "../none.txt", "org/books:test"):  # a name that is no file may be a dataset's
        said = refused(probed.folder, "--forgetting", name)
        missing = "nor a reachable Hugging Face dataset" if name.startswith("org") else "no such file or folder"
        assert f"--forgetting='{name}'" in said
        assert missing in said
    assert "is not a run folder and contains none" in refused(tmp_path / "nowhere", *text)
    assert f"{bare} has no intact checkpoint" in refused(bare, *text)


def test_rows_longer_than_the_positions_are_refused_with_a_remedy(
    pretrained: Run, book: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint", str(pretrained.folder), "--forgetting", str(book), "--out", str(tmp_path / "out")]
    assert evaluate([*command, "--length", "256"]) == 2
    assert "forgetting.length=256: the backbone has 112 positions; give at most 112 (evaluate: --length 112)" in (
        capsys.readouterr().err
    )
    assert evaluate([*command, "--length", "112", "--rows", "2"]) == 0
    found = json.loads((tmp_path / "out" / "forgetting.json").read_text())
    assert found["text"]["targets"] == 2 * 112


def test_a_resumed_run_with_an_older_baseline_reports_no_change(
    probed: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forget_identity(folder: Path) -> None:
        content = json.loads((folder / BASELINE).read_text())
        (folder / BASELINE).write_text(json.dumps(content["values"]))

    resumed = resume_from_middle(PRETRAINED, tmp_path, probed, first=forget_identity)
    said = "no change for any value: forgetting_before.json has no hashes of its rows and questions"
    captured = capsys.readouterr()
    assert captured.err.count(f"note: {said}") == 1
    assert f"forgetting: {said}" in captured.out
    assert resumed.report is not None
    assert resumed.report["forgetting"]["note"] == said
    assert "change" not in resumed.report["forgetting"]["text"]["text_rows"]


def test_a_resumed_run_measures_as_an_unbroken_one(probed: Run, tmp_path: Path) -> None:
    resumed = resume_from_middle(PRETRAINED, tmp_path, probed)
    assert curve(resumed) == curve(probed)
    assert json.loads((resumed.folder / BASELINE).read_text()) == json.loads((probed.folder / BASELINE).read_text())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["forgetting.interval=2", "forgetting.text=null"], "forgetting.text=null"),
        (["forgetting.interval=2", "forgetting.second_text=asset:text/x"], "expected one of asset:text/nonfiction"),
        (["forgetting.interval=2", "forgetting.text=/nowhere", "forgetting.length=8"], "forgetting.text='/nowhere'"),
        (["data.replay_ratio=0.25"], "data.replay_path=None: expected text for data.replay_ratio=0.25"),
        (["data.replay_ratio=0.25", "data.replay_path=/nowhere"], "data.replay_path='/nowhere'"),
        (["data.replay_ratio=0.3"], "a whole number of data.batch_size=8"),
        (["loss.text_weight=-1"], "loss.text_weight=-1.0: expected 0 or more"),
        (["loss.text_weight=0", "task=unconditional"], "loss.text_weight=0.0: expected 1 with task=unconditional"),
        (["distil.weight=1", "init=random"], "no language to distil from"),
        (["optim.l2_sp=1", "lora.rank=2"], "optim.l2_sp=1.0: expected 0 with lora.rank=2"),
        (["optim.l2_sp=1", "freeze=[text_rows,norm,attention,ffn]"], "leave no pre-trained weight trainable"),
    ],
)
def test_bad_settings_are_refused(
    overrides: list[str], message: str, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PRETRAINED, *tiny, f"run.dir={tmp_path}", *overrides]) == 2
    assert message in capsys.readouterr().err


def test_text_that_is_measured_on_is_not_replayed(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heldout, replay = tmp_path / "heldout.txt", tmp_path / "replay.txt"
    heldout.write_text("a ring of stars\fa red circle")
    replay.write_text("a blue square\fa  red\ncircle\n")  # white space aside
    settings = ["forgetting.interval=2", f"forgetting.text={heldout}", "data.replay_ratio=0.25"]
    assert main([PRETRAINED, *tiny, f"run.dir={tmp_path}", *settings, f"data.replay_path={replay}"]) == 2
    said = (
        f"data.replay_path={replay}: a document of forgetting.text={heldout}, on which forgetting is measured, is in it"
    )
    assert f"{said} ('a red circle')" in capsys.readouterr().err
    settings[1] = "forgetting.text=org/books:train"
    assert main([PRETRAINED, *tiny, f"run.dir={tmp_path}", *settings, "data.replay_path=org/books"]) == 2
    said = "data.replay_path=org/books: forgetting.text=org/books:train is the same text"
    assert said in capsys.readouterr().err
