"""Number format and compilation in the protocol card, in the identity of parts, and in the title."""

import json
from pathlib import Path

import pytest

from t2i_lm.evaluate import main, parser
from t2i_lm.evaluation.session import default_name
from t2i_lm.generation import images
from t2i_lm.storage.run_folder import Run
from tests.marks import needs_compiler
from tests.runs import coco_result


@pytest.fixture
def command(evaluate_command: list[str]) -> list[str]:
    return evaluate_command


def test_the_last_fid_of_a_run_equals_its_evaluation(measured: Run, command: list[str], tmp_path: Path) -> None:
    last = json.loads((measured.folder / "fid" / "step-00000008.json").read_text())
    same = ["--prompts", "5", "--part", "5", "--seed", str(last["card"]["seed"]), "--no-floor"]
    assert main([*command, *same, "--out", str(tmp_path / "out")]) == 0
    found = coco_result(tmp_path / "out")
    for name in ("fid", "kid", "kid_std"):
        assert found[name] == pytest.approx(last[name], rel=1e-6)
    differ = {key for key in found["card"] if found["card"][key] != last["card"][key]}
    assert differ == {"reference_sha256"}


def test_bfloat16_weights_are_in_the_card_and_another_evaluation(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--no-floor", "--out", str(tmp_path / "out")]
    assert main([*command, "--bf16", *out]) == 0
    assert coco_result(tmp_path / "out")["card"]["weights"] == "bfloat16"
    assert "weights='bfloat16' (not 'float32')" in coco_result(tmp_path / "out")["differs"]
    assert main([*command, *out]) == 2
    assert "weights='bfloat16', now 'float32'" in capsys.readouterr().err
    assert main([*command, "--bf16", "--canonical", "--out", str(tmp_path / "canonical")]) == 2
    assert "weights='bfloat16' (not 'float32')" in capsys.readouterr().err
    assert main([*command, "--bf16", "--forgetting", "asset:text/novels.txt.gz", *out]) == 2
    assert "--bf16 rounds the weights" in capsys.readouterr().err


@needs_compiler
def test_compiled_sampling_is_in_the_card_and_another_evaluation(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "CPU_COMPILE_PRODUCTS", 0)  # else too few images to compile for
    out = ["--prompts", "2", "--no-floor", "--out", str(tmp_path / "out")]
    assert main([*command, "--compile", *out]) == 0
    assert coco_result(tmp_path / "out")["card"]["compiled"] is True
    assert "compiled=True (not False)" in coco_result(tmp_path / "out")["differs"]
    assert main([*command, *out]) == 2
    assert "compiled=True, now None" in capsys.readouterr().err
    names = {default_name(parser().parse_args([*command, *more]), Path("a.ckpt")) for more in ([], ["--compile"])}
    assert names == {"a-10-seed0", "a-10-seed0-compiled"}
