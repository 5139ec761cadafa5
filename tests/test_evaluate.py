"""The evaluate command: equal to torch-fidelity, on one rank, on two, and after a kill."""

import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_lm.evaluate import main, parser
from t2i_lm.evaluation.base import FINISHED
from t2i_lm.storage.resumable import ResumableParts
from t2i_lm.storage.run_folder import ENVIRONMENT, Run
from t2i_lm.storage.sealed import DIGEST, sealed
from tests.callbacks.toy_run import finish, server
from tests.data.coco_folder import CAPTION, write_coco
from tests.runs import Forked, coco_result, losses
from tests.two_ranks import environments

# More images than features, so that covariances have full rank; of the network's last layer: FID_PICTURES=2500.
IMAGES = int(os.environ.get("FID_PICTURES", "72"))
WIDTH = 64 if IMAGES < 2049 else 2048


@pytest.fixture
def run(measured: Run) -> Path:
    return measured.folder


@pytest.fixture
def command(evaluate_command: list[str]) -> list[str]:
    return evaluate_command


@pytest.fixture(scope="module")
def unbroken(evaluate_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    assert main([*evaluate_command, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["coco.json", "drawn", "grid.png", "reconstructed"]
    return coco_result(out)


def test_a_run_measures_itself_and_keeps_the_network_out_of_its_checkpoints(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {line["step"]: line["fid"] for line in lines if "fid" in line}
    assert list(measured) == [4, 8]
    for step, found in measured.items():
        assert found["fid"] > 0
        assert found["title"] == "FID, n=5, not COCO FID-30k"
        written = json.loads((run / "fid" / f"step-{step:08d}.json").read_text())
        assert written["card"]["features"] == 64
        assert {key: written[key] for key in found} == found
    state = torch.load(next((run / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert all(key.startswith("decoder.") for key in state["state_dict"])
    assert not any("FID" in name for name in state["callbacks"])


def test_measuring_does_not_change_the_run(run: Path, pretrained: Run) -> None:
    def all_losses(folder: Path) -> list[Any]:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [losses(line) for line in lines if losses(line)]

    assert all_losses(pretrained.folder) == all_losses(run)


def test_the_result_has_its_card_and_not_the_headline_title(unbroken: dict[str, Any]) -> None:
    assert unbroken["title"] == "FID, n=10, not COCO FID-30k"
    assert "prompts=10 (not 30000)" in unbroken["differs"]
    card = unbroken["card"]
    assert (card["weights"], card["compiled"], card["fp8"]) == ("float32", False, False)
    assert (card["resizer"], card["antialias"], card["size"], card["native_size"]) == ("lanczos", False, 256, 64)
    assert len(card["prompt_ids"]) == 10
    assert len(card["reference_sha256"]) == 64
    floor = unbroken["floor"]
    assert floor["title"] == "FID of reconstructed images, n=10"
    assert floor["card"]["prompt_ids"] == card["prompt_ids"]


def test_the_size_of_parts_does_not_change_the_result(
    command: list[str], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    assert main([*command, "--part", "10", "--no-floor", "--out", str(tmp_path / "out")]) == 0
    assert coco_result(tmp_path / "out")["fid"] == pytest.approx(unbroken["fid"], rel=1e-6)
    assert "floor" not in coco_result(tmp_path / "out")


def in_process(arguments: list[str], environment: dict[str, str], parts_until_kill: int) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    if parts_until_kill:
        write = ResumableParts.write
        left = parts_until_kill

        def killed(self: ResumableParts, number: int, tensors: dict[str, Any]) -> None:
            nonlocal left
            if left == 0:
                self.path(number).with_suffix(".1.tmp").write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            write(self, number, tensors)

        ResumableParts.write = killed  # type: ignore[method-assign]
    os._exit(main(arguments))


def on_two_ranks(arguments: list[str]) -> None:
    """Runs the command as two processes, which must both succeed."""
    ranks = [server.Process(target=in_process, args=(arguments, environment, 0)) for environment in environments()]
    for process in ranks:
        process.start()
    assert finish(*ranks) == [0, 0]


def test_an_interrupted_evaluation_gives_the_result_of_an_unbroken_one(
    command: list[str], unbroken: dict[str, Any], tmp_path: Path
) -> None:
    arguments = [*command, "--out", str(tmp_path / "out")]
    process = server.Process(target=in_process, args=(arguments, {}, 6))
    process.start()
    assert finish(process) == [-signal.SIGKILL]
    assert not (tmp_path / "out" / "coco.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.safetensors")}
    assert len(before) == 6
    assert main(arguments) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    resumed = coco_result(tmp_path / "out")
    for part in (resumed, unbroken):
        part |= dict.fromkeys(("environment", FINISHED, DIGEST))  # which say when
    assert resumed == unbroken


def test_two_ranks_give_the_result_of_one(command: list[str], unbroken: dict[str, Any], tmp_path: Path) -> None:
    on_two_ranks([*command, "--out", str(tmp_path / "out")])
    two = coco_result(tmp_path / "out")
    for name in ("fid", "kid"):
        assert two[name] == pytest.approx(unbroken[name], rel=1e-6)
        assert two["floor"][name] == pytest.approx(unbroken["floor"][name], rel=1e-6)


@pytest.mark.timeout(600 if WIDTH == 64 else 4 * 3600)
def test_the_result_equals_torch_fidelity_on_the_same_folders(
    run: Path, inception_weights: Path, tmp_path: Path
) -> None:
    """Its own command; references of 256 pixels pass the crop and resize unchanged."""
    coco = write_coco(tmp_path / "coco", IMAGES, 256, 256)
    drawn = tmp_path / "out" / "pictures"
    given = {"checkpoint": run, "coco": coco, "weights": inception_weights, "features": WIDTH, "prompts": IMAGES}
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    rest = ["--no-floor", "--images", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    assert main([*words, *rest]) == 0
    assert len(list(drawn.iterdir())) == IMAGES
    assert np.asarray(Image.open(next(drawn.iterdir()))).shape == (256, 256, 3)
    theirs = ["--fid", "--kid", "--cpu", "--json", "--silent", "--save-cpu-ram"]
    theirs += ["--input1", str(drawn), "--input2", str(coco / "val2014"), "--kid-subset-size"]
    theirs += [str(min(IMAGES, 1000))]
    theirs += ["--feature-extractor-weights-path", str(inception_weights)]
    theirs += ["--feature-layer-fid", str(WIDTH), "--feature-layer-kid", str(WIDTH)]
    process = Forked("torch_fidelity.fidelity", *theirs)
    output, _ = process.communicate(timeout=500 if WIDTH == 64 else 4 * 3600)
    assert process.returncode == 0, output
    found = json.loads(output[output.index("{") : output.rindex("}") + 1])
    ours = coco_result(tmp_path / "out")
    assert ours["fid"] == pytest.approx(found["frechet_inception_distance"], rel=1e-3)
    assert ours["kid"] == pytest.approx(found["kernel_inception_distance_mean"], rel=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--coco", "absent"], "found no"),
        (["--weights", "absent.pth"], "--weights absent.pth: no such file"),
        (["--weights-sha256", "00" * 32], "expected 0000"),
        (["--prompts", "15"], "has captions of 14 images"),
        (["--prompts", "1"], "--prompts 1: expected at least 2"),
        (["--features", "65"], "--features 65"),
        (["--cfg", "-1"], "guidance=-1.0"),
        (["--canonical"], "this is not COCO FID-30k: prompts=10"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(
    more: list[str], message: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *more, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_captions_that_are_too_long_are_cut_as_in_training_and_counted(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coco = write_coco(tmp_path / "coco", 4)
    content = json.loads((coco / CAPTION).read_text())

    def measured(words: int, out: Path) -> dict[str, Any]:
        content["annotations"][0]["caption"] = content["annotations"][1]["caption"] = "word " * words
        (coco / CAPTION).write_text(json.dumps(content))
        assert main([*command, "--coco", str(coco), "--prompts", "4", "--out", str(out)]) == 0
        return coco_result(out)

    cut = measured(200, tmp_path / "cut")
    assert "1 of 4 captions are cut to the 42 ids that data.length=112 leaves" in capsys.readouterr().err
    assert cut["card"]["prompts_cut"] == 1
    assert "prompts_cut=1 (not 0)" in cut["differs"]
    assert cut["floor"]["card"]["prompts_cut"] == 0  # reconstructions need no caption
    longer = measured(300, tmp_path / "longer")  # equal after the cut
    assert (longer["fid"], longer["kid"]) == (cut["fid"], cut["kid"])
    capsys.readouterr()
    out = tmp_path / "canonical"
    assert main([*command, "--coco", str(coco), "--prompts", "4", "--canonical", "--out", str(out)]) == 2
    assert "prompts_cut=1 (not 0)" in capsys.readouterr().err
    assert not out.exists()


def test_other_tokenizers_and_other_evaluations_are_refused(
    run: Path, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out")]
    changed = tmp_path / "run"
    changed.mkdir()
    shutil.copy(run / "config.yaml", changed)
    (changed / "checkpoints").symlink_to(run / "checkpoints")
    environment = json.loads((run / ENVIRONMENT).read_text())
    environment["tokenizers"]["image"] = "0" * 64
    (changed / ENVIRONMENT).write_text(json.dumps(sealed(environment)))
    assert main([*command, "--checkpoint", str(changed), *out]) == 2
    assert "image_tokenizer.path holds another file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

    few = ["--prompts", "3", "--no-floor", *out]
    assert main([*command, *few]) == 0
    assert main([*command, *few, "--seed", "1"]) == 2
    assert (
        "coco.json holds a result of other settings (seed=0, now 1); give another folder: --out"
        in capsys.readouterr().err
    )
    content = coco_result(tmp_path / "out")
    del content["made_with"], content[DIGEST]  # as earlier versions wrote it: its card has the same values
    (tmp_path / "out" / "coco.json").write_text(json.dumps(content))
    assert main([*command, *few, "--seed", "1"]) == 2
    assert "coco.json holds a result of other settings (seed=0, now 1)" in capsys.readouterr().err
    assert main([*command, *few]) == 0
    (tmp_path / "out" / "coco.json").unlink()
    assert main([*command, *few, "--seed", "1"]) == 2
    assert "has parts of a different evaluation (seed=0, now 1)" in capsys.readouterr().err


def test_a_dry_run_describes_and_writes_nothing(
    command: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(run.rglob("*"))
    started = time.monotonic()
    assert main([*command, "--dry-run"]) == 0
    assert time.monotonic() - started < 1
    said = capsys.readouterr().out
    assert "generate images of 10 captions of val2014" in said
    assert f"measure {run / 'checkpoints' / 'step-00000008.ckpt'}, write to {run / 'evaluations'}" in said
    assert main([*command, "--checkpoint", str(run / "nowhere"), "--dry-run"]) == 2
    assert f"{run / 'nowhere'} is not a run folder and contains none" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
    assert main(["--checkpoint", str(run)]) == 2
    assert "nothing to measure" in capsys.readouterr().err
    assert "example:" in parser().format_help()


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_without_the_harness_its_installation_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "runs", "--lm-eval", "piqa"]) == 2
    assert "pip install 't2i_lm[lm-eval]'" in capsys.readouterr().err
