"""Refusals of runs whose endpoint was measured otherwise: other texts, samples, settings, steps or tokenizers."""

from pathlib import Path
from typing import Any

import pytest

from t2i_lm.comparison.arms import Arms
from t2i_lm.comparison.comparability import IncomparableError
from t2i_lm.comparison.compare import compare
from t2i_lm.comparison.endpoints import Endpoint
from t2i_lm.comparison.measurement import require_one_measurement, require_one_tokenizer
from t2i_lm.comparison.plan import Plan
from t2i_lm.storage.run_folder import Run, read_run
from tests.comparison.test_compare import seeded_run
from tests.plots.synthetic_runs import write_relearning, write_run

ARMS = ("t2i_pretrained", "t2i_scratch")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"targets": 9}, "targets 512 .1 runs., 9"),
        ({"floors": {"unigram": {"nll": 6.6}}}, "unigram loss 6.50000 .1 runs"),
    ],
)
def test_forgetting_of_other_texts_is_refused(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    one, other = (read_run(write_run(tmp_path, arm, forgotten=0.5)) for arm in ARMS)
    endpoint = Endpoint("forgetting.text.text_rows.nll")
    require_one_measurement(endpoint, [one, other])
    record = other.records("forgetting")[-1]["forgetting"]["text"]
    record["name"] = "moved"  # the same text by its numbers
    require_one_measurement(endpoint, [one, other])
    record |= changed
    with pytest.raises(IncomparableError, match=f"endpoint forgetting.text.* {named}"):
        require_one_measurement(endpoint, [one, other])
    plan = Plan(primary=endpoint.name, secondary=[])
    with pytest.raises(IncomparableError, match=named):
        compare(plan, Arms({0: [one]}, {0: [other]}, ()))
    require_one_measurement(Endpoint("val.image.nll"), [one, other])
    require_one_measurement(Endpoint("forgetting.second_text.text_rows.nll"), [one, other])


def test_relearning_is_compared_where_it_was_measured_in_one_way(tmp_path: Path) -> None:
    folders = [seeded_run(tmp_path, arm, 0) for arm in ARMS]
    plan = Plan(seeds=[0], primary="relearning.step_10.nll", secondary=[])
    runs = [read_run(folder) for folder in folders]
    arms = Arms({0: runs[:1]}, {0: runs[1:]}, ())
    with pytest.raises(ValueError, match=r"relearning of .* was not measured: python -m t2i_lm.evaluate .*--relearn"):
        compare(plan, arms)
    write_relearning(folders[0], 9.0, length=128)
    write_relearning(folders[1], 9.5, length=128)
    assert compare(plan, arms)[0].differences[0] == pytest.approx(-0.5)
    assert Endpoint("relearning.step_5.nll").value(runs[0]) == 7.0
    assert Endpoint(plan.primary).unit == "nats/token"
    (folders[1] / "evaluations" / "last" / "relearn.json").unlink()
    (folders[1] / "evaluations" / "last").rmdir()
    write_relearning(folders[1], 9.5, length=64)
    with pytest.raises(IncomparableError, match=r"not measured alike: length 128 \(1 runs\), 64 \(1 runs\)"):
        compare(plan, arms)
    for name in ("relearning.step_7.nll", "relearning.step_5", "relearning.text.nll"):
        with pytest.raises(ValueError, match=f"endpoint '{name}': expected relearning.STEP.nll, STEP one of step_0, "):
            Endpoint(name)


def test_samples_of_other_settings_are_refused_unless_the_plan_varies_them(tmp_path: Path) -> None:
    one = read_run(write_run(tmp_path, ARMS[0]))
    other = read_run(write_run(tmp_path, ARMS[1], config={"samples.temperature": 0.2, "samples.preference_scenes": 7}))
    samples = Endpoint("report.samples.accuracy.all.right")
    with pytest.raises(IncomparableError, match=r"not measured alike: samples.temperature 1.0 \(1 runs\), 0.2"):
        require_one_measurement(samples, [one, other])
    require_one_measurement(samples, [one, other], ("samples.temperature",))
    with pytest.raises(IncomparableError, match=r"samples.preference_scenes 500 \(1 runs\), 7"):
        require_one_measurement(Endpoint("report.iid.preference.kind.preferred"), [one, other])
    require_one_measurement(Endpoint("report.text_floor_nll"), [one, other])


def test_the_report_repeats_forgetting_and_is_refused_alike(tmp_path: Path) -> None:
    one, other = (read_run(write_run(tmp_path, arm, forgotten=0.5)) for arm in ARMS)
    other.records("forgetting")[-1]["forgetting"]["text"]["targets"] = 9
    for name in ("forgetting.text.text_rows.nll", "report.forgetting.text.text_rows.nll"):
        with pytest.raises(IncomparableError, match=f"endpoint {name}: the runs were not measured alike: targets"):
            require_one_measurement(Endpoint(name), [one, other])


def record(run: Run, step: int, **entries: Any) -> None:
    run.metrics.append({"step": step, **entries})


def test_fid_and_samples_during_training_are_compared_at_one_step_with_equal_settings(tmp_path: Path) -> None:
    fid, color = Endpoint("fid.fid"), Endpoint("prompt_accuracy.color")
    one, other = (read_run(write_run(tmp_path, arm)) for arm in ARMS)
    for run in (one, other):
        record(run, 200, fid={"fid": 30.0, "n": 1000})
        record(run, 200, prompt_accuracy={"color": 0.5})
    for endpoint in (fid, color):
        require_one_measurement(endpoint, [one, other])
    record(other, 250, fid={"fid": 28.0, "n": 1000})
    record(other, 250, prompt_accuracy={"color": 0.6})
    for endpoint in (fid, color):
        with pytest.raises(IncomparableError, match=r"not measured alike: step 200 \(1 runs\), 250 \(1 runs\)"):
            require_one_measurement(endpoint, [one, other])
        require_one_measurement(endpoint, [one, other], ("trainer.max_steps",))
    for key, value, refused in (
        ("fid.prompts", 10_000, fid),
        ("samples.grid", 4, color),
        ("samples.guidance", 3.0, fid),
    ):
        changed = read_run(write_run(tmp_path / key, ARMS[1], config={key: value}))
        record(changed, 200, fid={"fid": 30.0, "n": 1000}, prompt_accuracy={"color": 0.5})
        with pytest.raises(IncomparableError, match=f"not measured alike: {key} "):
            require_one_measurement(refused, [one, changed])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("val.text.nll", ["text"]),
        ("val.image.nll", ["image"]),
        ("val.all.nll", ["text", "image"]),
        ("tokens_saved.image", ["image"]),
        ("forgetting.text.text_rows.nll", ["text"]),
        ("forgetting.text.text_rows.bits_per_byte", []),
        ("report.forgetting.text.text_rows.nll", ["text"]),
        ("relearning.step_60.nll", ["text"]),
    ],
)
def test_losses_per_token_of_other_tokenizers_are_refused(name: str, kinds: list[str], tmp_path: Path) -> None:
    for kind in ("text", "image"):
        runs = [read_run(write_run(tmp_path / kind, arm, forgotten=0.5)) for arm in ARMS]
        for run, tokenizer in zip(runs, "ab", strict=True):
            run.environment["tokenizers"] = {"text": "c", "image": "c", kind: tokenizer}
        if kind in kinds:
            with pytest.raises(IncomparableError, match=f"endpoint {name}: is per token.* different {kind} "):
                require_one_tokenizer(Endpoint(name), runs)
        else:
            require_one_tokenizer(Endpoint(name), runs)


def test_a_comparison_by_design_over_tokenizers_has_no_verdict_on_losses(tmp_path: Path) -> None:
    one, other = (read_run(seeded_run(tmp_path, arm, 0)) for arm in ARMS)
    for run, tokenizer in ((one, "a"), (other, "b")):
        run.environment["tokenizers"] = {"text": "c", "image": tokenizer}
    plan = Plan(seeds=[0], primary="val/iid.image.nll", secondary=[], varied=["image_tokenizer.path"])
    with pytest.raises(IncomparableError, match="different image tokenizers"):
        compare(plan, Arms({0: [one]}, {0: [other]}, ()))
