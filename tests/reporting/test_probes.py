"""Probes on the page: records of the runs as they are, all others named."""

import json
from pathlib import Path
from typing import Any

import pytest

from t2i_lm.reporting.probes import find_probes
from t2i_lm.reporting.search import RunSearch
from tests.plots.synthetic_runs import write_probe, write_run


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Path]:
    names = {"pretrained": "t2i_pretrained", "scratch": "t2i_scratch"}
    return {arm: write_run(tmp_path / "runs", name) for arm, name in names.items()}


def probes_of(root: Path) -> Any:
    return find_probes(RunSearch(root).figure_pool().runs, [])


def test_the_probes_of_a_pair_have_figures_sentences_and_their_command(pair: dict[str, Path], tmp_path: Path) -> None:
    for name in ("gradients", "tokens"):
        write_probe(pair, name)
    found, notes = probes_of(tmp_path / "runs")
    assert not notes
    assert [block.name for block in found.figures] == ["probe tokens", "probe gradients"]
    assert found.sentences == ["tokens found (n = 7).", "gradients found (n = 7)."]
    assert found.figures[0].caption.startswith("7 sequences. All numbers: ")
    runs = " ".join(map(str, pair.values()))
    assert found.command == f"python -m t2i_lm.probe {runs} --sequences=64 --batches=8"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"step": 200}, "of another checkpoint: step 200 of "),
        ({"data_hash": "f" * 16}, "of another data version: data hash ffffffffffffffff, that of "),
        ({"seed": 3}, "of another run: seed 3, that of "),
        ({"checkpoint_sha256": "2" * 64}, "step-00000300.ckpt has changed since"),
        ({"run": "runs/t2i_scratch/other"}, "runs/t2i_scratch/other is not among the finished runs"),
    ],
)
def test_a_probe_of_what_a_run_no_longer_is_is_named_and_not_shown(
    changed: dict[str, Any], words: str, pair: dict[str, Path], tmp_path: Path
) -> None:
    for run in pair.values():
        (run / "checkpoints").mkdir()
        (run / "checkpoints" / "step-00000300.ckpt.sha256").write_text("1" * 64 + "  step-00000300.ckpt\n")
    write_probe(pair, "tokens")
    other = write_probe(pair, "rows", **changed)
    found, notes = probes_of(tmp_path / "runs")
    assert [block.name for block in found.figures] == ["probe tokens"]
    (note,) = notes
    assert note.startswith(f"left out: {other}: ")
    assert words in note


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"runs": 3}', '{"runs": {"a": {"run": "x"}}}', "\xff"])
def test_a_damaged_record_is_named(content: str, pair: dict[str, Path], tmp_path: Path) -> None:
    file = write_probe(pair, "tokens")
    file.write_bytes(content.encode("latin1"))
    found, notes = probes_of(tmp_path / "runs")
    assert found is None
    assert len(notes) == 1
    assert str(file) in notes[0]


@pytest.mark.parametrize("key", ["title", "sentence", "caption", "made_with", "settings", "varied", "runs"])
def test_a_record_without_a_key_is_named(key: str, pair: dict[str, Path], tmp_path: Path) -> None:
    file = write_probe(pair, "tokens")
    content = json.loads(file.read_text())
    content[key] = 3
    changed = {name: value for name, value in content.items() if name != key}
    for damaged in (content, changed):
        file.write_text(json.dumps(damaged))
        found, (note,) = probes_of(tmp_path / "runs")
        assert found is None
        assert note.startswith(f"left out, unreadable: {file}: ")


def test_probes_of_other_runs_are_named_and_those_of_the_pair_shown(pair: dict[str, Path], tmp_path: Path) -> None:
    alone = [write_probe({"scratch": pair["scratch"]}, name) for name in ("rows", "tokens")]
    write_probe(pair, "tokens")
    pool = RunSearch(tmp_path / "runs").figure_pool().runs
    found, notes = find_probes(pool, pool)
    assert found is not None
    assert [len(block.arms) for block in found.figures] == [2]
    assert notes == [f"probes of other runs, not shown: {alone[0]}, {alone[1]}"]


def test_a_figure_that_cannot_be_read_is_named(pair: dict[str, Path], tmp_path: Path) -> None:
    write_probe(pair, "rows")
    file = write_probe(pair, "tokens").with_suffix(".png")
    file.write_bytes(file.read_bytes()[:40])
    found, notes = probes_of(tmp_path / "runs")
    assert [block.name for block in found.figures] == ["probe rows"]
    assert len(notes) == 1
    assert "unreadable" in notes[0]
    assert json.loads(file.with_suffix(".json").read_text())
