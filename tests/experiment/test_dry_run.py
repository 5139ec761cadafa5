"""Dry runs: sizes and costs at the paper's scale, without its files."""

from pathlib import Path

import pytest

from t2i_lm.config.load import load_experiment
from t2i_lm.experiment.dry_run import GIB, describe, memory_gib, parameter_count, plan
from t2i_lm.runtime.tables import compact
from t2i_lm.train import main
from tests.runs import EXPERIMENTS, PRETRAINED


def test_the_papers_numbers_come_out_without_weights() -> None:
    text = describe(load_experiment(PRETRAINED, "paper"))
    assert "1,507,033,088 (1,439,895,552 before expansion)" in text
    assert "66,823 rows (50,432 text, 16,384 image)" in text
    assert "1,024 image ids and at most 122 text ids" in text
    assert "tokens: 1.032M per step (pads included), 100B in 96,900 steps" in text
    assert "8.901e+09 FLOP/token" in text
    assert "hf download ai-forever/MoVQGAN movqgan_270M.ckpt" in text
    assert "missing: data.path=null" in text


def test_counts_have_four_digits_and_a_unit() -> None:
    counts = (999, 7168, 1_032_192, 100_019_404_800, 2e12)
    assert [compact(count, 4) for count in counts] == ["999", "7.168k", "1.032M", "100B", "2T"]


def test_frozen_parts_are_counted() -> None:
    text = describe(load_experiment(PRETRAINED, "paper", ["tune=embed"]))
    assert "273,707,008 trainable" in text
    assert describe(load_experiment(PRETRAINED, "paper", ["freeze=[ffn]"])) != text


def test_modality_experts_have_twice_the_parameters_at_equal_compute() -> None:
    dense, experts = (
        describe(load_experiment(file, "paper"))
        for file in (PRETRAINED, EXPERIMENTS / "remedies/modality_experts.yaml")
    )
    assert "parameters: 2,740,359,168 (1,439,895,552 before expansion), 1,300,463,616 trainable" in experts
    for text in (dense, experts):
        assert "8.901e+09 FLOP/token = 6 N + 12 L D T with N=1,370,179,584" in text
    assert "image_expert     1,233,326,080   1,233,326,080    45.0%" in experts
    assert "image_expert" not in dense


def test_shards_hold_whole_gradients_while_micro_batches_add_up() -> None:
    needs = []
    for parts in (1, 4):
        changes = ["trainer.devices=8", f"trainer.accumulate_grad_batches={parts}", f"data.batch_size={8 * parts}"]
        config = load_experiment(PRETRAINED, "demo", changes)
        planned = plan(config)
        needs.append(memory_gib(config, planned.model, 112))
    assert needs[0]["ddp"] == needs[1]["ddp"]
    for name in ("fsdp2", "hsdp"):
        assert needs[1][name] - needs[0][name] == pytest.approx(
            4 * parameter_count(planned.model, trainable=True) / GIB
        )


@pytest.mark.parametrize("name", ["t2i_scratch", "text_lm", "image_tokenizer"])
def test_every_task_can_be_described_without_its_data(name: str) -> None:
    assert "parameters: " in describe(load_experiment(EXPERIMENTS / f"{name}.yaml", "demo"))


def test_the_demos_files_give_its_sizes() -> None:
    planned = plan(load_experiment(PRETRAINED, "demo"))
    assert planned.layout is not None
    assert planned.layout.vocab.image_size == 512
    assert planned.layout.image_tokens == 64


def test_a_real_run_without_its_paths_is_refused_early(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PRETRAINED, "--scale", "paper"]) == 2
    assert "data.path=None" in capsys.readouterr().err


def test_an_unknown_group_lists_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PRETRAINED, "--dry-run", "freeze=[nothing_like_this]"]) == 2
    assert "nothing_like_this" in capsys.readouterr().err


def test_dry_run_trains_nothing(tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([PRETRAINED, *tiny, f"run.dir={tmp_path}", f"data.cache_dir={tmp_path}/cache", "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "max_steps: 8" in output
    assert "parameters:" in output
    assert not list(tmp_path.iterdir())
