"""Images from a finished run through the command line."""

import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_lm.experiment.restore import load_trained
from t2i_lm.generation.images import caption_prompts, generate_codes, numerics, prepare_generation
from t2i_lm.models.float8 import use_float8
from t2i_lm.sample import main, parser
from t2i_lm.storage.run_folder import ENVIRONMENT, Run
from t2i_lm.storage.sealed import sealed
from tests.runs import PROMPT


@pytest.fixture
def run(guided: Run) -> Path:
    return guided.folder


def pixels(path: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("more", [[], ["--bf16"]])
def test_images_and_a_grid_are_written_and_do_not_depend_on_their_batch(
    more: list[str], run: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue star\n\ntwo green squares\n")
    both = ["--checkpoint", str(run.parent), PROMPT, "--prompts", str(prompts), "--out", str(tmp_path / "both"), *more]
    assert main(both) == 0
    files = sorted(path.name for path in (tmp_path / "both").iterdir())
    assert files == [
        "000-a-red-circle-on-a-white-background.png",
        "001-a-blue-star.png",
        "002-two-green-squares.png",
        "grid.png",
    ]
    assert pixels(tmp_path / "both" / files[0]).shape == (64, 64, 3)
    assert main(["--checkpoint", str(run), PROMPT, "--out", str(tmp_path / "one"), *more]) == 0
    assert (pixels(tmp_path / "one" / files[0]) == pixels(tmp_path / "both" / files[0])).all()
    assert main(["--checkpoint", str(run), PROMPT, "--seed", "1", "--out", str(tmp_path / "other"), *more]) == 0
    assert (pixels(tmp_path / "other" / files[0]) != pixels(tmp_path / "both" / files[0])).any()


def test_rounded_weights_sample_nearly_the_same_codes(run: Path) -> None:
    float32, bfloat16 = load_trained(run), load_trained(run)
    prepare_generation(bfloat16, bf16=True, compiled=False, images=8)
    plain = {"compiled": False, "fp8": False}
    assert (numerics(float32), numerics(bfloat16)) == (
        {"weights": "float32"} | plain,
        {"weights": "bfloat16"} | plain,
    )
    codes = [generate_codes(model, caption_prompts(model, [PROMPT] * 8), range(8)) for model in (float32, bfloat16)]
    assert (codes[0][:, 0] == codes[1][:, 0]).float().mean() >= 0.75  # where a code differs, so do those that follow
    buffer = bfloat16.module.decoder.get_buffer("rotary_cos")
    assert buffer.dtype == torch.float32


def test_numerics_are_those_of_the_current_model(run: Path) -> None:
    model = load_trained(run)
    decoder = model.module.decoder
    decoder.layers[0].feed_forward.w3.bfloat16()
    assert numerics(model) == {"weights": "bfloat16+float32", "compiled": False, "fp8": False}
    decoder.compile_steps()  # compiles at its first call
    assert numerics(model) == {"weights": "bfloat16+float32", "compiled": True, "fp8": False}


def test_numerics_name_float8(run: Path) -> None:
    pytest.importorskip("torchao")
    model = load_trained(run)
    use_float8(model.module.decoder, emulate=True)
    assert numerics(model) == {"weights": "float32", "compiled": False, "fp8": True}


def test_by_default_a_new_folder_of_the_run_is_written(
    guided: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(guided.folder, tmp_path / "run")
    monkeypatch.setattr(time, "strftime", lambda *_: "20260301-120000")
    for _ in range(2):  # in one second
        assert main(["--checkpoint", str(run), PROMPT, "--each", "2", "--cfg", "2", "--temperature", "0.5"]) == 0
    out = capsys.readouterr()
    assert "note:" not in out.err
    written = [Path(line) for line in out.out.splitlines() if line.endswith(".png")]
    assert all(path.is_file() for path in written)
    folders = [run / "drawn" / name for name in ("20260301-120000", "20260301-120000-1")]
    assert [path.parent for path in written] == [folders[0]] * 3 + [folders[1]] * 3
    assert main(["--checkpoint", str(run), "xyzzy" * 500]) == 2
    assert sorted((run / "drawn").iterdir()) == folders, "after an error none is left"


def test_a_run_whose_tokenizer_changed_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = json.loads((run / ENVIRONMENT).read_text())
    changed = tmp_path / "run"
    changed.mkdir()
    shutil.copy(run / "config.yaml", changed)
    (changed / "checkpoints").symlink_to(run / "checkpoints")
    environment["tokenizers"]["image"] = "0" * 64
    (changed / ENVIRONMENT).write_text(json.dumps(sealed(environment)))
    assert main(["--checkpoint", str(changed), PROMPT, "--out", str(tmp_path / "x")]) == 2
    assert "image_tokenizer.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt: expected one"),
        (["  "], "a prompt is empty"),
        (["word " * 200], "at most 42 fit"),
        ([PROMPT, "--prompts", "absent.txt"], "no such file"),
        ([PROMPT, "--each", "0"], "--each 0"),
        ([PROMPT, "--top-p", "2"], "top_p=2.0"),
        ([PROMPT, "--cfg", "-1"], "guidance=-1.0"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(
    arguments: list[str], message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(run), *arguments, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("there", [False, True])
def test_an_error_while_images_are_written_leaves_none(
    there: bool, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(name: str) -> Path:
        out = tmp_path / name / "drawn"
        out.parent.mkdir()
        if there:
            out.mkdir()
        code = main(["--checkpoint", str(run), PROMPT, "--each", "3", "--out", str(out)])
        assert code == (0 if name == "whole" else 2)
        return out

    *images, grid = (path.stat().st_size for path in sorted(write("whole").iterdir()))
    assert len(images) == 3
    assert max(images) < grid
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(images), hard))  # the grid does not go onto the disk
    try:
        failed = write("failed")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in capsys.readouterr().err
    assert sorted(failed.parent.rglob("*")) == ([failed] if there else [])


def test_folders_that_hold_no_run_or_would_be_overwritten_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tmp_path), PROMPT]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert main(["--checkpoint", str(run), PROMPT, "--out", str(run)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert "example:" in parser().format_help()
