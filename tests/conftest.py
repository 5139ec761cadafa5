"""Shared fixtures: one thread, no network, the reference files where they are present."""

import socket
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine may be reached: rank-to-rank traffic, never a hub."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        if host not in ("local", "localhost", "127.0.0.1", "::1"):
            raise OSError(f"a test tried to reach {host}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference outputs and real data beside the project; tests that need them are skipped without."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that shrink a demo experiment to seconds: real parts, tiny and untrained, in a folder of their own."""
    from t2i_lm.config.sections import VQModelConfig
    from t2i_lm.data.scenes.source import SceneSource
    from t2i_lm.models.decoder import Decoder
    from t2i_lm.models.open_lm import decoder_config, save_open_lm
    from t2i_lm.tokenizers.text import train_sentencepiece
    from t2i_lm.tokenizers.vq import PatchedVQ, save_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    scenes = SceneSource(400, "train", 0)
    text = train_sentencepiece((scenes[i].captions[0] for i in range(400)), 512, folder / "text.model")
    decoder = Decoder(
        decoder_config(
            {
                "hidden_dim": 32,
                "n_layers": 2,
                "n_heads": 2,
                "seq_len": 16,
                "vocab_size": text.vocab_size,
                "positional_embedding_type": "rotary",
            }
        )
    )
    decoder.reset_parameters(torch.Generator().manual_seed(5))
    save_open_lm(decoder, folder / "lm", torch.float32, {})
    torch.manual_seed(0)
    vq = PatchedVQ(VQModelConfig(block_out_channels=[16, 16], codes=32))
    save_tokenizer(vq, folder / "vq", torch.float32)
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
    ]


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights for torch-fidelity's Inception."""
    from tests.data.coco_folder import write_weights

    return write_weights(tmp_path_factory.mktemp("inception") / "weights.pth")
