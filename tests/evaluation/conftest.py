"""A text tokenizer and an expanded decoder for probes."""

import pytest
import torch

from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.tokenizers.text import SentencePieceTokenizer, train_sentencepiece
from tests.decoders import tiny_decoder
from tests.evaluation.tiny_tasks import TEXT


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_sentencepiece(iter(TEXT), 300, tmp_path_factory.mktemp("text") / "text.model")


@pytest.fixture
def bare(text: SentencePieceTokenizer) -> Decoder:
    """Before expansion."""
    return tiny_decoder(seed=1, seq_len=64, vocab_size=text.vocab_size).eval()


@pytest.fixture
def decoder(bare: Decoder) -> Decoder:
    expand_vocabulary(bare, 40, torch.Generator().manual_seed(2))
    return bare.eval()
