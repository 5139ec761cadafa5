"""Runs that stand for a job: of an equal config, of the code, weights and tokenizers of today."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from callbacks.checkpoints import NOT_STARTED, checkpoint_path, mark_not_started
from t2i_lm.assets import find
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment, save_experiment
from t2i_lm.config.sections import RunConfig
from t2i_lm.data.identity import data_contents
from t2i_lm.data.scenes.version import IMAGES_FORMAT, SCENES, SCENES_FORMAT
from t2i_lm.data.shards.cache import former_scenes
from t2i_lm.models.factory import architecture_hashes
from t2i_lm.storage.hashing import file_sha256
from t2i_lm.storage.run_folder import CHECKPOINTS, CONFIG, CONTENTS, ENVIRONMENT, METRICS, REPORT, THINNED
from t2i_lm.training import equal_runs
from t2i_lm.training.equal_runs import find_equal_run
from tests.runs import EXPERIMENTS


def test_a_run_stands_for_jobs_that_compute_and_report_the_same(tmp_path: Path) -> None:
    run = tmp_path / "experiment" / "20260101-000000-demo"
    run.mkdir(parents=True)
    config = ExperimentConfig(run=RunConfig(str(tmp_path)))
    save_experiment(config, run / CONFIG)
    (run / REPORT).write_text("{}")
    for equal in (
        config,
        replace(config, data=replace(config.data, workers=3, cache_dir="elsewhere")),
        replace(config, trainer=replace(config.trainer, threads=7, checkpoint_interval=5)),
    ):
        assert find_equal_run(equal) == (run, True)
    for other in (
        replace(config, seed=1),
        replace(config, init="shuffled"),
        replace(config, samples=replace(config.samples, prompts=7)),
        replace(config, forgetting=replace(config.forgetting, interval=5, text="heldout.txt")),
        replace(config, fid=replace(config.fid, prompts=7)),
        replace(config, trainer=replace(config.trainer, packing=True)),
    ):
        assert find_equal_run(other) == (None, False)


@pytest.mark.parametrize(
    ("name", "metrics", "resumed"),
    [
        ("step-00000002.ckpt", "", True),
        (".step-00000002.ckpt.tmp", "", False),
        ("step-00000002.ckpt.sha256", "", False),
        ("step-00000002.ckpt.part-0-of-2-0123", "", False),
        (NOT_STARTED, '{"step": 0}\n', True),
        (NOT_STARTED, '{"step": 0}\n{"step": 1}\n', False),
        (NOT_STARTED, "damaged\n", False),
    ],
)
def test_only_a_run_with_a_checkpoint_or_without_a_step_is_resumed(
    name: str, metrics: str, resumed: bool, tmp_path: Path
) -> None:
    config = ExperimentConfig(run=RunConfig(str(tmp_path)))
    older, run = (tmp_path / "experiment" / f"2026010{day}-000000-demo" for day in (1, 2))
    for folder in (older, run):
        (folder / CHECKPOINTS).mkdir(parents=True)
        save_experiment(config, folder / CONFIG)
    (run / CHECKPOINTS / name).touch()
    (run / METRICS).write_text(metrics)
    assert find_equal_run(config) == (run if resumed else None, False)
    checkpoint_path(older / CHECKPOINTS, 1).touch()
    assert find_equal_run(config) == (run if resumed else older, False)


def test_a_run_that_changed_on_its_way_stands_for_no_job(tmp_path: Path) -> None:
    run = tmp_path / "experiment" / "20260101-000000-demo"
    run.mkdir(parents=True)
    config = ExperimentConfig(run=RunConfig(str(tmp_path)))
    save_experiment(config, run / CONFIG)
    (run / REPORT).write_text("{}")
    changes = [{"step": 2, "key": "optim.lr", "from": 0.1, "to": config.optim.lr}]
    neutral = [{"step": 2, "key": "trainer.activation_checkpointing", "from": False, "to": True}]
    for recorded, stands in (([], True), (neutral, True), (changes, False)):
        (run / ENVIRONMENT).write_text(json.dumps({SCENES: SCENES_FORMAT, "changes": recorded}))
        assert find_equal_run(config) == ((run, True) if stands else (None, False))


def test_a_run_without_the_checkpoints_to_keep_stands_for_no_job(tmp_path: Path) -> None:
    run = tmp_path / "experiment" / "20260101-000000-demo"
    (run / CHECKPOINTS).mkdir(parents=True)
    plain = ExperimentConfig(run=RunConfig(str(tmp_path)))
    config = replace(plain, trainer=replace(plain.trainer, keep_steps=[3]))
    save_experiment(plain, run / CONFIG)
    checkpoint_path(run / CHECKPOINTS, 2).touch()
    assert find_equal_run(config) == (run, False)  # step 3 is still to come
    checkpoint_path(run / CHECKPOINTS, 4).touch()
    assert find_equal_run(config) == (None, False)
    (run / REPORT).write_text("{}")
    assert find_equal_run(config) == (None, False)
    assert find_equal_run(plain) == (run, True)
    checkpoint_path(run / CHECKPOINTS, 3).touch()
    assert find_equal_run(config) == (run, True)


@pytest.mark.parametrize(
    ("recorded", "equal"), [({"scenes": SCENES_FORMAT}, True), ({"threads": 1}, False), ({}, True)]
)
def test_a_run_on_former_scenes_stands_for_no_job(recorded: dict[str, int], equal: bool, tmp_path: Path) -> None:
    run = tmp_path / "experiment" / "20260101-000000-demo"
    run.mkdir(parents=True)
    config = ExperimentConfig(run=RunConfig(str(tmp_path)))
    save_experiment(config, run / CONFIG)
    (run / ENVIRONMENT).write_text(json.dumps(recorded))
    mark_not_started(run / CHECKPOINTS)
    assert find_equal_run(config) == (run if equal else None, False)


def test_image_tokenizers_read_images_which_a_change_of_ids_leaves(tmp_path: Path) -> None:
    run = tmp_path / "image_tokenizer" / "20260101-000000-demo"
    run.mkdir(parents=True)
    config = ExperimentConfig(
        name="image_tokenizer", task="image_tokenizer", init="random", run=RunConfig(str(tmp_path))
    )
    save_experiment(config, run / CONFIG)
    mark_not_started(run / CHECKPOINTS)
    for version, equal in ((IMAGES_FORMAT, True), (IMAGES_FORMAT - 1, False)):
        (run / ENVIRONMENT).write_text(json.dumps({SCENES: version}))
        assert find_equal_run(config) == (run if equal else None, False)
        if equal:
            assert former_scenes(config, None, {SCENES: version}) is None
        else:
            with pytest.raises(ValueError, match=f"trained on version {version} of the scenes"):
                former_scenes(config, None, {SCENES: version})


def test_a_run_from_the_latest_alignment_is_found_again(tmp_path: Path) -> None:
    file = tmp_path / "align" / "20260101-000000-demo" / "aligned_rows.safetensors"
    run = tmp_path / "experiment" / "20260102-000000-demo"
    for folder in (file.parent, run):
        folder.mkdir(parents=True)
    file.touch()
    config = ExperimentConfig(init="aligned", aligned_rows="latest", run=RunConfig(str(tmp_path)))
    save_experiment(config, file.parent / CONFIG)
    save_experiment(replace(config, aligned_rows=str(file)), run / CONFIG)
    assert find_equal_run(config) == (None, False), "killed before its first checkpoint: a new run takes its place"
    mark_not_started(run / CHECKPOINTS)
    assert find_equal_run(config) == (run, False)


def asset(name: str) -> Path:
    file = find(f"asset:{name}")
    assert file is not None
    return file


RECORDED = {
    "backbone": {"model.safetensors": file_sha256(asset("lm_rotary/model.safetensors"))},
    "tokenizers": {
        "text": file_sha256(asset("lm_rotary/text_tokenizer.model")),
        "image": file_sha256(asset("image_tokenizer/model.safetensors")),
    },
}


@pytest.mark.parametrize("state", [REPORT, CHECKPOINTS, THINNED])
@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({}, True),
        ({"backbone": {"model.safetensors": "0" * 64}}, False),
        ({"tokenizers": {**RECORDED["tokenizers"], "text": "0" * 64}}, False),
        ({"tokenizers": {**RECORDED["tokenizers"], "image": "0" * 64}}, False),
        ({"backbone": None, "tokenizers": None}, True),  # not recorded
    ],
)
def test_a_run_on_other_files_of_the_same_path_stands_for_no_job(
    state: str, changed: dict[str, object], same: bool, tmp_path: Path
) -> None:
    config = load_experiment(EXPERIMENTS / "t2i_pretrained.yaml", "demo", [f"run.dir={tmp_path}"])
    run = tmp_path / config.name / "20260101-000000-demo"
    run.mkdir(parents=True)
    save_experiment(config, run / CONFIG)
    (run / ENVIRONMENT).write_text(json.dumps({"scenes": SCENES_FORMAT, **RECORDED, **changed}))
    if state == CHECKPOINTS:
        mark_not_started(run / CHECKPOINTS)
    else:
        (run / REPORT).write_text("{}")
        (run / state).touch()
    assert find_equal_run(config) == ((run, state != CHECKPOINTS) if same else (None, False))


@pytest.mark.parametrize(
    ("key", "file"),
    [("data.path", "photos/metadata.jsonl"), ("data.replay_path", "books.txt"), ("forgetting.text", "novels.txt.gz")],
)
def test_a_run_on_data_that_has_changed_stands_for_no_job(key: str, file: str, tmp_path: Path) -> None:
    data = tmp_path / "data" / file
    data.parent.mkdir(parents=True)
    data.write_text("a cat")
    source = "image_folder" if key == "data.path" else "scenes"
    values = [f"{key}={data.parent if key == 'data.path' else data}", f"data.source={source}", f"run.dir={tmp_path}"]
    ratio = ["data.replay_ratio=0.5"] if key == "data.replay_path" else []
    config = load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", [*values, *ratio])
    run = tmp_path / config.name / "20260101-000000-demo"
    run.mkdir(parents=True)
    save_experiment(config, run / CONFIG)
    (run / ENVIRONMENT).write_text(json.dumps({"scenes": SCENES_FORMAT, CONTENTS: data_contents(config)}))
    (run / REPORT).write_text("{}")
    os.utime(data, ns=(5, 5))  # as a copy has
    equal_runs._content.cache_clear()  # as in another command
    assert find_equal_run(config) == (run, True)
    data.write_text("a dog")
    equal_runs._content.cache_clear()
    assert find_equal_run(config) == (None, False)
    data.unlink()
    equal_runs._content.cache_clear()
    assert find_equal_run(config) == ((None, False) if key == "data.path" else (run, True))  # an empty folder is left


def test_a_run_of_an_edited_architecture_stands_for_no_job(tmp_path: Path) -> None:
    size = tmp_path / "size.json"
    size.write_text((EXPERIMENTS / "sizes" / "1m.json").read_text())
    values = ["backbone.path=null", f"backbone.config={size}", f"run.dir={tmp_path}"]
    config = load_experiment(EXPERIMENTS / "t2i_scratch.yaml", "demo", values)
    run = tmp_path / config.name / "20260101-000000-demo"
    run.mkdir(parents=True)
    save_experiment(config, run / CONFIG)
    (run / ENVIRONMENT).write_text(json.dumps({"scenes": SCENES_FORMAT, "configs": architecture_hashes(config)}))
    (run / REPORT).write_text("{}")
    assert find_equal_run(config) == (run, True)
    size.write_text((EXPERIMENTS / "sizes" / "3m.json").read_text())
    assert find_equal_run(config) == (None, False)


def test_a_run_whose_files_are_gone_still_stands_for_its_jobs(tmp_path: Path) -> None:
    paths = [f"backbone.path={tmp_path}/lm", f"image_tokenizer.path={tmp_path}/vq", f"run.dir={tmp_path}"]
    config = load_experiment(EXPERIMENTS / "t2i_pretrained.yaml", "demo", paths)
    run = tmp_path / config.name / "20260101-000000-demo"
    run.mkdir(parents=True)
    save_experiment(config, run / CONFIG)
    (run / ENVIRONMENT).write_text(json.dumps({"scenes": SCENES_FORMAT, **RECORDED}))
    (run / REPORT).write_text("{}")
    assert find_equal_run(config) == (run, True)


def test_a_damaged_run_hides_no_equal_one_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ExperimentConfig(run=RunConfig(str(tmp_path)))
    good, damaged, other = (tmp_path / config.name / f"2026010{day}-000000-demo" for day in (1, 2, 3))
    for folder in (good, damaged, other):
        folder.mkdir(parents=True)
        save_experiment(config, folder / CONFIG)
        (folder / REPORT).write_text("{}")
    (damaged / ENVIRONMENT).write_text("{")
    (other / CONFIG).write_text("nonsense: 1\n")
    assert find_equal_run(config) == (good, True)
    lines = capsys.readouterr().err.splitlines()
    assert [str(damaged) in line for line in lines] == [True, False]
    assert "nonsense" in lines[1]
