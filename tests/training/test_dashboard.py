"""The TensorBoard dashboard of real runs."""

import re
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from callbacks.dashboard import FINAL, layout
from t2i_lm.plots.live import live_figures
from t2i_lm.storage.run_folder import Run, read_run
from t2i_lm.train import main
from t2i_lm.training.callbacks import HYPERPARAMETERS
from tests.runs import PRETRAINED, doubled_points, without_newest


def events(run: Run) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.folder / "tb"), size_guidance={"tensors": 0})
    accumulator.Reload()
    return accumulator


def charts(accumulator: EventAccumulator) -> dict[str, dict[str, list[str]]]:
    (summary,) = accumulator.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(summary.tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in parsed.category
    }


def matching(accumulator: EventAccumulator, expressions: list[str]) -> set[str]:
    """Tags that TensorBoard draws in a chart."""
    tags = accumulator.Tags()["scalars"]
    return {tag for tag in tags for expression in expressions if re.match(expression, tag)}


def test_every_chart_of_a_text_to_image_run_has_one_curve_of_it(probed: Run) -> None:
    accumulator = events(probed)
    for category, of_category in charts(accumulator).items():
        for title, expressions in of_category.items():
            found = matching(accumulator, expressions)
            if category.startswith(("Figure 3", "Figure 4", "Optimization")):
                assert len(found) == 1, (category, title, found)
            elif category.startswith("Forgetting"):
                assert found, title
            else:
                assert not found, (category, title)


def test_a_resumed_run_has_each_point_once(probed: Run, tmp_path: Path) -> None:
    folder = without_newest(probed, tmp_path)  # which holds the points of later steps too, as after a kill
    assert main([PRETRAINED, "--resume", str(folder)]) == 0
    again = read_run(folder)
    assert not doubled_points(again)
    before, after = events(probed), events(again)
    assert before.Tags()["scalars"] == after.Tags()["scalars"]
    for tag in before.Tags()["scalars"]:
        if tag.startswith("throughput/"):  # a session begins without one
            continue
        assert [point.step for point in before.Scalars(tag)] == [point.step for point in after.Scalars(tag)], tag
    for tag in before.Tags()["images"]:
        assert [point.step for point in before.Images(tag)] == [point.step for point in after.Images(tag)], tag


def test_figures_5_and_6_draw_runs_of_their_task_alone() -> None:
    categories = layout(["val"])
    for figure, prefix in (("Figure 5", "unconditional/"), ("Figure 6", "align/")):
        (drawn,) = (drawn for title, drawn in categories.items() if title.startswith(figure))
        assert all(tag.startswith(prefix) for _, tags in drawn.values() for tag in tags)


def test_a_run_with_every_measurement_has_at_most_60_scalars(probed: Run) -> None:
    tags = set(events(probed).Tags()["scalars"])
    assert any(tag.startswith("forgetting/") for tag in tags)
    others = ["throughput/mfu", "fid", "kid", "replay", "replay in two validations"]  # of a GPU, and of other keys
    accuracies = 11  # of a grid of scenes, which tiny runs do not sample
    assert len(tags) + len(others) + accuracies <= 60


def test_texts_hold_command_config_and_completions(probed: Run) -> None:
    accumulator = events(probed)
    texts = {
        name: accumulator.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("command", "config", "completions")
    }
    assert "python" in texts["command"]
    assert "\n      lr: " in texts["config"]  # indented: a block of code
    assert texts["completions"] == (probed.folder / "completions.md").read_text()


def test_the_table_of_hyperparameters_has_final_losses_of_tags_that_exist(probed: Run) -> None:
    accumulator = events(probed)
    contents = [
        plugin_data_pb2.HParamsPluginData.FromString(content)
        for content in accumulator.PluginTagToContent("hparams").values()
    ]
    (experiment,) = (entry.experiment for entry in contents if entry.HasField("experiment"))
    assert {info.name for info in experiment.hparam_infos} == set(HYPERPARAMETERS)
    assert [info.name.tag for info in experiment.metric_infos] == list(FINAL)
    assert any(entry.HasField("session_end_info") for entry in contents)
    (start,) = (entry.session_start_info for entry in contents if entry.HasField("session_start_info"))
    assert start.hparams["arm"].string_value == "t2i_pretrained"
    assert set(FINAL) & set(accumulator.Tags()["scalars"])


def test_figures_of_a_run_show_the_newest_partner(probed: Run, scratch: Run) -> None:
    assert {"Figure 3", "Figure 4"} <= set(events(probed).Tags()["images"])
    images = live_figures(scratch.folder)
    assert set(images) == {"Figure 3", "Figure 4"}
    assert min(images["Figure 4"].size) > 400


def test_a_damaged_run_beside_it_takes_no_figure_from_a_run(runs: Path) -> None:
    pretrained = next((runs / "t2i_pretrained").iterdir())
    damaged = runs / "t2i_scratch" / "20270101-000000-demo"
    damaged.mkdir()
    (damaged / "config.yaml").write_text("name: [")
    assert set(live_figures(pretrained)) == {"Figure 3", "Figure 4"}
