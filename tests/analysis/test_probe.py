"""`python -m t2i_lm.probe` on trained runs: what it writes, what it refuses."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_lm.analysis.base import NotAvailableError, open_runs
from t2i_lm.analysis.similarity import weight_distances
from t2i_lm.analysis.states import layer_states, positions_of, require_same_sequences
from t2i_lm.analysis.suite import PROBES
from t2i_lm.data.shards.format import INDEX, STREAM
from t2i_lm.plots.panels import MARKERS
from t2i_lm.probe import NAMES, main
from t2i_lm.reporting.probes import find_probes
from t2i_lm.reporting.search import RunSearch
from t2i_lm.storage.run_folder import CONFIG_DIGEST, ENVIRONMENT, ENVIRONMENT_DIGEST, REPORT, Run
from t2i_lm.storage.sealed import DIGEST, sealed
from t2i_lm.training.resumption import config_entry
from tests.runs import EXPERIMENTS, QUICK, train, weights

SMALL = ("--sequences", "6", "--batches", "2")


def read(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def copied(run: Run, root: Path) -> Path:
    folder = root / run.name / run.folder.name
    shutil.copytree(run.folder, folder)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a command that fails."""
    assert main([*SMALL, *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert not said.out
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    return line


def test_names_of_the_command_are_those_of_the_probes() -> None:
    assert tuple(PROBES) == NAMES


def test_two_runs_have_figures_sentences_and_numbers_with_their_origin(
    pretrained: Run, scratch: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    folders = [copied(pretrained, root), copied(scratch, root)]
    assert main([*map(str, folders), "--out", str(tmp_path), *SMALL]) == 0
    printed = capsys.readouterr().out
    for name in NAMES:
        content = read(tmp_path, name)
        assert f"{name}: {content['sentence']}\n" in printed
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.pdf").is_file()
        assert content["runs"]["pretrained"]["step"] == content["runs"]["scratch"]["step"] == 8
        assert content["runs"]["scratch"]["data_hash"] == scratch.environment["data_hash"]
        assert content["runs"]["scratch"]["git"] == scratch.environment["git"]
        assert pretrained.environment["data_hash"] in content["caption"]
        assert read(folders[0] / "probes" / folders[1].name, name) == content
    found, notes = find_probes(RunSearch(root).figure_pool().runs, [])
    assert found is not None
    assert not notes
    assert [block.name for block in found.figures] == [f"probe {name}" for name in NAMES]
    tokens = read(tmp_path, "tokens")["numbers"]
    assert tokens["rows"] == tokens["rows_of_split"] == 60
    assert tokens["image"]["tokens"] == 60 * 64
    assert tokens["meaning"]["ground"]["cells"] + tokens["meaning"]["kind"]["cells"] == 60 * 64
    assert 0 <= tokens["meaning"]["kind"]["explained"] <= 1
    rows = read(tmp_path, "rows")["numbers"]["pretrained"]["steps"]
    assert list(rows) == ["0", "6", "8"]
    state = weights(pretrained)["decoder.output.image"]
    assert rows["8"]["output"]["image"]["mean_norm"] == pytest.approx(state.norm(dim=1).mean().item(), rel=1e-5)
    similarity = read(tmp_path, "similarity")["numbers"]
    assert similarity["sequences"] == 6
    assert set(similarity["cka"]) == {
        "pretrained: initial and trained",
        "scratch: initial and trained",
        "pretrained and scratch: trained",
        "pretrained and scratch: initial",
    }
    # New image rows are the same in both arms.
    assert similarity["cka"]["pretrained and scratch: initial"]["image"][0]["value"] == pytest.approx(1, abs=1e-6)
    attention = read(tmp_path, "attention")["numbers"]["runs"]["scratch"]["trained"]
    assert [len(heads) for heads in attention["image"]] == [2, 2]
    assert all(0 < head["value"] < 1 for heads in attention["caption_share"] for head in heads)
    gradients = read(tmp_path, "gradients")["numbers"]
    assert gradients["batches"] == 2
    assert -1 <= gradients["runs"]["scratch"]["trained"]["all"]["cosine"]["value"] <= 1


def test_states_and_weight_distances_are_those_of_the_model(pretrained: Run) -> None:
    (one,) = open_runs([pretrained.folder])
    initial, trained = one.model("initial"), one.model("trained")
    ids_ST = one.sequences(trained.layout, 5, "val/iid")
    states = layer_states(trained.decoder, ids_ST, positions_of(ids_ST, trained), lambda count: None)
    with torch.no_grad():
        embedded_STD = trained.decoder.tok_embeddings(ids_ST)
        last_STD = trained.decoder.hidden(ids_ST)
        is_image_ST = ids_ST >= trained.layout.vocab.image_offset
        assert torch.equal(states["image"][0], embedded_STD[is_image_ST])
        assert torch.allclose(trained.decoder.norm(states["image"][-1]), last_STD[is_image_ST], atol=1e-5)
    assert len(states["text"]) == 3
    before = {name: value.clone() for name, value in initial.decoder.named_parameters()}
    found = weight_distances(initial.decoder, trained.decoder)
    after = dict(trained.decoder.named_parameters())
    names = ["layers.0.attention.in_proj.weight", "layers.0.attention.out_proj.weight"]
    moved = torch.cat([(after[name] - before[name]).flatten() for name in names]).norm()
    start = torch.cat([before[name].flatten() for name in names]).norm()
    assert found["layer 1.attention"]["distance"] == pytest.approx((moved / start).item(), rel=1e-4)
    assert found["embedding.image"]["parameters"] == before["tok_embeddings.image"].numel()


def test_images_without_captions_have_no_text_and_no_agreement_of_gradients(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = str(EXPERIMENTS / "uncond_pretrained.yaml")
    run = train(experiment, tmp_path / "runs", *tiny, *QUICK, "trainer.max_steps=4")
    capsys.readouterr()
    assert main([str(run.folder), "--out", str(tmp_path / "out"), *SMALL]) == 0
    said = capsys.readouterr()
    assert "note: gradients is left out: there are no text targets" in said.err
    assert "gradients" not in said.out
    assert set(read(tmp_path / "out", "similarity")["numbers"]["positions"]) == {"image"}
    assert set(read(tmp_path / "out", "attention")["numbers"]["uniform"]) == {"image"}
    assert "gradients: there are no text targets" in refused(capsys, run.folder, "--only", "gradients")


def test_runs_of_one_arm_have_names_of_their_own(pretrained: Run, tmp_path: Path) -> None:
    one, two = open_runs([pretrained.folder, copied(pretrained, tmp_path / "other")])
    assert one.label != two.label
    assert (one.look.marker, two.look.marker) == (MARKERS[0], MARKERS[1])
    assert one.look.color != two.look.color


def unfinished(folder: Path) -> None:
    (folder / REPORT).unlink()


def without_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def of_other_data(folder: Path) -> None:
    change_environment(folder, data_hash="0123456789abcdef")


def of_another_backbone(folder: Path) -> None:
    change_environment(folder, backbone={"model.safetensors": "0" * 64})


def of_another_task(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("task: text_to_image", "task: align"))
    change_environment(folder, **{CONFIG_DIGEST: config_entry(folder)})


def without_cache(folder: Path) -> None:
    config = folder / "config.yaml"
    config.write_text(re.sub("cache_dir: .*", f"cache_dir: {folder}/gone", config.read_text()))


def change_environment(folder: Path, **values: Any) -> None:
    """Changes entries as a run with other data would have written them, its report included."""
    environment = sealed(json.loads((folder / ENVIRONMENT).read_text()) | values)
    (folder / ENVIRONMENT).write_text(json.dumps(environment))
    report = json.loads((folder / REPORT).read_text())
    (folder / REPORT).write_text(json.dumps(sealed(report | {ENVIRONMENT_DIGEST: environment[DIGEST]})))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (unfinished, r"is unfinished \(step 8 of 8\)"),
        (without_checkpoint, "has no intact checkpoint"),
        (of_another_backbone, "its weights have changed since"),
        (of_another_task, "is a run of task=align; expected text_to_image"),
    ],
)
def test_a_run_that_cannot_be_probed_is_one_line(
    damage: Callable[[Path], None],
    words: str,
    pretrained: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copied(pretrained, tmp_path)
    damage(folder)
    line = refused(capsys, folder, "--only", "rows", "--out", tmp_path / "out")
    assert re.search(words, line), line
    assert not (tmp_path / "out").exists()


def test_without_its_shards_only_the_rows_of_a_run_are_probed(
    pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(pretrained, tmp_path)
    without_cache(folder)
    assert main([str(folder), "--out", str(tmp_path / "out"), *SMALL]) == 0
    said = capsys.readouterr()
    assert {file.stem for file in (tmp_path / "out").iterdir()} == {"rows"}
    for name in set(NAMES) - {"rows"}:
        assert re.search(f"note: {name} is left out: .* has no token shards of its data", said.err)
    of_other_data(folder)
    line = refused(capsys, folder, "--only", "tokens")
    assert re.search(
        r"tokens: .*data\.cache_dir=.* has no token shards of its data \(data hash 0123456789abcdef\)", line
    )


def test_shards_of_a_folder_are_read_in_place_and_streamed_rows_are_not_available(
    pretrained: Run, tmp_path: Path
) -> None:
    (one,) = open_runs([pretrained.folder])
    place, data = tmp_path / "prepared", replace(one.config.data, source="shards", train_size=None, val_size=None)
    shutil.copytree(one.shards, place)
    data = replace(data, path=str(place), cache_dir=str(tmp_path / "cache"))
    stored = replace(one, config=replace(one.config, data=data))
    assert stored.shards == place
    assert len(stored.split("train")) == len(one.split("train"))
    index = json.loads((place / INDEX).read_text()) | {STREAM: {"urls": []}}
    (place / INDEX).write_text(json.dumps(sealed(index)))
    assert stored.held_out == one.held_out
    assert len(stored.split(stored.held_out)) == len(one.split(one.held_out))
    with pytest.raises(NotAvailableError, match=r"training rows were made while training \(data\.source=hub_stream\)"):
        stored.split("train")
    shutil.rmtree(place)
    with pytest.raises(NotAvailableError, match=rf"data\.path={place} has no token shards .*; restore them"):
        _ = replace(stored).shards


def test_runs_that_cannot_be_compared_are_one_line(
    pretrained: Run, scratch: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(scratch, tmp_path)
    of_other_data(folder)
    line = refused(capsys, pretrained.folder, folder)
    assert "differ in more than what is compared: data hash: pretrained" in line
    assert "scratch 0123456789abcdef" in line
    assert "is given twice" in refused(capsys, folder, folder)
    assert "--sequences 1: expected at least 2" in refused(capsys, folder, "--sequences", 1, "--only", "tokens")


def test_a_missing_shard_is_named(pretrained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = open_runs([pretrained.folder])
    cache = tmp_path / "cache"
    shutil.copytree(one.shards, cache / one.shards.name)
    folder = copied(pretrained, tmp_path)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(one.shards.parent), str(cache)))
    next((cache / one.shards.name / "train").rglob("*.arrow")).unlink()
    assert "is missing; delete" in refused(capsys, folder, "--only", "tokens")


def test_runs_that_pad_otherwise_have_equal_sequences_and_others_are_named(pretrained: Run, tmp_path: Path) -> None:
    (one,) = open_runs([copied(pretrained, tmp_path)], ())
    layout = one.model("trained").layout
    padded = replace(one, config=replace(one.config, data=replace(one.config.data, pad_to_multiple_of=7)))
    found = [run.sequences(layout, 3, run.held_out) for run in (one, padded)]
    require_same_sequences(found)
    with pytest.raises(NotAvailableError, match="the runs have other held-out sequences"):
        require_same_sequences([found[0], found[0] + 1])
