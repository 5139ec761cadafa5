"""Frozen parameters and unconditional runs, through the command line."""

from pathlib import Path

import pytest
import torch

from t2i_lm.ablate import main
from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.build import build
from t2i_lm.export import main as export
from t2i_lm.models.freeze import group_members
from t2i_lm.models.open_lm import load_open_lm
from t2i_lm.modules.unconditional import UnconditionalImageModule
from t2i_lm.storage.run_folder import Run, read_run, run_folders
from t2i_lm.train import main as train
from tests.runs import EXPERIMENTS, ROOT
from tests.two_ranks import train_on_two_ranks

pytestmark = pytest.mark.slow

UNCONDITIONAL = str(EXPERIMENTS / "uncond_pretrained.yaml")


def newest(root: Path) -> Run:
    return read_run(run_folders(root)[-1])


def checkpoints(run: Run) -> list[dict[str, torch.Tensor]]:
    files = sorted((run.folder / "checkpoints").glob("*.ckpt"))
    return [torch.load(file, weights_only=True)["state_dict"] for file in files]


@pytest.mark.parametrize("group", ["attention", "text_rows", "position"])  # all groups: tests/models/test_freeze.py
def test_a_frozen_group_is_bitwise_unchanged_by_a_run(group: str, tiny: list[str], tmp_path: Path) -> None:
    changes = [*tiny, f"run.dir={tmp_path}", "samples.prompts=0"]
    assert main(["--freeze", group, UNCONDITIONAL, *changes]) == 0
    run = newest(tmp_path)
    assert run.folder.parent.name == f"uncond_pretrained_freeze_{group}"
    before = build(load_experiment(UNCONDITIONAL, "demo", changes)).module
    assert isinstance(before, UnconditionalImageModule)
    frozen = {f"decoder.{name}" for name in group_members(before.decoder, group)}
    after = checkpoints(run)[-1]
    for name, tensor in before.state_dict().items():
        # Text rows have no gradient here, but decay moves them unless they are frozen.
        assert torch.equal(after[name], tensor) == (name in frozen), name
    assert group in (run.folder / "groups.txt").read_text()


def test_frozen_parts_stay_frozen_on_two_processes(tiny: list[str], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    common = ["--freeze", "ffn", "--freeze", "text_rows", *tiny, "samples.prompts=0", "loss_rows=image"]
    assert main([UNCONDITIONAL, *common, f"run.dir={one}"]) == 0
    train_on_two_ranks(UNCONDITIONAL, two, *common, "trainer.strategy=ddp", command=main)
    for name, tensor in checkpoints(newest(one))[-1].items():
        if "feed_forward" in name or name.endswith(".text"):
            assert torch.equal(checkpoints(newest(two))[-1][name], tensor), name
    nll = [newest(root).validations()[-1]["val"]["image"]["nll"] for root in (one, two)]
    assert nll[1] == pytest.approx(nll[0], rel=1e-6)


def test_an_unconditional_run_counts_image_and_boundary_targets(tiny: list[str], tmp_path: Path) -> None:
    assert train([UNCONDITIONAL, *tiny, f"run.dir={tmp_path}"]) == 0
    run = newest(tmp_path)
    record = run.records("train")[-1]
    assert record["train"]["image"]["count"] == 2 * 8 * 64
    assert record["train"]["boundary"]["count"] == 2 * 8 * 3
    assert record["tokens_nominal"] == record["tokens_real"] == 8 * 8 * 68
    assert (run.folder / "samples" / "grid.png").is_file()
    assert run.report is not None
    assert run.report["row_norms"]["output.image"] > 0


def test_a_softmax_over_image_rows_alone_has_a_smaller_loss(tiny: list[str], tmp_path: Path) -> None:
    changes = [*tiny, "samples.prompts=0", "trainer.max_steps=3"]
    assert train([UNCONDITIONAL, *changes, f"run.dir={tmp_path}/all"]) == 0
    assert train([UNCONDITIONAL, *changes, f"run.dir={tmp_path}/image", "loss_rows=image"]) == 0
    whole, image = (newest(tmp_path / name).validations()[0]["val"] for name in ("all", "image"))
    assert image["image"]["nll"] < whole["image"]["nll"] - 1
    assert image["boundary"]["count"] == 0


def test_tune_sets_run(tiny: list[str], tmp_path: Path) -> None:
    assert main(["--tune", "norm", UNCONDITIONAL, *tiny, f"run.dir={tmp_path}", "samples.prompts=0"]) == 0
    assert newest(tmp_path).config["tune"] == "norm"


def test_all_arms_of_figure_5_run_in_sequence(tiny: list[str], tmp_path: Path) -> None:
    changes = [*tiny, f"run.dir={tmp_path}", "samples.prompts=0", "trainer.max_steps=4"]
    assert main(["--all", "--out", str(tmp_path / "drawn"), UNCONDITIONAL, *changes]) == 0
    assert len(run_folders(tmp_path)) == 6
    assert (tmp_path / "drawn" / "figure5.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze", "nothing_like_this"], "--freeze nothing_like_this: expected one of embedding, output"),
        (["--tune", "half"], "--tune half: expected one of embed, norm"),
        (["--freeze", "ffn", "optim.lrr=1"], "did you mean 'optim.lr'"),
        (["--freeze", "ffn", "a.yaml", "b.yaml"], "one experiment at a time"),
        (
            ["--all", "experiments/t2i_pretrained.yaml"],
            "--all experiments/t2i_pretrained.yaml: expected one of uncond_",
        ),
        (
            ["--dry-run", "--tune", "norm", "freeze=[norm]"],
            "freeze=[norm]: --tune decides what is frozen; leave one of them out",
        ),
        (
            ["--dry-run", "--freeze", "ffn", "tune=norm"],
            "tune=norm: --freeze decides what is frozen; leave one of them out",
        ),
        (["--dry-run", "--freeze", "ffn", "seed=1", "freeze=[norm]"], "freeze=[norm]: --freeze decides"),
        (["--freeze", "ffn", "absent.yaml"], "no experiment file absent.yaml"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_shows_the_frozen_groups(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["--freeze", "ffn", "--freeze", "first_half", "--dry-run"]) == 0
    assert "ffn" in capsys.readouterr().out


def test_freezing_an_image_tokenizer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = str(EXPERIMENTS / "image_tokenizer.yaml")
    assert main(["--freeze", "ffn", tokenizer]) == 2
    assert "with task=image_tokenizer" in capsys.readouterr().err


def test_an_export_of_an_expanded_decoder_is_read_back(tiny: list[str], tmp_path: Path) -> None:
    assert train([UNCONDITIONAL, *tiny, f"run.dir={tmp_path}", "samples.prompts=0"]) == 0
    run = newest(tmp_path)
    assert export([str(run.folder), "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    decoder = load_open_lm(tmp_path / "out")
    assert decoder.config.vocab_size == 512 + 7 + 32
    state = checkpoints(run)[-1]
    assert torch.equal(decoder.output.text[-32:], state["decoder.output.image"])
