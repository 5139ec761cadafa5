"""Trained runs from Python: `t2i_lm.load`."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import t2i_lm
from t2i_lm.config.load import load_experiment, save_experiment
from t2i_lm.data.image_files import ORIENTATION
from t2i_lm.data.sources import open_sized
from t2i_lm.evaluation.trained_run import TrainedRun
from t2i_lm.export import main as export
from t2i_lm.sample import main as sample
from t2i_lm.storage.run_folder import Run, read_run
from t2i_lm.train import main as train
from tests.runs import PROMPT

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(guided: Run) -> Path:
    return guided.folder


@pytest.fixture(scope="module")
def trained(run: Path) -> TrainedRun:
    return t2i_lm.load(run.parent.parent)


def test_importing_the_package_imports_no_library() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import t2i_lm; seconds = time.perf_counter() - start;"
        "heavy = {'torch', 'lightning', 'pandas', 'numpy', 'PIL'} & set(sys.modules); assert not heavy, heavy;"
        "assert callable(t2i_lm.load); print(seconds)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


def test_a_folder_of_runs_is_its_newest(trained: TrainedRun, run: Path) -> None:
    assert trained.folder == run
    assert trained.config.name == "t2i_pretrained"
    assert trained.report == read_run(run).report
    assert repr(trained) == f"TrainedRun({str(run)!r}: t2i_pretrained, step 8 of 8, finished)"


def test_images_equal_those_of_the_sample_command(trained: TrainedRun, run: Path, tmp_path: Path) -> None:
    options = ["--each", "2", "--seed", "3", "--cfg", "2", "--top-p", "0.9", "--temperature", "0.8", "--top-k", "20"]
    prompts = [PROMPT, "a blue star"]
    assert sample(["--checkpoint", str(run), *prompts, *options, "--out", str(tmp_path / "out")]) == 0
    images = trained.sample(prompts, cfg=2.0, seed=3, top_p=0.9, temperature=0.8, top_k=20, each=2)
    files = sorted((tmp_path / "out").glob("0*.png"))
    assert len(images) == len(files) == 4
    for image, file in zip(images, files, strict=True):
        assert (np.asarray(image) == np.asarray(Image.open(file))).all()
    (alone,) = trained.sample(PROMPT)
    assert (np.asarray(alone) == np.asarray(trained.sample([PROMPT], seed=0)[0])).all()


def test_perplexity_of_the_validation_pairs_is_the_runs_own(trained: TrainedRun, tmp_path: Path) -> None:
    source = open_sized(trained.config.data, "val/iid", trained.config.image_tokenizer.size)
    pairs = [(source[index].image, source[index].captions[0]) for index in range(len(source))]
    measured = trained.perplexity(pairs)
    recorded = read_run(trained.folder).validations()[-1]["val"]
    assert measured.keys() == recorded.keys() == {"text", "image", "boundary", "all", "all_no_boundary"}
    for modality, entry in recorded.items():
        assert measured[modality]["nll"] == pytest.approx(entry["nll"], rel=1e-6)
        assert measured[modality]["ppl"] == pytest.approx(entry["ppl"], rel=1e-6)
        assert measured[modality]["count"] == entry["count"]
    files = []
    for number, (image, caption) in enumerate(pairs[:3]):
        image.save(tmp_path / f"{number}.png")
        files.append((tmp_path / f"{number}.png", f" {caption}\n"))  # training captions have no space around them
    assert trained.perplexity(files) == trained.perplexity(pairs[:3])


def test_an_opened_image_counts_as_its_file(trained: TrainedRun, tmp_path: Path) -> None:
    colors = np.random.default_rng(0).integers(0, 255, (64, 80, 4), np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(colors, "RGBA").save(tmp_path / "transparent.png")
    Image.fromarray(colors[..., 0].astype(np.uint16) * 256).save(tmp_path / "sixteen_bits.png")
    Image.fromarray(colors[..., :3]).save(tmp_path / "turned.jpg", exif=exif)
    for file in sorted(tmp_path.iterdir()):
        with Image.open(file) as image:
            assert trained.perplexity([(image, PROMPT)]) == trained.perplexity([(file, PROMPT)]), file
            assert image.getexif().get(ORIENTATION) == (6 if file.name == "turned.jpg" else None)
    with pytest.raises(ValueError, match="pairs: an image: 32-bit integer image"):
        trained.perplexity([(Image.new("I", (64, 64)), PROMPT)])


def test_metrics_have_a_row_per_record_and_modality(trained: TrainedRun) -> None:
    frame = trained.metrics()
    assert list(frame.columns) == [
        *("step", "samples", "tokens_nominal", "tokens_real", "lr", "split", "modality"),
        *("nll", "ppl", "nll_ema", "ppl_ema", "count"),
    ]
    records = read_run(trained.folder)
    assert len(frame) == 5 * (len(records.records("train")) + 2 * len(records.validations()))
    last = frame.query("split == 'val/compositional' and modality == 'image'").iloc[-1]
    recorded = records.validations("compositional")[-1]
    assert (last["step"], last["nll"], last["count"]) == (8, recorded["val"]["image"]["nll"], 20 * 64)
    assert frame.query("split == 'val/iid'")["nll_ema"].isna().all()
    assert frame.query("split == 'train'")["nll_ema"].notna().all()


def test_the_model_and_its_tokenizers_are_read_once(run: Path) -> None:
    trained = t2i_lm.load(str(run))
    text, image = trained.tokenizers
    assert trained.model is trained.model
    assert not trained.model.training
    ids_BT = torch.tensor([text.encode(PROMPT)])
    with torch.no_grad():
        assert trained.model(ids_BT).shape == (1, ids_BT.shape[1], text.vocab_size + 7 + image.vocab_size)


def test_perplexity_of_an_unconditional_run_in_bfloat16_is_the_runs_own(tiny: list[str], tmp_path: Path) -> None:
    quick = ["samples.prompts=0", "trainer.max_steps=3", "trainer.val_check_interval=3"]
    changes = [*tiny, *quick, "trainer.precision=bf16-mixed", f"run.dir={tmp_path}"]
    assert train([str(ROOT / "experiments" / "uncond_scratch.yaml"), *changes]) == 0
    trained = t2i_lm.load(tmp_path)
    source = open_sized(trained.config.data, "val/iid", trained.config.image_tokenizer.size)
    measured = trained.perplexity((source[index].image, "") for index in range(len(source)))
    recorded = read_run(trained.folder).validations()[-1]["val"]
    for modality, entry in recorded.items():
        assert measured[modality]["nll"] == pytest.approx(entry["nll"], rel=1e-6)
    with pytest.raises(ValueError, match="generates images without prompts"):
        trained.sample([PROMPT])


@pytest.mark.parametrize("name", ["align", "text_lm", "image_tokenizer"])
def test_a_run_of_another_task_is_refused(name: str, tmp_path: Path) -> None:
    save_experiment(load_experiment(ROOT / "experiments" / f"{name}.yaml", "demo"), tmp_path / "config.yaml")
    trained = t2i_lm.load(tmp_path)
    assert "step 0 of" in repr(trained)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000006.ckpt").touch()
    assert "step 6 of" in repr(trained)
    assert trained.report is None
    message = f"is a run of task={trained.config.task}; expected text_to_image or unconditional"
    with pytest.raises(ValueError, match=message):
        trained.sample([PROMPT])
    with pytest.raises(ValueError, match=message):
        trained.perplexity([(Image.new("RGB", (64, 64)), PROMPT)])
    if name == "image_tokenizer":
        with pytest.raises(ValueError, match="has no modalities"):
            trained.metrics()
    else:
        assert trained.metrics().empty


def test_bad_arguments_are_named(trained: TrainedRun, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="each=0: expected at least 1"):
        trained.sample([PROMPT], each=0)
    with pytest.raises(ValueError, match="prompts: expected at least one"):
        trained.sample([])
    with pytest.raises(ValueError, match="at most 42 fit"):
        trained.sample(["word " * 200])
    with pytest.raises(ValueError, match=r"top_p=2\.0: expected a value in"):
        trained.sample([PROMPT], top_p=2.0)
    with pytest.raises(ValueError, match="pairs: expected at least one"):
        trained.perplexity([])
    with pytest.raises(ValueError, match=r"pairs: .*absent\.png: missing file"):
        trained.perplexity([(tmp_path / "absent.png", PROMPT)])


def test_a_missing_folder_and_one_without_runs_list_the_contents(run: Path, tmp_path: Path) -> None:
    root = run.parent.parent
    with pytest.raises(ValueError, match=rf"no such folder; {root} holds t2i_pretrained"):
        t2i_lm.load(root / "t2i_scratch" / "newest")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"is not a run folder and contains none .*; it holds notes\.txt"):
        t2i_lm.load(tmp_path)


def test_the_document_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    Path("runs").symlink_to(run.parent.parent)
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "bash"}
    namespace: dict[str, object] = {}
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "docs/python.md", "exec"), namespace)
        else:
            for line in code.splitlines():
                command = shlex.split(line)
                assert command[:3] == ["python", "-m", "t2i_lm.export"]
                assert export(command[3:]) == 0
