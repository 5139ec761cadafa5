"""LoRA (extra `lora`): trainable parameters, zero initialization, merging into plain files."""

from pathlib import Path

import pytest
import torch

from t2i_lm.experiment.export import export
from t2i_lm.experiment.restore import load_trained
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.freeze import freeze
from t2i_lm.models.lora import add_adapters, merge_adapters
from t2i_lm.models.open_lm import decoder_config, load_open_lm
from t2i_lm.storage.run_folder import find_run
from t2i_lm.train import main

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]


def make_decoder() -> Decoder:
    sizes = {"hidden_dim": 32, "n_layers": 2, "n_heads": 2, "seq_len": 16, "vocab_size": 50}
    decoder = Decoder(decoder_config({**sizes, "positional_embedding_type": "rotary"}))
    decoder.reset_parameters(torch.Generator().manual_seed(1))
    expand_vocabulary(decoder, 8, torch.Generator().manual_seed(2))
    return decoder


def test_adapters_start_at_zero_and_only_they_and_new_rows_are_trainable() -> None:
    decoder, ids_BT = make_decoder(), torch.arange(10)[None]
    before, state = decoder(ids_BT), torch.get_rng_state()
    add_adapters(decoder, 2, 4.0, torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(decoder(ids_BT), before)
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    rows = {f"{matrix}.{block}" for matrix in ("tok_embeddings", "output") for block in ("special", "image")}
    assert {name for name in trainable if ".lora_" not in name} == rows
    assert len(trainable) == 4 + 2 * 4 * 2  # 4 blocks of rows; 2 layers x 4 linear layers x 2 factors
    again = make_decoder()
    add_adapters(again, 2, 4.0, torch.Generator().manual_seed(3))
    assert all(torch.equal(one, two) for one, two in zip(decoder.parameters(), again.parameters(), strict=True))


def test_a_frozen_layer_gets_no_adapter() -> None:
    decoder = make_decoder()
    freeze(decoder, ["attention"])
    add_adapters(decoder, 2, 4.0, torch.Generator())
    assert not any("attention" in name for name, _ in decoder.named_parameters() if ".lora_" in name)
    frozen = make_decoder()
    freeze(frozen, ["attention", "ffn"])
    with pytest.raises(ValueError, match=r"lora\.rank=2: every linear layer is frozen"):
        add_adapters(frozen, 2, 4.0, torch.Generator())


def test_merging_restores_the_plain_model_with_the_same_function() -> None:
    decoder, ids_BT = make_decoder(), torch.arange(10)[None]
    names = set(decoder.state_dict())
    add_adapters(decoder, 2, 4.0, torch.Generator())
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
        before = decoder(ids_BT)
        merge_adapters(decoder)
        assert set(decoder.state_dict()) == names
        assert torch.allclose(decoder(ids_BT), before, atol=1e-5)


def test_a_run_with_adapters_trains_reloads_and_exports_plain_weights(tiny: list[str], tmp_path: Path) -> None:
    experiment = str(ROOT / "experiments" / "remedies" / "lora.yaml")
    quick = ["samples.prompts=0", "samples.preference_scenes=0", "trainer.max_steps=4", "lora.rank=2"]
    assert main([experiment, *tiny, *quick, f"run.dir={tmp_path}"]) == 0
    run = find_run(tmp_path)
    trained = load_trained(run).module.decoder
    export(run, tmp_path / "out", "float32")
    plain = load_open_lm(tmp_path / "out", tmp_path / "out" / "config.json").eval()
    ids_BT = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids_BT), trained(ids_BT), atol=1e-5)
    assert "lora" in (run / "config.yaml").read_text()
