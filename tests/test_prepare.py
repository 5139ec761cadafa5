import hashlib
import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceTrainer

from t2i_lm.config.load import load_experiment
from t2i_lm.data.shards.format import read_index
from t2i_lm.data.shards.parts import open_split
from t2i_lm.data.shards.prepare import cut, prepare_pairs, prepare_text
from t2i_lm.data.shards.tokenize import encode_images, text_rows
from t2i_lm.data.sources import open_source
from t2i_lm.experiment.build import ImageExperiment, build, open_image, open_text
from t2i_lm.prepare import main
from t2i_lm.tokenizers.text import SentencePieceTokenizer, open_text_tokenizer, train_sentencepiece
from t2i_lm.tokenizers.vq import VQTokenizer

ROOT = Path(__file__).parents[1]
PRETRAINED = str(ROOT / "experiments" / "t2i_pretrained.yaml")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Sixty images, three of which cannot be used."""
    rng, rows = np.random.default_rng(0), []
    for number in range(60):
        pixels = rng.integers(0, 256, (70, 70, 3), dtype=np.uint8)
        # BMP, whose bytes, and so the split, are the same with every version of Pillow.
        Image.fromarray(pixels).save(tmp_path / f"{number}.png", "BMP")
        rows.append({"file_name": f"{number}.png", "captions": ["a red circle.", "a ring."]})
    (tmp_path / "7.png").write_bytes(b"broken")
    (tmp_path / "8.png").unlink()
    rows[9]["captions"] = []
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def overrides(tiny: list[str], photographs: Path, share: float) -> list[str]:
    kept = [item for item in tiny if not item.startswith(("data.train_size", "data.val_size"))]
    changed = ["data.source=image_folder", f"data.path={photographs}", f"data.max_reject_share={share}"]
    return [*kept, *changed, f"data.cache_dir={photographs}/cache", "data.train_size=null", "data.val_size=null"]


def test_unusable_samples_are_counted_by_reason(
    tiny: list[str], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_experiment(PRETRAINED, "demo", overrides(tiny, photographs, 0.1))
    text = SentencePieceTokenizer(str(config.text_tokenizer.path))
    image = VQTokenizer.from_folder(Path(str(config.image_tokenizer.path)), 64)
    folder = prepare_pairs(config, text, image)
    entry = (read_index(folder) or {})["splits"]["train"]
    assert entry["rejects"] == {"not an image": 1, "missing file": 1, "no caption": 1}
    assert entry["rows"] == 58 - 3
    assert "7.png" in capsys.readouterr().err
    split = open_split(folder, "train")
    assert split[0]["image_ids"].shape == (64,)
    assert text.decode(split[0]["text_ids"][1]) == "a ring."


def test_one_of_several_processes_prints_the_result(
    tiny: list[str],
    photographs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank, lines in ((1, 0), (0, 1)):
        monkeypatch.setenv("RANK", str(rank))
        assert main([PRETRAINED, *overrides(tiny, photographs, 0.1)]) == 0
        assert capsys.readouterr().out.count("data hash") == lines


def test_too_many_unusable_samples_stop_the_preparation(
    tiny: list[str], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PRETRAINED, *overrides(tiny, photographs, 0.01)]) == 2
    error = capsys.readouterr().err
    assert "3 of 58 train samples cannot be used" in error
    assert "data.max_reject_share=0.01" in error


def test_too_many_unusable_samples_refuse_shards_that_are_reused(
    tiny: list[str], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([PRETRAINED, *overrides(tiny, photographs, 0.1)]) == 0
    assert main([PRETRAINED, *overrides(tiny, photographs, 0.1)]) == 0
    capsys.readouterr()
    assert main([PRETRAINED, *overrides(tiny, photographs, 0.01)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 of 58 train samples cannot be used: 1 " in error
    assert error.endswith("data.max_reject_share=0.01 allows fewer. Raise it, or repair the samples")
    folder = next((photographs / "cache").glob("image_folder-*/index.json")).parent
    elsewhere = ["data.source=shards", f"data.path={folder}"]
    for share, code in ((0.1, 0), (0.01, 2)):
        assert main([PRETRAINED, *overrides(tiny, photographs, share), *elsewhere]) == code
    assert f"data.path={folder}: 3 of 58 train samples cannot be used" in capsys.readouterr().err


def test_shards_are_prepared_once_and_a_damaged_one_is_named(tiny: list[str], tmp_path: Path) -> None:
    config = load_experiment(PRETRAINED, "demo", [*tiny, f"data.cache_dir={tmp_path}"])
    text = SentencePieceTokenizer(str(config.text_tokenizer.path))
    image = VQTokenizer.from_folder(Path(str(config.image_tokenizer.path)), 64)
    folder = prepare_pairs(config, text, image)
    stamp = (folder / "index.json").stat().st_mtime_ns
    assert prepare_pairs(config, text, image) == folder
    assert (folder / "index.json").stat().st_mtime_ns == stamp
    shard = next((folder / "train").glob("*/*.arrow"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"{shard.name} is damaged"):
        open_split(folder, "train")


def test_text_rows_cover_every_token_once_as_a_target(tmp_path: Path) -> None:
    documents = [f"Paragraph {n} of a book.\n\nAnother one." for n in range(30)]
    text = train_sentencepiece(iter(documents), 350, tmp_path / "text.model")
    rows = list(text_rows(documents, text, 16))
    ids = [int(rows[0]["text_ids"][0])] + [i for row in rows for i in row["text_ids"][1:]]
    whole: list[int] = []
    for document in documents:
        for paragraph in document.split("\n\n"):
            whole += text.encode(f"{paragraph}\n\n")
        whole.append(text.document_end)
    assert ids == whole[: len(ids)]
    assert len(whole) - len(ids) < 17
    size = sum(len(f"{paragraph}\n\n") for document in documents for paragraph in document.split("\n\n"))
    assert sum(row["bytes"] for row in rows) == pytest.approx(size, rel=0.05)


def test_a_paragraph_of_which_a_tokenizer_makes_nothing_is_passed_over(tmp_path: Path) -> None:
    sentences = iter(["some words of a text", "other words"] * 20)
    model = str(tmp_path / "own")  # by sentencepiece's default normalization, which drops such characters
    SentencePieceTrainer.train(
        sentence_iterator=sentences, model_prefix=model, vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    text = open_text_tokenizer(f"{model}.model")
    assert text.encode("\u200b\n\n") == []
    plain, strange = ["some words\n\nother words"] * 4, ["some words\n\n\u200b\n\n\x01\n\nother words"] * 4
    rows, expected = (list(text_rows(documents, text, 4)) for documents in (strange, plain))
    assert [row["text_ids"] for row in rows] == [row["text_ids"] for row in expected]
    size = sum(len(f"{document}\n\n".encode()) for document in strange)
    assert sum(row["bytes"] for row in rows) == pytest.approx(size, abs=20)


def test_a_long_paragraph_is_tokenized_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i_lm.data.shards.tokenize.MAX_CHARACTERS", 50)
    monkeypatch.setattr("t2i_lm.tokenizers.text.MAX_CHARACTERS", 50)
    documents = ["A paragraph of many words and no blank line, such as that of WikiText.\n" * 9, "x" * 170]
    text = train_sentencepiece(iter([*documents, "a b c"]), 300, tmp_path / "text.model")
    rows = list(text_rows(documents, text, 4))
    ids = [int(rows[0]["text_ids"][0])] + [i for row in rows for i in row["text_ids"][1:]]
    words = "".join(text.decode(ids).split())
    assert "".join("".join(documents).split()).startswith(words.replace("</s>", ""))
    size = sum(len(f"{document}\n\n".encode()) for document in documents)
    assert sum(row["bytes"] for row in rows) == pytest.approx(size, rel=0.05)


def test_a_text_experiment_trains_its_tokenizer_once(tmp_path: Path) -> None:
    books = "\f".join(f"Once upon a time there were {n} ships.\n\nThey sailed." for n in range(200))
    (tmp_path / "books.txt").write_text(books)
    (tmp_path / "heldout.txt").write_text(books.replace("ships", "boats"))
    changes = [f"data.path={tmp_path}/books.txt", f"data.val_path={tmp_path}/heldout.txt", f"data.cache_dir={tmp_path}"]
    experiment = ROOT / "experiments" / "text_lm.yaml"
    config = load_experiment(experiment, "demo", [*changes, "text_tokenizer.vocab_size=512", "data.length=32"])
    folder, text = prepare_text(config)
    assert text.vocab_size == 512
    assert prepare_text(config)[1].sha256 == text.sha256
    assert open_split(folder, "val")[:2]["text_ids"].shape == (2, 33)


def test_text_without_a_held_out_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "books.txt").write_text("words")
    experiment = str(ROOT / "experiments" / "text_lm.yaml")
    assert main([experiment, f"data.path={tmp_path}/books.txt", f"data.cache_dir={tmp_path}"]) == 2
    assert "data.val_path" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, str]:
    """sha256 of every file that a preparation leaves."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_preparation_killed_five_times_equals_an_unbroken_one(tiny: list[str], tmp_path: Path) -> None:
    changes = [*tiny, "data.train_size=400", "data.part_size=40"]
    assert main([PRETRAINED, *changes, f"data.cache_dir={tmp_path}/whole"]) == 0
    whole = next((tmp_path / "whole").glob("scenes-*/"))
    arguments = [PRETRAINED, *changes, f"data.cache_dir={tmp_path}/killed"]
    fork, killed = multiprocessing.get_context("fork"), tmp_path / "killed" / whole.name
    rng = random.Random(0)
    for kill in range(5):
        process = fork.Process(target=main, args=(arguments,))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and len(list(killed.glob("train/part-?????"))) < kill and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.join()
        assert not (killed / "index.json").exists(), "it was over before it could be killed"
    assert main(arguments) == 0
    assert contents(killed) == contents(whole)
    ids = [row["id"] for row in open_split(killed, "train")]
    assert len(ids) == len(set(ids)) == 400


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_processes_share_the_work(tiny: list[str], tmp_path: Path) -> None:
    changes = [*tiny, "data.train_size=400", "data.part_size=40"]
    assert main([PRETRAINED, *changes, f"data.cache_dir={tmp_path}/one"]) == 0
    fork = multiprocessing.get_context("fork")
    arguments = [PRETRAINED, *changes, f"data.cache_dir={tmp_path}/three"]
    processes = [fork.Process(target=main, args=(arguments,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, three = (next((tmp_path / name).glob("scenes-*/")) for name in ("one", "three"))
    assert contents(one) == contents(three)


def test_rejects_are_read_again_once_the_images_are_repaired(
    tiny: list[str], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [PRETRAINED, *overrides(tiny, photographs, 0.0)]
    assert main(arguments) == 2
    assert "data.max_reject_share=0.0 allows fewer" in capsys.readouterr().err
    for number in (7, 8):
        Image.new("RGB", (70, 70)).save(photographs / f"{number}.png")
    rows = [json.loads(line) for line in (photographs / "metadata.jsonl").read_text().splitlines()]
    rows[9]["captions"] = ["repaired"]
    (photographs / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert main(arguments) == 0


def test_every_caption_can_be_a_sample_of_its_own(tiny: list[str], photographs: Path) -> None:
    config = load_experiment(PRETRAINED, "demo", [*overrides(tiny, photographs, 0.1), "data.captions=all"])
    experiment = build(config)
    experiment.data.setup("fit")
    train_set = experiment.data.train_set
    assert len(train_set) == 2 * 55
    assert isinstance(experiment, ImageExperiment)
    batch = train_set.__getitems__([(0, 0), (0, 1), (0, 109)])["ids_BT"]
    texts = [experiment.text.decode([i for i in row.tolist() if i < experiment.text.vocab_size]) for row in batch]
    assert texts == ["a red circle.", "a ring.", "a ring."]
    first, second = (row[row > experiment.text.vocab_size + 7] for row in batch[:2])
    assert torch.equal(first, second)  # the same image


def test_ids_in_bfloat16_are_checked_before_they_are_used(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [*tiny, f"data.cache_dir={tmp_path}"]
    assert main([PRETRAINED, *changes, "--check"]) == 0
    share = float(capsys.readouterr().out.split("%")[0])
    assert 50 < share < 99.9  # of an untrained encoder
    assert main([PRETRAINED, *changes, "image_tokenizer.precision=bfloat16"]) == 2
    assert "at least 99.9% must" in capsys.readouterr().err
    assert not list(tmp_path.glob("scenes-*"))


def test_the_tokenizer_that_wrote_ids_in_bfloat16_encodes_in_float32_afterwards(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_lm.data.shards.prepare.MIN_EQUAL_IDS", 0.0)
    changes = [*tiny, f"data.cache_dir={tmp_path}", "image_tokenizer.precision=bfloat16"]
    config = load_experiment(PRETRAINED, "demo", changes)
    text, image = open_text(config), open_image(config)
    written = open_split(prepare_pairs(config, text, image), "train")["image_ids"]
    images = [read().image for read in cut(open_source(config.data, "train", 64), None, 10**6)[0][0]()]
    float32_BN, bfloat16_BN = (encode_images(image, map(np.asarray, images), low) for low in (False, True))
    assert np.array_equal(written, bfloat16_BN)
    assert not np.array_equal(float32_BN, bfloat16_BN)
    assert np.array_equal(encode_images(open_image(config), map(np.asarray, images)), float32_BN)


def test_a_part_without_usable_samples_is_written_and_skipped(tiny: list[str], photographs: Path) -> None:
    for number in range(41, 60):
        (photographs / f"{number}.png").write_bytes(b"broken")
    changes = [*overrides(tiny, photographs, 0.9), "data.part_size=10"]
    assert main([PRETRAINED, *changes]) == 0
    folder = next((photographs / "cache").glob("image_folder-*/index.json")).parent
    assert json.loads((folder / "train" / "part-00004" / "part.json").read_text())["rows"] == 0
    assert len(open_split(folder, "train")) == 59 - 3 - 19


def test_missing_held_out_text_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "books.txt").write_text("words")
    changes = [f"data.path={tmp_path}/books.txt", f"data.val_path={tmp_path}/absent.txt", f"data.cache_dir={tmp_path}"]
    given = "text_tokenizer.path=asset:lm_rotary/text_tokenizer.model"
    assert main([str(ROOT / "experiments" / "text_lm.yaml"), *changes, given, "data.length=2"]) == 2
    assert "absent.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "bad", "error"),
    [
        (0, (), "PATH"),
        (1, (), "PATH"),
        (2, (), None),
        (7, (), None),
        (10, (3,), "1 not an image"),
        (2, (0, 1), "PATH"),
    ],
)
def test_small_data_trains_or_is_refused_in_one_line(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], images: int, bad: tuple[int, ...], error: str
) -> None:
    rng = np.random.default_rng(0)
    rows = [{"file_name": f"{number}.png", "caption": "a cat"} for number in range(images)]
    for number in range(images):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    for number in bad:
        (tmp_path / f"{number}.png").write_bytes(b"no")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = main([PRETRAINED, *overrides(tiny, tmp_path, 0.01)])
    lines = capsys.readouterr().err.splitlines()
    assert code == (2 if error else 0)
    assert [line for line in lines if line.startswith("error: ")] == ([lines[-1]] if error else [])
    assert (error or "").replace("PATH", str(tmp_path)) in lines[-1]


def test_the_same_path_with_other_images_and_captions_is_prepared_anew(
    tiny: list[str], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [PRETRAINED, *overrides(tiny, photographs, 0.1)]
    hashes = []
    for caption in ("a red circle.", "a ring", "a red circle."):
        rows = [json.loads(line) for line in (photographs / "metadata.jsonl").read_text().splitlines()]
        captions = [{**row, "captions": [caption]} for row in rows]
        (photographs / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in captions))
        assert main(arguments) == 0
        said = capsys.readouterr()
        hashes.append(said.out.split("data hash ")[1].split()[0])
    assert hashes[0] == hashes[2] != hashes[1]
    assert "data: reusing" in said.err
    assert len(list((photographs / "cache").glob("image_folder-*/index.json"))) == 2


def test_images_on_both_sides_are_refused_unless_a_key_allows_them(
    tiny: list[str], photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "val").mkdir()
    shutil.copyfile(photographs / "1.png", photographs / "val" / "x.png")
    Image.effect_noise((70, 70), 80).save(photographs / "val" / "y.png")
    rows = [{"file_name": name, "caption": "a cat"} for name in ("x.png", "y.png")]
    (photographs / "val" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    train = photographs / "train"
    train.mkdir()
    for file in photographs.glob("*.*"):
        file.rename(train / file.name)
    arguments = [PRETRAINED, *overrides(tiny, photographs, 0.1)]
    assert main(arguments) == 2
    assert "1 of 2 validation images have the ids of a training image (the first: x.png, of 1.png)" in (
        capsys.readouterr().err
    )
    assert main([*arguments, "data.max_recurring_share=0.5"]) == 0
    assert "validation images that recur in training: 1\n" in capsys.readouterr().out
