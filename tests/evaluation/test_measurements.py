"""What a result of `evaluate` was made with."""

from pathlib import Path

import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import SampleConfig
from t2i_lm.evaluate import parser
from t2i_lm.evaluation.lm_eval import ChosenTasks
from t2i_lm.evaluation.measurements import MEASUREMENTS


def test_results_of_other_harness_tasks_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "rings.yaml").write_text("task: rings\n")

    def made_with(*words: str, names: str = "rings", init: str = "pretrained") -> dict[str, object]:
        options = parser().parse_args(["--checkpoint", "run", "--lm-eval", names, *words])
        chosen = ChosenTasks(names.split(","), None)
        return MEASUREMENTS["lm_eval"].made_with(options, chosen, ExperimentConfig(init=init))

    folder = ["--lm-eval-tasks", str(tmp_path)]
    plain = made_with(*folder)
    assert made_with(*folder) == plain
    assert str(tmp_path) not in str(plain)
    others = [
        made_with(*folder, names="rings,mmlu"),
        made_with(*folder, "--lm-eval-limit", "4"),
        made_with(*folder, "--lm-eval-all-rows"),
        made_with(*folder, "--no-before"),
        made_with(*folder, init="random"),
        made_with(),
    ]
    (tmp_path / "rings.yaml").write_text("task: rings\nnum_fewshot: 5\n")
    others.append(made_with(*folder))
    assert plain not in others


@pytest.mark.parametrize(("words", "guidance"), [([], 1.5), (["--cfg", "3"], 3.0)])
def test_guidance_is_the_runs_unless_the_command_says_otherwise(
    words: list[str], guidance: float, tmp_path: Path
) -> None:
    from t2i_lm.data.coco import choose_prompts, read_coco
    from tests.data.coco_folder import write_coco

    coco = read_coco(write_coco(tmp_path / "coco", 3))
    config = ExperimentConfig(samples=SampleConfig(guidance=1.5))
    options = parser().parse_args(["--checkpoint", "run", *words])
    made = MEASUREMENTS["coco"].made_with(options, (coco, choose_prompts(coco, 2, 0)), config)
    assert (made["guidance"], made["prompts"], made["weights"]) == (guidance, 2, "float32")
