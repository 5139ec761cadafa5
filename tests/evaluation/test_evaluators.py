"""The settings that a result of `evaluate` depends on, and options without their evaluator."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import SampleConfig
from t2i_lm.evaluate import EVALUATORS, main, parser
from t2i_lm.evaluation import lm_eval
from t2i_lm.evaluation.coco import CocoEvaluator, _keep_earlier
from t2i_lm.evaluation.lm_eval import ChosenTasks, LmEvalEvaluator


def test_results_of_other_harness_tasks_have_another_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rings.yaml").write_text("task: rings\n")
    # The harness is an optional dependency; here its tasks are known by name only.
    monkeypatch.setattr(lm_eval, "choose_tasks", lambda names, folder: ChosenTasks(names.split(","), None))

    def identity(*words: str, names: str = "rings", init: str = "pretrained") -> dict[str, object]:
        options = parser().parse_args(["--checkpoint", "run", "--lm-eval", names, *words])
        return LmEvalEvaluator(options).identity(ExperimentConfig(init=init))

    folder = ["--lm-eval-tasks", str(tmp_path)]
    plain = identity(*folder)
    assert identity(*folder) == plain
    assert str(tmp_path) not in str(plain)
    others = [
        identity(*folder, names="rings,mmlu"),
        identity(*folder, "--lm-eval-limit", "4"),
        identity(*folder, "--lm-eval-all-rows"),
        identity(*folder, "--no-before"),
        identity(*folder, init="random"),
        identity(),
    ]
    (tmp_path / "rings.yaml").write_text("task: rings\nnum_fewshot: 5\n")
    others.append(identity(*folder))
    assert plain not in others


@pytest.mark.parametrize(("words", "guidance"), [([], 1.5), (["--cfg", "3"], 3.0)])
def test_guidance_is_the_runs_unless_overridden(words: list[str], guidance: float, tmp_path: Path) -> None:
    from tests.data.coco_folder import write_coco

    weights = tmp_path / "inception.pth"
    weights.touch()
    command = ["--checkpoint", "run", "--coco", str(write_coco(tmp_path / "coco", 3)), "--weights", str(weights)]
    config = ExperimentConfig(samples=SampleConfig(guidance=1.5))
    identity = CocoEvaluator(parser().parse_args([*command, "--prompts", "2", *words])).identity(config)
    assert (identity["guidance"], identity["prompts"], identity["weights"]) == (guidance, 2, "float32")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coco", ".", "--rows", "3"], "--rows requires --forgetting"),
        (["--forgetting", ".", "--no-before"], "--no-before requires --lm-eval"),
        (["--report", "--prompts", "5"], "--prompts requires --coco"),
        (["--forgetting", ".", "--lm-eval-limit", "3"], "--lm-eval-limit requires --lm-eval"),
        (["--forgetting", ".", "--clip", "model"], "--clip requires --coco"),
        (["--forgetting", ".", "--pictures"], "--images requires --coco"),
        (["--lm-eval", "piqa", "--prompts", "10"], "--prompts requires --coco"),
        (["--forgetting", ".", "--questions", "3"], "--questions requires --tasks"),
        (["--seed", "1"], "nothing to measure"),
    ],
)
def test_an_option_without_its_evaluator_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", "run", *words]) == 2
    assert message in capsys.readouterr().err


def test_each_evaluator_is_requested_by_the_option_of_its_name() -> None:
    options = vars(parser().parse_args(["--checkpoint", "run"]))
    assert {name: options[name] for name in EVALUATORS} == dict.fromkeys(EVALUATORS)


def test_inputs_are_read_without_torch(tmp_path: Path) -> None:
    from tests.data.coco_folder import write_coco

    weights = tmp_path / "inception.pth"
    weights.touch()
    command = ["--checkpoint", str(tmp_path / "none"), "--coco", str(write_coco(tmp_path / "coco", 3))]
    command += ["--weights", str(weights), "--prompts", "2"]
    code = f"import sys, t2i_lm.evaluate as e; assert e.main({command!r}) == 2; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, "is not a run folder" in done.stderr) == (0, True), done.stderr


def test_a_floor_of_other_reference_images_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    floor = {"fid": 3.0, "card": {"reference_sha256": "a"}, "clip": {"score": 0.3}}
    earlier = {"card": {"reference_sha256": "a"}, "floor": floor, "clip": {"score": 0.2}}
    for reference, kept in (("a", True), ("b", False)):
        result: dict[str, Any] = {"card": {"reference_sha256": reference}}
        _keep_earlier(earlier, result, tmp_path / "coco.json")
        assert ("floor" in result) == kept
        assert result["clip"] == {"score": 0.2}, "of the generated images, without a reference"
        assert ("its floor" in capsys.readouterr().err) == kept
