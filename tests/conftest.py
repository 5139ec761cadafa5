"""Shared fixtures: one thread, small figures, no network, and tiny runs that are trained once for all tests.

A test that changes a run's folder copies it first.
"""

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from t2i_lm.plots import panels
from t2i_lm.storage.run_folder import Run, read_run, run_folders
from tests.decoders import tiny_decoder
from tests.evaluation.tiny_tasks import TEXT, write_tasks
from tests.runs import EXPERIMENTS, PRETRAINED, QUICK, SCRATCH, coco_arguments, train
from tests.small_reports import use_small_reports

# A test that uses one of these is a test of a whole run.
RUNS = {"pretrained", "scratch", "guided", "probed", "measured", "language_model"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of whole runs as slow; files that have more of those come first, so that workers end together."""
    slow: dict[Path, int] = {}
    for item in items:
        if RUNS & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        slow[item.path] = slow.get(item.path, 0) + (item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(autouse=True, scope="session")
def _quick() -> None:
    torch.set_num_threads(1)
    use_small_reports()
    panels.DPI = 100


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine may be reached: rank-to-rank traffic, never a hub."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        if host not in ("local", "localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {host}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference outputs and real data that T2I_LM_SHARED names; without it, their tests are skipped."""
    name = os.environ.get("T2I_LM_SHARED")
    if not name:
        pytest.skip("T2I_LM_SHARED is not set")
    folder = Path(name)
    assert folder.is_dir(), f"T2I_LM_SHARED={name}: no such folder"
    return folder


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Makes a folder of a name that all workers of pytest-xdist share: the first to ask fills it, others wait."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def filled(name: str, fill: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return filled


@pytest.fixture(scope="session")
def tiny(once: Once) -> list[str]:
    """Overrides that shrink a demo experiment to seconds: real parts, tiny and untrained, in a folder of their own."""
    from t2i_lm.config.image_tokenizer import VQModelConfig
    from t2i_lm.data.scenes.source import SceneSource
    from t2i_lm.models.open_lm import save_open_lm
    from t2i_lm.tokenizers.text import train_sentencepiece
    from t2i_lm.tokenizers.vq import PatchedVQ, save_tokenizer

    def write(folder: Path) -> None:
        scenes = SceneSource(400, "train", 0)
        text = train_sentencepiece((scenes[i].captions[0] for i in range(400)), 512, folder / "text.model")
        decoder = tiny_decoder(seed=5, seq_len=16, vocab_size=text.vocab_size)
        save_open_lm(decoder, folder / "lm", torch.float32, {})
        torch.manual_seed(0)
        vq = PatchedVQ(VQModelConfig(block_out_channels=[16, 16], codes=32))
        save_tokenizer(vq, folder / "vq", torch.float32)

    folder = once("tiny", write)
    return [
        f"backbone.path={folder}/lm",
        f"text_tokenizer.path={folder}/text.model",
        f"image_tokenizer.path={folder}/vq",
        f"data.cache_dir={folder}/cache",
        "data.train_size=60",
        "data.val_size=20",
        "data.batch_size=8",
        "optim.warmup_steps=2",
        "trainer.max_steps=8",
        "trainer.val_check_interval=4",
        "trainer.checkpoint_interval=2",
        "trainer.threads=1",
        "trainer.precision=32-true",
        "log.interval=2",
        "log.logger=none",
        "samples.prompts=2",
        "samples.preference_scenes=2",
        "forgetting.interval=null",
    ]


def newest(root: Path) -> Run:
    return read_run(run_folders(root)[-1])


@pytest.fixture(scope="session")
def pretrained(tiny: list[str], once: Once) -> Run:
    return newest(once("pretrained", lambda root: train(PRETRAINED, root, *tiny)))


@pytest.fixture(scope="session")
def scratch(tiny: list[str], once: Once) -> Run:
    return newest(once("scratch", lambda root: train(SCRATCH, root, *tiny)))


@pytest.fixture(scope="session")
def guided(tiny: list[str], once: Once) -> Run:
    """Trained with caption dropout, so that guidance has an empty caption to start from."""
    return newest(once("guided", lambda root: train(PRETRAINED, root, *tiny, *QUICK, "data.caption_dropout=0.2")))


@pytest.fixture(scope="session")
def book(once: Once) -> Path:
    """A text of three documents; a folder `tasks` is beside it."""

    def write(folder: Path) -> None:
        (folder / "book.txt").write_text("\f".join("\n\n".join(TEXT[start : start + 20]) for start in (0, 20, 40)))
        write_tasks(folder / "tasks")

    return once("book", write) / "book.txt"


@pytest.fixture(scope="session")
def probing(book: Path) -> list[str]:
    """Overrides that probe for forgetting."""
    return [
        "forgetting.interval=3",
        f"forgetting.text={book}",
        "forgetting.second_text=null",
        f"forgetting.tasks={book.parent / 'tasks'}",
        "forgetting.rows=6",
        "forgetting.length=32",
        "forgetting.completion_tokens=4",
    ]


@pytest.fixture(scope="session")
def probed(tiny: list[str], probing: list[str], once: Once) -> Run:
    more = [*tiny, *QUICK, *probing, "log.logger=tensorboard"]
    return newest(once("probed", lambda root: train(PRETRAINED, root, *more)))


@pytest.fixture(scope="session")
def inception_weights(once: Once) -> Path:
    """A file of random weights for torch-fidelity's Inception."""
    from tests.data.coco_folder import write_weights

    return once("inception", lambda folder: write_weights(folder / "weights.pth")) / "weights.pth"


@pytest.fixture(scope="session")
def coco(once: Once) -> Path:
    """Images and captions in COCO's layout."""
    from tests.data.coco_folder import write_coco

    return once("coco", lambda folder: write_coco(folder / "coco", 14)) / "coco"


@pytest.fixture(scope="session")
def measured(tiny: list[str], coco: Path, inception_weights: Path, once: Once) -> Run:
    """A run that measured its FID twice."""
    fid = [
        "fid.interval=4",
        f"fid.coco={coco}",
        f"fid.weights={inception_weights}",
        "fid.features=64",
        "fid.prompts=5",
    ]

    def make(root: Path) -> None:
        train(PRETRAINED, root, *tiny, *QUICK, *fid, f"data.cache_dir={root}/cache")

    return newest(once("measured", make))


@pytest.fixture(scope="session")
def evaluate_command(measured: Run, coco: Path, inception_weights: Path) -> list[str]:
    """Arguments of t2i_lm.evaluate for the COCO FID of that run."""
    return [
        *coco_arguments(measured.folder, coco, inception_weights),
        "--cache",
        str(measured.folder.parents[1] / "cache"),
    ]


@pytest.fixture(scope="session")
def language_model(once: Once) -> Path:
    """Run folder of a pre-trained language model."""

    def make(folder: Path) -> None:
        words = ["the", "a", "ship", "sea", "sailed", "over", "old", "man", "cold", "north", "wind", "and", "of"]
        books = "\f".join(
            "\n\n".join(" ".join(words[(n * k + k) % len(words)] for k in range(3, 60)) for n in range(20))
            for _ in range(30)
        )
        (folder / "books.txt").write_text(books)
        (folder / "lm.json").write_text(
            json.dumps(
                {
                    "hidden_dim": 32,
                    "n_layers": 2,
                    "n_heads": 2,
                    "seq_len": 64,
                    "vocab_size": 300,
                    "positional_embedding_type": "rotary",
                }
            )
        )
        arguments = [
            f"data.path={folder}/books.txt",
            f"data.val_path={folder}/books.txt",
            "data.max_recurring_share=1",
            f"data.cache_dir={folder}/cache",
            f"backbone.config={folder}/lm.json",
            "text_tokenizer.vocab_size=300",
            "data.length=32",
            "data.batch_size=8",
            "trainer.max_steps=30",
            "trainer.keep_steps=[10]",
            "optim.warmup_steps=3",
            "log.interval=5",
            "log.logger=csv",
        ]
        train(str(EXPERIMENTS / "text_lm.yaml"), folder / "runs", *arguments)

    return newest(once("language_model", make) / "runs").folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with one matching pair of synthetic runs."""
    from tests.plots.synthetic_runs import write_run

    root = tmp_path / "runs"
    write_run(root, "t2i_pretrained", "20260301-100000")
    write_run(root, "t2i_scratch", "20260301-110000")
    return root
