"""The parts of `make rehearsal` and the runner of its stages; no test runs the whole, which takes minutes."""

import json
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import VQModel

from t2i_lm.config.load import load_experiment
from t2i_lm.data.tars import find_tars, open_tars, require_pairs
from t2i_lm.models.open_lm import load_open_lm
from t2i_lm.tokenizers import movqgan
from tests.rehearsal import parts
from tests.rehearsal.__main__ import main
from tests.rehearsal.files import CHECKPOINT, CONFIG, PAIRS
from tests.rehearsal.plan import LENGTH, PRETRAINED, ROOT, Rehearsal
from tests.rehearsal.stages import Commands, Record, SignalAtStep, Stage, StageError, minutes_left, run_stages, table

TINY = replace(parts.QUICK, pairs=3)


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path, (), quick=False, gpus=False, processes=2, coco=None, weights=None)


def test_only_the_parts_and_the_size_of_the_papers_run_change(rehearsal: Rehearsal) -> None:
    paper = load_experiment(ROOT / PRETRAINED, "paper", [])
    config = load_experiment(ROOT / PRETRAINED, "paper", rehearsal.overrides())
    assert (config.data.length, config.image_tokenizer.size) == (LENGTH, 256)
    for section in ("optim", "log", "loss"):
        ours, papers = vars(getattr(config, section)), vars(getattr(paper, section))
        changed = {key for key, value in ours.items() if value != papers[key]}
        assert changed <= {"warmup_steps"}, section
    assert config.trainer.strategy == paper.trainer.strategy == "ddp"


def test_a_part_that_is_given_is_not_made_up(rehearsal: Rehearsal, tmp_path: Path) -> None:
    given = ("backbone.path=/real/open_lm_1b.pt", "data.path=/real/pairs", "data.source=webdataset", "optim.lr=1e-4")
    real = replace(rehearsal, given=given, coco=tmp_path, weights=tmp_path)
    assert real.parts == ["text_tokenizer", "image_tokenizer"]
    config = load_experiment(ROOT / PRETRAINED, "paper", real.overrides())
    assert config.backbone.path == "/real/open_lm_1b.pt"
    assert config.backbone.config == "open_lm_1b_old"
    assert (config.data.path, config.data.part_size, config.optim.lr) == ("/real/pairs", 8192, 1e-4)
    assert config.data.train_size == 200


def test_the_checkpoint_is_read_with_the_papers_rows(tmp_path: Path) -> None:
    parts.write_backbone(tmp_path, TINY)
    decoder = load_open_lm(tmp_path / CHECKPOINT, tmp_path / CONFIG)
    assert tuple(decoder.tok_embeddings.matrix().shape) == (50_432, TINY.width)
    assert decoder.config.positional_embedding_type == "head_rotary"


def test_sbers_names_are_the_inverse_of_diffusers() -> None:
    kinds = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")
    config: dict[str, Any] = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_type": "spatial"}
    vq: Any = VQModel(down_block_types=kinds[0], up_block_types=kinds[1], num_vq_embeddings=8, vq_embed_dim=3, **config)
    state = parts.sber_state(vq, 2)
    assert {"encoder.down.1.attn.0.q.weight", "decoder.up.0.block.1.norm2.conv_y.bias"} <= state.keys()
    assert movqgan.diffusers_config(state)["block_out_channels"] == (32, 64)
    again = movqgan.to_diffusers(state, 2)
    own = vq.state_dict()
    assert again.keys() == own.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in own.items())


def test_sbers_names_are_those_of_its_own_code(shared: Path) -> None:
    state = torch.load(shared / "reference" / "movqgan" / "tiny_1block" / "checkpoint.ckpt", weights_only=True)
    assert all(parts.sber_name(movqgan.diffusers_name(name, 4), 4) == name for name in state)


def test_tars_are_read_as_pairs(tmp_path: Path) -> None:
    parts.write_pairs(tmp_path, TINY)
    source = open_tars(find_tars(tmp_path / PAIRS))
    require_pairs(source, "pairs")
    assert len(source) == 3
    assert source[2].image.size == (256, 256)


def shell(*lines: str) -> Stage:
    return Stage("shell", 60, lambda commands: commands.run("sh", "-c", "\n".join(lines)).split()[-4])


def test_complete_stages_are_not_repeated_and_the_table_lists_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = [shell("echo made >> calls", "echo made"), replace(shell("cat absent"), name="broken")]
    record = Record.open(tmp_path / "rehearsal.json", {"quick": "True"})
    with pytest.raises(StageError, match=r"absent: No such file[\s\S]*stage 2, broken, failed[\s\S]*logs/broken\.log"):
        run_stages(stages, record, tmp_path, estimate=True)
    assert "about 2 min left" in capsys.readouterr().out
    again = Record.open(tmp_path / "rehearsal.json", {"quick": "True"})
    stages[1] = replace(shell("cat calls"), name="broken")
    run_stages(stages, again, tmp_path, estimate=False)
    assert (tmp_path / "calls").read_text() == "made\n"
    assert re.search(r"\| shell \| 0 \| .* GiB \| made \|", table(stages, again.done))
    assert again.done["shell"]["peak"] > 0
    with pytest.raises(ValueError, match="quick='True', now 'False'"):
        Record.open(tmp_path / "rehearsal.json", {"quick": "False"})


def test_the_time_left_follows_the_speed_so_far() -> None:
    stages = [Stage(name, seconds, lambda _: "") for name, seconds in (("one", 60), ("two", 120), ("three", 60))]
    assert minutes_left(stages, {}) == 4
    assert minutes_left(stages, {"one": {"seconds": 180.0}}) == 9


def test_a_run_is_killed_at_its_step(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "t2i_pretrained" / "20260101-000000-paper"
    run.mkdir(parents=True)
    (run / "config.yaml").touch()
    lines = [{"step": step, "train": {"all": {"nll": 1.0}}} for step in (2, 4)]
    writes = "; ".join(
        f"time.sleep(0.1); print({json.dumps(json.dumps(line))}, file=open('metrics.jsonl', 'a'), flush=True)"
        for line in lines
    )
    program = "import json, os, time; json.dump({'pid': os.getpid()}, open('owner.json', 'w'))"
    kill = SignalAtStep(tmp_path / "runs", "t2i_pretrained", 4, signal.SIGKILL)
    commands = Commands(tmp_path / "log", run)
    commands.run(sys.executable, "-c", f"{program}; {writes}; time.sleep(60)", code=-9, watch=kill)
    assert kill.text.count("\n") == 2
    late = SignalAtStep(tmp_path / "runs", "t2i_pretrained", 6, signal.SIGKILL)
    with pytest.raises(StageError, match="ended before it could be stopped"):
        commands.run("true", code=0, watch=late)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["backbone.path"], "backbone.path: expected key=value"),
        (["--coco", "nowhere"], "--coco nowhere: no such file or folder"),
        (["--processes", "0"], "--processes 0: expected"),
    ],
)
def test_wrong_arguments_are_named_at_once(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
