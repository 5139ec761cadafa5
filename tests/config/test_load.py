import subprocess
import sys
import time
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path

import pytest

from t2i_lm.config.forgetting import NONFICTION, NOVELS
from t2i_lm.config.load import flatten, load_experiment, save_experiment

ROOT = Path(__file__).parents[2]
OTHERS = ("base", "study")
EXPERIMENTS = sorted(file for file in (ROOT / "experiments").glob("*.yaml") if file.stem not in OTHERS)
PRETRAINED, SCRATCH = (ROOT / "experiments" / f"t2i_{arm}.yaml" for arm in ("pretrained", "scratch"))
PAPER_PATHS = ["backbone.path=x", "text_tokenizer.path=x", "image_tokenizer.path=x", "data.path=x"]


@pytest.mark.parametrize(
    "path", [path for path in EXPERIMENTS if path.stem not in ("base", "study")], ids=lambda path: path.stem
)
def test_every_shipped_experiment_loads_at_every_scale(path: Path) -> None:
    for scale in ("demo", "flickr8k", "paper"):
        needs = PAPER_PATHS if scale == "paper" else ["data.path=x"]
        config = load_experiment(path, scale, needs)
        assert config.name == path.stem
        assert config.scale == scale


def test_the_two_arms_differ_in_one_key_beside_their_name() -> None:
    pretrained, scratch = (flatten(load_experiment(path, "demo")) for path in (PRETRAINED, SCRATCH))
    assert {key for key in pretrained if pretrained[key] != scratch[key]} == {"name", "init"}


def test_a_run_to_sample_from_differs_in_empty_captions_alone() -> None:
    for scale in ("demo", "flickr8k", "paper"):
        needs = PAPER_PATHS if scale == "paper" else ["data.path=x"]
        pretrained, sampling = (
            flatten(load_experiment(path, scale, needs)) for path in (PRETRAINED, PRETRAINED.with_stem("t2i_sampling"))
        )
        changed = {key for key in pretrained if pretrained[key] != sampling[key]}
        assert changed == {"name", "data.caption_dropout"}
        assert sampling["data.caption_dropout"] == 0.1


def test_the_demo_measures_forgetting_on_shipped_texts_wherever_a_language_model_is_kept() -> None:
    for path in EXPERIMENTS:
        config = load_experiment(path, "demo")
        assert config.measures_forgetting == (config.task in ("text_to_image", "unconditional")), path.stem
        assert config.forgetting.texts == {"text": NOVELS, "second_text": NONFICTION}
    for scale in ("flickr8k", "paper"):
        assert not load_experiment(PRETRAINED, scale, PAPER_PATHS).measures_forgetting
    assert not load_experiment(PRETRAINED, "demo", ["trainer.strategy=fsdp2"]).measures_forgetting
    assert not load_experiment(PRETRAINED, "demo", ["forgetting.interval=null"]).measures_forgetting


@pytest.mark.parametrize("given", ["task=text data.source=text", "task=align", "task=image_tokenizer", "fsdp2"])
def test_forgetting_on_an_own_text_is_refused_where_it_cannot_be_measured(given: str) -> None:
    words = given.split() if "=" in given else ["trainer.strategy=fsdp2"]
    with pytest.raises(ValueError, match=r"^forgetting\.interval=400: expected null"):
        load_experiment(SCRATCH, "demo", ["init=random", "forgetting.text=mine.txt", *words])


def test_a_misspelt_key_of_forgetting_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'forgetting\.secondtext'; did you mean 'forgetting\.second_text'\?"):
        load_experiment(PRETRAINED, "demo", ["forgetting.secondtext=x"])


def test_a_config_is_never_changed() -> None:
    config = load_experiment(PRETRAINED, "demo")
    for section, key in ((config, "init"), (config.optim, "lr"), (config.image_tokenizer.model, "codes")):
        with pytest.raises(FrozenInstanceError):
            setattr(section, key, None)


def test_layers_merge_in_order() -> None:
    config = load_experiment(PRETRAINED, "demo", ["optim.lr=0.5", "optim.betas=[0.8,0.9]"])
    assert config.optim.lr == 0.5
    assert config.optim.betas == [0.8, 0.9]
    assert config.optim.weight_decay == 0.1  # base.yaml
    assert config.data.source == "scenes"  # scale/demo.yaml


def test_shared_files_are_looked_up_one_folder_up_too(tmp_path: Path) -> None:
    (tmp_path / "scale").mkdir()
    (tmp_path / "variants").mkdir()
    (tmp_path / "base.yaml").write_text("seed: 7\n")
    (tmp_path / "scale" / "demo.yaml").write_text("data: {batch_size: 4}\n")
    (tmp_path / "variants" / "mine.yaml").write_text("name: mine\n")
    config = load_experiment(tmp_path / "variants" / "mine.yaml", "demo")
    assert (config.seed, config.data.batch_size, config.name) == (7, 4, "mine")
    (tmp_path / "variants" / "base.yaml").write_text("seed: 8\n")
    with pytest.raises(ValueError, match="known here: none"):  # a folder with a base of its own is on its own
        load_experiment(tmp_path / "variants" / "mine.yaml", "demo")


def test_a_saved_config_reads_back_equal(tmp_path: Path) -> None:
    config = load_experiment(PRETRAINED, "demo", ["seed=3"])
    save_experiment(config, tmp_path / "config.yaml")
    assert asdict(load_experiment(tmp_path / "config.yaml")) == asdict(config)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "optim has betas, decay, final_lr_ratio, grad_clip, gradient_projection, l2_sp"),
        ("lr=1", "did you mean 'optim.lr'"),
        ("data.batchsize=3", "did you mean 'data.batch_size'"),
        ("qqqq.q=3", "unknown key 'qqqq.q'; all keys: docs/configuration.md"),
        ("optm.lr=1", "did you mean 'optim.lr'"),
        ("data.lr=1", "did you mean 'optim.lr'"),
        ("optim.schedule=linear", "optim has betas, "),
        ("trainer.gradient_accumulation=2", "trainer has accelerator, accumulate_grad_batches, "),
        ("trainer.max_step=5", "trainer.max_steps"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.lr=-1", "optim.lr=-1.0: expected a positive value"),
        ("optim.warmup_steps=300", "less than trainer.max_steps=300"),
        ("init=pretraind", "one of pretrained, random"),
        ("data.batch_size=33 trainer.devices=2", "a multiple of 2"),
        ("trainer.strategy=fsdp9", "trainer.strategy"),
        ("log.ema=1.0", "log.ema"),
        ("nonsense", "key=value"),
    ],
)
def test_a_bad_override_names_the_key_and_the_allowed_values(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment(PRETRAINED, "demo", ["trainer.max_steps=300", *override.split()])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.packing=true", "trainer.compile=true"], "trainer.packing=True: expected false with trainer.compile"),
        (["trainer.packing=true", "task=align"], "trainer.packing=True: expected false, task=align"),
        (["trainer.fp8=true", "task=align"], "trainer.fp8=True: expected false, task=align"),
        (["trainer.autotune=true"], "trainer.autotune=True: expected false without trainer.compile=true"),
        (
            ["trainer.autotune=true", "trainer.compile=true", "task=align"],
            "trainer.autotune=True: expected false",
        ),
        (["loss.backend=liger"], "loss.backend='liger': expected one of fused, torch"),
        (["loss.backend=torch", "task=align"], "loss.backend='torch': expected fused, task=align"),
        (["data.pad_to_multiple_of=0"], "data.pad_to_multiple_of=0: expected at least 1"),
    ],
)
def test_unsupported_speed_options_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment(PRETRAINED, "demo", overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("restart_every=0", "restart_every=0: expected at least 1"),
        ("commitment=-1", "commitment=-1.0: expected 0 or more"),
        ("edge_weight=-1", "edge_weight=-1.0: expected 0 or more"),
        ("model.codes=0", "model.codes=0: expected at least 1"),
        ("model.patch=0", "model.patch=0: expected at least 1"),
        ("model.code_dim=0", "model.code_dim=0: expected at least 1"),
        ("model.latent_channels=0", "model.latent_channels=0: expected at least 1"),
        ("model.layers_per_block=0", "model.layers_per_block=0: expected at least 1"),
        (
            "model.block_out_channels=[]",
            r"model.block_out_channels=\[\]: expected at least one positive multiple of 16",
        ),
        (
            "model.block_out_channels=[50,100]",
            r"model.block_out_channels=\[50, 100\]: expected at least one positive mul",
        ),
        ("model.patch=3", "size=64: expected a multiple of 6, the side of an id"),
        ("model.block_out_channels=[16,16,16,16,16,16]", "size=64: expected a multiple of 128, the side of an id"),
    ],
)
def test_an_image_tokenizer_that_cannot_be_built_is_refused_by_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^image_tokenizer\.{message}"):
        load_experiment(PRETRAINED.with_name("image_tokenizer.yaml"), "demo", [f"image_tokenizer.{override}"])


REPLAYED = "data.replay_ratio=0.25 optim.gradient_projection=true"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("modality_experts=true task=unconditional", "modality_experts=True: expected false with task=unconditional"),
        ("modality_experts=true trainer.fp8=true", "trainer.fp8=True: expected false with modality_experts=true"),
        ("modality_experts=true lora.rank=2 lora.image_only=true", "lora.image_only=True: .*the image half alone"),
        ("lora.image_only=true", "lora.image_only=True: expected false with lora.rank=0"),
        ("lora.alpha=32", "lora.alpha=32.0: expected 16 with lora.rank=0"),
        (
            "optim.gradient_projection=true",
            "data.replay_ratio=0.0: expected more than 0 with optim.gradient",
        ),
        (f"{REPLAYED} trainer.strategy=fsdp2", "optim.gradient_projection=True: expected false with .*fsdp2"),
        (f"{REPLAYED} trainer.accumulate_grad_batches=16", "optim.gradient_projection=True: .*micro-batches of 1"),
        (
            "optim.gradient_projection=true task=unconditional",
            "optim.gradient_projection=True: expected false with",
        ),
        ("optim.l2_sp=1 init=random", r"optim.l2_sp=1.0: expected 0 with init=random"),
        ("optim.l2_sp=1 task=align", r"optim.l2_sp=1.0: expected 0 with .*task=align"),
        ("lora.rank=2 tune=ffn", "tune='ffn': expected all with lora.rank=2"),
        ("loss.replay_weight=0.5", r"loss.replay_weight=0.5: expected 1 with data.replay_ratio=0"),
        ("data.caption_dropout=0.1 task=unconditional", r"data.caption_dropout=0.1: expected 0 with task=uncond"),
        ("samples.guidance=3 task=unconditional", r"samples.guidance=3.0: expected 1 with task=unconditional"),
        ("optim.name=muon task=align", "optim.name='muon': expected adamw, task=align trains no language model"),
        ("backbone.seq_len=0", "backbone.seq_len=0: expected null or at least 1"),
    ],
)
def test_remedies_that_cannot_be_right_are_refused(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_experiment(PRETRAINED, "demo", overrides.split())


@pytest.mark.parametrize(
    ("experiment", "override", "reason"),
    [
        ("align", "loss.z=0.1", "task=align trains no language model"),
        ("image_tokenizer", "trainer.compile=true", "task=image_tokenizer trains no language model"),
        ("image_tokenizer", "trainer.activation_checkpointing=true", "task=image_tokenizer trains no language model"),
        ("t2i_scratch", "aligned_rows=rows", "init=random and new_rows=random start from no aligned rows"),
    ],
)
def test_a_key_without_effect_is_noted(experiment: str, override: str, reason: str) -> None:
    key, _, value = override.partition("=")
    noted = load_experiment(PRETRAINED.with_stem(experiment), "demo", [override]).notes
    assert noted == [f"note: {key}={value.capitalize() if value == 'true' else value} has no effect: {reason}"]


@pytest.mark.parametrize("override", ["loss.z=0.1", "trainer.compile=true", "trainer.activation_checkpointing=true"])
def test_a_key_with_effect_is_not_noted(override: str) -> None:
    assert not load_experiment(PRETRAINED, "demo", [override]).notes


def test_an_unknown_scale_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="demo, flickr8k, paper"):
        load_experiment(PRETRAINED, "huge")


def test_a_file_that_is_not_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [")
    with pytest.raises(ValueError, match=r"x\.yaml is not YAML"):
        load_experiment(tmp_path / "x.yaml")


def _seconds(*arguments: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    best, done = float("inf"), None
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
    assert done is not None
    return best, done


def test_help_is_fast_and_a_misspelt_key_fails_fast() -> None:
    # The bars are 0.5 s and 1 s on a quiet machine; a busy one gets some slack.
    seconds, done = _seconds("-m", "t2i_lm.train", "--help")
    assert done.returncode == 0
    assert "example" in done.stdout
    assert seconds < 1.0
    seconds, done = _seconds("-m", "t2i_lm.train", str(PRETRAINED), "optim.lrr=1")
    assert done.returncode == 2
    assert "optim.lr" in done.stderr
    assert "Traceback" not in done.stderr
    assert seconds < 2.0


def test_a_path_to_data_that_is_not_read_is_refused() -> None:
    config = load_experiment(PRETRAINED, "demo", ["data.path=photos"])
    with pytest.raises(ValueError, match=r"data.path='photos': expected null with data.source=scenes"):
        config.require_paths()
    load_experiment(PRETRAINED, "demo", ["data.path=photos", "data.source=image_folder"]).require_paths()


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/tmp/x", "..", ".", "a//../..", "a\0b"])
def test_a_name_cannot_leave_the_folder_of_runs(name: str) -> None:
    with pytest.raises(ValueError, match=r"^name=.*: expected the name of a folder inside run\.dir"):
        load_experiment(PRETRAINED, "demo", [f"name={name}"])
    with pytest.raises(ValueError, match=r"^scale=.*: expected the name of a file in scale/"):
        replace(load_experiment(PRETRAINED, "demo"), scale=f"{name}/x")


def test_resolvers_are_off_in_files_and_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.yaml").write_text("name: ${oc.env:HOME}\n")
    assert load_experiment(tmp_path / "x.yaml").name == "${oc.env:HOME}"
    note = capsys.readouterr().err
    assert note.count("\n") == 1
    assert "x.yaml: name=${oc.env:HOME} is used as written" in note
