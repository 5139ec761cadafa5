"""A run continues from a verified checkpoint with the config that this was trained with, or nothing is touched."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks import DurableCheckpointIO, read_record
from callbacks.checkpoints import checkpoint_path, checkpoints, mark_not_started, step_of
from callbacks.run_record import RECORD
from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.image_tokenizer import VQModelConfig
from t2i_lm.config.key_groups import FIXED, PATH_KEYS, RESUMABLE, SWITCHES, cannot_change, is_fixed, may_move
from t2i_lm.config.load import flatten, flatten_mapping, load_experiment, save_experiment
from t2i_lm.experiment.build import build_model
from t2i_lm.modules.image_tokenizer import ImageTokenizerModule
from t2i_lm.storage.run_folder import (
    CHECKPOINTS,
    CONFIG,
    CONFIG_DIGEST,
    ENVIRONMENT,
    METRICS,
    REPORT,
    Run,
    read_run,
)
from t2i_lm.storage.sealed import sealed
from t2i_lm.tokenizers.vq import PatchedVQ, save_tokenizer
from t2i_lm.train import main
from t2i_lm.training.resumption import VALUES, config_entry, find_resumption, require_same_config
from tests.runs import EXPERIMENTS, PRETRAINED, without_newest
from tests.training.test_continuity import contents


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2 that record its config."""
    run = tmp_path / "run"
    (run / CHECKPOINTS).mkdir(parents=True)
    save_experiment(ExperimentConfig(), run / CONFIG)
    (run / ENVIRONMENT).write_text("{}")
    (run / METRICS).write_text('{"step": 0}\n{"step": 2}\n')
    record = {VALUES: flatten_mapping(yaml.safe_load((run / CONFIG).read_text()))}
    for step in (1, 2):
        content = {"weights": torch.ones(3), RECORD: record}
        DurableCheckpointIO().save_checkpoint(content, checkpoint_path(run / CHECKPOINTS, step))
    return run


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# What may be left of the checkpoints of a run, and what is said.
LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "digests lost": (
        lambda place: [*map(os.remove, place.glob("*.sha256"))],
        "step-00000002.ckpt has no digest",
    ),
    "both damaged": (lambda place: [*map(damage, place.glob("*.ckpt"))], "step-00000001.ckpt is damaged"),
    "not mounted": (shutil.rmtree, "checkpoints does not exist"),
    "all deleted": (lambda place: [*map(os.remove, place.iterdir())], "checkpoints has none"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_without_a_verifiable_checkpoint_nothing_is_touched(folder: Path, loss: str) -> None:
    lose, message = LOSSES[loss]
    lose(folder / CHECKPOINTS)
    before = contents(folder)
    with pytest.raises(ValueError, match="no checkpoint can be verified") as error:
        find_resumption(folder)
    for part in (message, "metrics.jsonl reaches step 2", "Nothing was changed", "starts a new run at step 0"):
        assert part in str(error.value)
    assert contents(folder) == before


def test_the_command_refuses_such_a_run_and_leaves_every_byte(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, (lose, message) in enumerate(LOSSES.values()):
        run = tmp_path / str(number) / "t2i_pretrained" / pretrained.folder.name
        shutil.copytree(pretrained.folder, run)
        (run / REPORT).unlink()
        lose(run / CHECKPOINTS)
        before = contents(run)
        assert main([PRETRAINED, "--resume", str(run)]) == 2
        assert contents(run) == before
        error = capsys.readouterr().err
        assert "no checkpoint can be verified" in error
        assert message.split("-")[0] in error


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(checkpoint_path(folder / CHECKPOINTS, 2))
    found = find_resumption(folder)
    assert found.step == 1
    assert [kind for kind, _ in found.events] == ["corrupt-checkpoint"]
    assert "step-00000002.ckpt is damaged" in capsys.readouterr().err


def test_another_process_that_continued_meanwhile_is_noticed(folder: Path) -> None:
    found = find_resumption(folder)
    found.require_current()
    DurableCheckpointIO().save_checkpoint({}, checkpoint_path(folder / CHECKPOINTS, 3))
    with pytest.raises(ValueError, match="another process has just continued this run"):
        found.require_current()


def test_a_run_stopped_before_its_first_step_begins_again_in_its_folder(folder: Path) -> None:
    shutil.rmtree(folder / CHECKPOINTS)
    mark_not_started(folder / CHECKPOINTS)
    with pytest.raises(ValueError, match=r"metrics\.jsonl reaches step 2"):
        find_resumption(folder)
    (folder / METRICS).write_text('{"step": 0}\n')
    assert find_resumption(folder).checkpoint is None


def test_a_cut_config_is_never_filled_up_with_defaults(folder: Path) -> None:
    """Cut at line ends: the rest would still be a valid config."""
    file = folder / CONFIG
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    accepted, messages, known = [], [], flatten(ExperimentConfig())
    for end in range(1, len(lines), 9):
        file.write_text("".join(lines[:end]))
        left = flatten_mapping(yaml.safe_load(file.read_text()))
        try:
            require_same_config(load_experiment(file), find_resumption(folder))
        except ValueError as error:
            messages.append(str(error))
        else:
            accepted += [key for key in known if key not in left]
    assert all(map(may_move, accepted))
    assert messages
    assert all(CONFIG in message for message in messages)


CHANGES = [{"optim.lr": 0.7}, {"data.length": 9}, {"seed": 4}, {"optim.lr": "missing"}]
REFUSED = [{"optim.decay": "matrices"}, {"image_tokenizer.model.codes": 9}, {"optim.l2_sp": 0.1}]


@pytest.mark.parametrize("change", [*CHANGES, *REFUSED], ids=str)
def test_a_changed_config_is_refused_with_both_values(folder: Path, change: dict[str, Any]) -> None:
    ((key, value),) = change.items()
    before = flatten(ExperimentConfig())[key]
    write(folder, key, value)
    with pytest.raises(ValueError, match=f"{key} is {before} in step-00000002.ckpt, now ") as error:
        require_same_config(load_experiment(folder / CONFIG), find_resumption(folder, ["data.workers"]))
    is_final = cannot_change(key, before, value)
    assert ("cannot change within a run" in str(error.value)) == is_final
    assert is_final or change in CHANGES
    if value == "missing" or is_final:
        with pytest.raises(ValueError, match=key):
            require_same_config(load_experiment(folder / CONFIG), find_resumption(folder, [key]))


def write(folder: Path, key: str, value: Any) -> None:
    """Changes or removes a value of config.yaml."""
    tree = yaml.safe_load((folder / CONFIG).read_text())
    *sections, name = key.split(".")
    place = tree
    for section in sections:
        place = place[section]
    assert name in place
    if value == "missing":
        del place[name]
    else:
        place[name] = value
    (folder / CONFIG).write_text(yaml.dump(tree, sort_keys=False))


def test_an_allowed_change_is_recorded_and_the_former_config_is_kept(folder: Path) -> None:
    config = load_experiment(folder / CONFIG, None, ["optim.lr=0.7"])
    found = find_resumption(folder, ["optim.lr"])
    require_same_config(config, found)
    found.write_changes({"numerics": 1}, config)
    assert load_experiment(folder / CONFIG) == config
    assert load_experiment(folder / "config-to-step-00000002.yaml") == ExperimentConfig()
    expected = {"step": 2, "key": "optim.lr", "from": ExperimentConfig().optim.lr, "to": 0.7}
    assert json.loads((folder / ENVIRONMENT).read_text()) == {"numerics": 1, "changes": [expected]}
    again = find_resumption(folder, ["optim.lr"])  # killed before the next checkpoint
    require_same_config(load_experiment(folder / CONFIG), again)
    again.write_changes({"numerics": 1}, config)
    assert json.loads((folder / ENVIRONMENT).read_text())["changes"] == [expected]
    former = f"optim.lr={ExperimentConfig().optim.lr}"  # killed again, and continued at the rate of the checkpoint
    back = load_experiment(folder / CONFIG, None, [former])
    found = find_resumption(folder, ["optim.lr"])
    require_same_config(back, found)
    found.write_changes({"numerics": 1}, back)
    assert load_experiment(folder / CONFIG) == back
    assert json.loads((folder / ENVIRONMENT).read_text())["changes"] == []


def test_a_change_before_the_first_step_is_recorded(folder: Path) -> None:
    shutil.rmtree(folder / CHECKPOINTS)
    mark_not_started(folder / CHECKPOINTS)
    (folder / METRICS).write_text('{"step": 0}\n')
    config = load_experiment(folder / CONFIG, None, ["optim.lr=0.7"])
    found = find_resumption(folder, ["optim.lr"])
    require_same_config(config, found)
    found.write_changes({}, config)
    assert load_experiment(folder / CONFIG) == config
    (change,) = json.loads((folder / ENVIRONMENT).read_text())["changes"]
    assert (change["step"], change["key"], change["to"]) == (0, "optim.lr", 0.7)


def test_a_config_that_was_edited_before_the_first_step_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / CHECKPOINTS)
    mark_not_started(folder / CHECKPOINTS)
    (folder / METRICS).write_text('{"step": 0}\n')
    (folder / ENVIRONMENT).write_text(json.dumps(sealed({CONFIG_DIGEST: config_entry(folder)})))
    require_same_config(load_experiment(folder / CONFIG), find_resumption(folder))
    write(folder, "seed", 5)
    with pytest.raises(ValueError, match="has other values than when the run was started"):
        require_same_config(load_experiment(folder / CONFIG), find_resumption(folder))


def test_a_change_under_a_former_name_leaves_one_name(folder: Path) -> None:
    config = load_experiment(folder / CONFIG, None, ["data.pad_to_multiple_of=32"])
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("pad_to_multiple_of:", "trim:"))
    found = find_resumption(folder, ["data.pad_to_multiple_of"])
    found.write_changes({}, config)
    assert load_experiment(folder / CONFIG).data.pad_to_multiple_of == 32


def test_a_restored_config_has_its_digest_again(folder: Path) -> None:
    config = load_experiment(folder / CONFIG, None, ["optim.lr=0.7"])
    (folder / ENVIRONMENT).write_text(json.dumps(sealed({CONFIG_DIGEST: config_entry(folder)})))
    found = find_resumption(folder, ["optim.lr"])
    require_same_config(config, found)
    found.write_changes({}, config)
    shutil.copyfile(folder / "config-to-step-00000002.yaml", folder / CONFIG)  # by a person
    with pytest.raises(ValueError, match="config"):
        read_run(folder)
    found = find_resumption(folder)
    require_same_config(load_experiment(folder / CONFIG), found)
    found.write_changes({}, load_experiment(folder / CONFIG))
    assert read_run(folder).config["optim"]["lr"] == ExperimentConfig().optim.lr


def test_a_preset_cannot_change_within_a_run(folder: Path) -> None:
    overridden = load_experiment(folder / CONFIG, None, ["backbone.config=open_lm_1b_old"])
    with pytest.raises(ValueError, match=r"backbone\.config cannot change within a run"):
        require_same_config(overridden, find_resumption(folder, ["backbone.config"]))
    write(folder, "backbone.config", "open_lm_1b_old")
    with pytest.raises(ValueError, match=r"backbone\.config cannot change within a run"):
        require_same_config(load_experiment(folder / CONFIG), find_resumption(folder, ["backbone.config"]))


def test_fewer_steps_than_are_done_are_refused(folder: Path) -> None:
    config = load_experiment(folder / CONFIG, None, ["trainer.max_steps=1", "optim.warmup_steps=0"])
    with pytest.raises(ValueError, match=r"trainer\.max_steps=1: expected at least 2, the steps done"):
        require_same_config(config, find_resumption(folder, ["trainer.max_steps", "optim.warmup_steps"]))


def test_places_may_move_and_are_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("data.cache_dir", "data.path"):
        write(folder, key, "/elsewhere")
    require_same_config(load_experiment(folder / CONFIG), find_resumption(folder))
    told = capsys.readouterr().err
    for key in ("data.cache_dir", "data.path"):
        assert f"{folder / CONFIG}: {key} is " in told
    assert "now /elsewhere" in told


def test_a_checkpoint_of_an_older_version_has_no_record(folder: Path) -> None:
    DurableCheckpointIO().save_checkpoint({"weights": torch.ones(3)}, checkpoint_path(folder / CHECKPOINTS, 3))
    found = find_resumption(folder)
    assert (found.step, found.record) == (3, {})
    write(folder, "optim.lr", 0.7)
    require_same_config(load_experiment(folder / CONFIG), found)


def test_every_fixed_key_is_a_key_and_none_may_change_on_resume() -> None:
    keys = flatten(ExperimentConfig())
    for fixed in FIXED:
        assert any(key == fixed or key.startswith(fixed) for key in keys), fixed
    assert not any(is_fixed(key) for key in (*RESUMABLE, *PATH_KEYS))
    assert {*SWITCHES} <= {*keys}
    assert not any(is_fixed(key) for key in SWITCHES)


# Values of keys that may change what a checkpoint holds, and keys that they go with.
VALUES_BY_KEY: dict[str, list[str]] = {
    "optim.decay": ["all", "matrices"],
    "optim.l2_sp": ["0", "0.1", "0.2"],
    "optim.weight_decay": ["0", "0.1"],
    "optim.grad_clip": ["1", "2"],
    "data.replay_ratio": ["0", "0.25", "0.5"],
    "optim.gradient_projection": ["false", "true"],
    "data.length": ["96", "160"],
    "data.caption_dropout": ["0", "0.2"],
    "distil.weight": ["0", "0.5"],
    "loss.text_weight": ["1", "0.5"],
    "loss.z": ["0", "1e-4"],
    "trainer.precision": ["32-true", "bf16-mixed"],
    "trainer.activation_checkpointing": ["false", "true"],
    "trainer.packing": ["false", "true"],
}
TOGETHER = {"optim.gradient_projection": ["data.replay_ratio=0.5"]}
TOKENIZER_VALUES = {
    "image_tokenizer.model.patch": ["2", "4"],
    "image_tokenizer.model.layers_per_block": ["1", "2"],
    "image_tokenizer.model.latent_channels": ["4", "8"],
    "image_tokenizer.model.codes": ["16", "32"],
    "image_tokenizer.model.code_dim": ["4", "8"],
    "image_tokenizer.edge_weight": ["0", "1"],
    "optim.decay": ["all", "matrices"],
}


def form(module: Any) -> Any:
    """What must not change within a run: shapes of weights, sizes of groups, and what the loss is split by."""
    groups = module.configure_optimizers()["optimizer"].param_groups
    shapes = {name: value.shape for name, value in module.state_dict().items()}
    return shapes, [len(group["params"]) for group in groups], getattr(module, "modalities", ())


@pytest.mark.parametrize("key", VALUES_BY_KEY)
def test_a_change_of_a_language_model_is_refused_where_its_state_has_another_form(key: str, tiny: list[str]) -> None:
    more = [*tiny, "data.replay_path=text.txt", *TOGETHER.get(key, [])]
    configs = [load_experiment(PRETRAINED, "demo", [*more, f"{key}={value}"]) for value in VALUES_BY_KEY[key]]
    assert_refused_where_forms_differ(key, configs, [form(build_model(config).module) for config in configs])


@pytest.mark.parametrize("key", TOKENIZER_VALUES)
def test_a_change_of_an_image_tokenizer_is_refused_where_its_state_has_another_form(key: str) -> None:
    experiment, small = EXPERIMENTS / "image_tokenizer.yaml", "image_tokenizer.model.block_out_channels=[16,16]"
    configs = [load_experiment(experiment, "demo", [small, f"{key}={value}"]) for value in TOKENIZER_VALUES[key]]
    forms = [form(ImageTokenizerModule(PatchedVQ(config.image_tokenizer.model), config)) for config in configs]
    assert_refused_where_forms_differ(key, configs, forms)


def assert_refused_where_forms_differ(key: str, configs: list[ExperimentConfig], forms: list[Any]) -> None:
    for before, now in combinations(range(len(configs)), 2):
        is_refused = cannot_change(key, configs[before].value(key), configs[now].value(key))
        assert is_refused == (forms[before] != forms[now])


def test_a_switch_is_refused_by_name_though_it_is_allowed(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = without_newest(pretrained, tmp_path)
    before = contents(run)
    for key, value in (("optim.l2_sp", "0.1"), ("data.replay_ratio", "0.25")):
        allow = ["data.replay_path=text.txt", "--allow-mismatch", "data.replay_path", "--allow-mismatch", key]
        assert main([PRETRAINED, "--resume", str(run), f"{key}={value}", *allow]) == 2
        error = capsys.readouterr().err.strip()
        assert f"{key}={value} differs from the run's config.yaml (0.0); start a new run instead" in error
        assert "--allow-mismatch" not in error
    assert contents(run) == before


def test_a_tokenizer_of_other_codes_is_refused_though_its_hash_is_allowed(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = without_newest(pretrained, tmp_path)
    other = tmp_path / "vq"
    save_tokenizer(PatchedVQ(VQModelConfig(block_out_channels=[16, 16], codes=16)), other, torch.float32)
    write(run, "image_tokenizer.path", str(other))
    before = contents(run)
    hashes = ("data_hash", "tokenizers.image", "configs.image_tokenizer")
    allow = [word for name in hashes for word in ("--allow-mismatch", name)]
    assert main([PRETRAINED, "--resume", str(run), *allow]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{', '.join(hashes)} cannot change so within a run: decoder.output.image has the shape [" in error
    assert contents(run) == before


def test_a_run_records_what_it_is_and_goes_on_at_an_allowed_rate(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = checkpoints(pretrained.folder / CHECKPOINTS)[-1]
    record, state = read_record(newest)
    assert state["metrics_digest"]
    environment = pretrained.environment
    assert record[VALUES] == flatten_mapping(pretrained.config)
    for name in ("data_hash", "tokenizers", "backbone", "numerics"):
        assert record[name] == environment[name]
    run = without_newest(pretrained, tmp_path)
    rate = pretrained.config["optim"]["lr"]
    write(run, "optim.lr", rate / 10)
    before = contents(run)
    assert main([PRETRAINED, "--resume", str(run)]) == 2
    assert f"optim.lr is {rate} in step-00000006.ckpt, now {rate / 10}" in capsys.readouterr().err
    assert contents(run) == before
    write(run, "optim.lr", rate)
    assert main([PRETRAINED, "--resume", str(run), f"optim.lr={rate / 10}", "--allow-mismatch", "optim.lr"]) == 0
    resumed = read_run(run)
    assert resumed.config["optim"]["lr"] == pytest.approx(rate / 10)
    assert resumed.environment["changes"][0]["key"] == "optim.lr"
    last, first = resumed.metrics[-1], pretrained.metrics[-1]
    assert last["step"] == first["step"] == 8
    assert last["lr"] == pytest.approx(first["lr"] / 10)
    assert step_of(checkpoints(run / CHECKPOINTS)[-1]) == 8


def test_what_may_differ_is_named_exactly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PRETRAINED, "--allow-mismatch", "optim.lr"]) == 2
    assert "--allow-mismatch optim.lr: is for --resume" in capsys.readouterr().err
    for key in ("optim.lrr", "seed"):
        assert main([PRETRAINED, "--resume", "latest", "--allow-mismatch", key]) == 2
        assert f"--allow-mismatch {key}: expected a key that may change within a run" in capsys.readouterr().err
