import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from t2i_lm.config.presets import PRESETS
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.open_lm import decoder_config, load_open_lm, load_open_lm_state, open_lm_state_dict, save_open_lm
from tests.decoders import TINY
from tests.decoders import tiny_decoder as tiny
from tests.models.open_lm_variants import BASE, IDS_BT, VARIANTS, figures, measure_upstream, weights

REFERENCES = ("head_rotary_default_norm", "rotary_gain_only", "rotary_qk_norm", "rotary_rms_tied")


@pytest.mark.parametrize("name", REFERENCES)
def test_logits_loss_and_gradients_equal_open_lms(name: str, shared: Path) -> None:
    folder = shared / "reference" / "open_lm" / name
    reference = load_file(folder / "reference.safetensors")
    decoder = load_open_lm(folder / "checkpoint.pt", folder / "config.json")
    ids_BT = reference["input_ids"].long()
    logits_BTV = decoder(ids_BT)
    scale = reference["logits"].abs().max()
    assert (logits_BTV - reference["logits"]).abs().max() <= 1e-5 * scale
    nll = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:])
    loss = nll.total / len(nll.nll_N)
    assert loss.item() == pytest.approx(reference["loss"].item(), rel=1e-6)
    loss.backward()
    renamed = {"tok_embeddings.weight": "tok_embeddings.text", "output.weight": "output.text"}
    gradients = dict(decoder.named_parameters(remove_duplicate=False))
    checked = 0
    for key, value in reference.items():
        if key.startswith("grad_norm."):
            parameter = key.removeprefix("grad_norm.")
            grad = gradients[renamed.get(parameter, parameter)].grad
            assert grad is not None
            assert grad.norm().item() == pytest.approx(value.item(), rel=1e-4), key
            checked += 1
    assert checked > 10


MEASURED = json.loads(Path(__file__).with_name("open_lm_variants.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_equals_upstreams_measured_numbers(name: str, tmp_path: Path) -> None:
    measured = MEASURED[name]
    config = BASE | VARIANTS[name]
    shapes = {key: value.shape for key, value in open_lm_state_dict(Decoder(decoder_config(config))).items()}
    state = weights({key: shapes[key] for key in measured["grad_norms"]})
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "upstream.pt")
    decoder = load_open_lm(tmp_path / "upstream.pt", config)
    logits_BTV = decoder(IDS_BT)
    loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), IDS_BT[:, 1:].flatten())
    loss.backward()
    ours = figures(logits_BTV.detach(), {})
    scale = logits_BTV.detach().abs().max().item()
    assert ours["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert ours["logits"] == pytest.approx(measured["logits"], abs=1e-5 * scale)
    own = {"tok_embeddings.weight": "tok_embeddings.text", "output.weight": "output.text"}
    parameters = dict(decoder.named_parameters())
    for key, norm in measured["grad_norms"].items():
        key = re.sub(r"_ff_w([12])", lambda found: f"feed_forward.{2 * int(found[1]) - 2}", own.get(key, key))
        grad = parameters[key].grad
        assert grad is not None
        assert grad.norm().item() == pytest.approx(norm, rel=1e-4, abs=1e-7), key


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
def test_names_of_wrapped_models_are_read(prefix: str, holder: str | None, tmp_path: Path) -> None:
    decoder = tiny()
    state = {f"{prefix}{name}": tensor for name, tensor in open_lm_state_dict(decoder).items()}
    state = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in state.items()}
    torch.save({holder: state, "epoch": 3} if holder else state, tmp_path / "model.pt")
    again = load_open_lm(tmp_path / "model.pt", vars(decoder.config)).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in decoder.state_dict().items())


@pytest.mark.parametrize(
    ("saved", "found"),
    [({"weights": {}, "epoch": 3}, "found weights, epoch"), ([1.0], "found list"), ({}, "found nothing")],
)
def test_a_checkpoint_without_tensors_is_named_with_what_it_has(saved: Any, found: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=f"at the top or in state_dict, model, module; {found}"):
        load_open_lm(tmp_path / "model.pt", vars(tiny().config))


def test_head_rotary_is_position_free_in_upstreams_own_code() -> None:
    assert MEASURED["head_rotary"]["loss"] == pytest.approx(MEASURED["none"]["loss"], rel=1e-6)
    assert abs(MEASURED["rotary"]["loss"] - MEASURED["none"]["loss"]) > 1e-3


@pytest.mark.skipif(not ("OPEN_LM" in os.environ or find_spec("open_lm")), reason="no open_lm: make open-lm")
@pytest.mark.filterwarnings("ignore")
def test_the_committed_numbers_are_upstreams() -> None:
    checkout = os.environ.get("OPEN_LM")
    for name, values in measure_upstream(Path(checkout) if checkout else None).items():
        for key in ("loss", "logits", "grad_norms"):
            assert values[key] == pytest.approx(MEASURED[name][key], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("ffn_type", ["swiglu", "gelu", "gemma_geglu"])
def test_upstreams_tensor_names_are_written_and_read_back(ffn_type: str, tmp_path: Path) -> None:
    decoder = tiny(ffn_type=ffn_type)
    save_open_lm(decoder, tmp_path, torch.float32, {})
    again = load_open_lm(tmp_path)
    assert ffn_type != "gelu" or "layers.0._ff_w2.weight" in load_file(tmp_path / "model.safetensors")
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("positional", ["rotary", "llama_rotary", "head_rotary", "none"])
def test_presets_load_by_name(positional: str) -> None:
    with torch.device("meta"):
        decoder = Decoder(decoder_config("open_lm_1b", positional_embedding_type=positional))
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 1_439_895_552
    assert decoder_config("open_lm_1b_old").positional_embedding_type == "head_rotary"


def test_saving_and_loading_keeps_every_weight(tmp_path: Path) -> None:
    decoder = tiny()
    save_open_lm(decoder, tmp_path, torch.float32, {"note": "test"})
    again = load_open_lm(tmp_path)
    assert again.config == decoder.config
    for name, tensor in open_lm_state_dict(decoder).items():
        assert torch.equal(tensor, open_lm_state_dict(again)[name]), name


def test_head_rotary_is_position_free() -> None:
    """The released open_lm-1b's positions: order enters only through the causal mask."""
    free, rotary = tiny("head_rotary"), tiny("rotary")
    ids_BT = torch.tensor([[1, 2, 3, 4, 5, 6]])
    swapped_BT = torch.tensor([[3, 1, 2, 5, 4, 6]])
    one_layer = tiny("head_rotary", n_layers=1)
    # With one layer, the last position sees a set: any order of the earlier tokens gives the same logits.
    assert torch.allclose(one_layer(ids_BT)[:, -1], one_layer(swapped_BT)[:, -1], atol=1e-5)
    one_rotary = tiny("rotary", n_layers=1)
    assert not torch.allclose(one_rotary(ids_BT)[:, -1], one_rotary(swapped_BT)[:, -1], atol=1e-3)
    assert rotary.rotary(4) is not None
    assert free.rotary(4) is None


@pytest.mark.parametrize("positional", ["rotary", "head_rotary"])
def test_cached_decoding_equals_full_recomputation(positional: str) -> None:
    decoder = tiny(positional)
    ids_BT = torch.randint(0, 50, (3, 20), generator=torch.Generator().manual_seed(1))
    cache = decoder.new_cache(3, 20)
    parts = [decoder.output(decoder.hidden(ids_BT[:, :12], cache))]
    parts += [decoder.output(decoder.next_hidden(ids_BT[:, t], cache))[:, None] for t in range(12, 20)]
    assert torch.allclose(torch.cat(parts, dim=1), decoder(ids_BT), atol=1e-5)


def test_initial_logits_have_variance_one() -> None:
    decoder = Decoder(decoder_config("demo_7m"))
    decoder.reset_parameters(torch.Generator().manual_seed(0))
    ids_BT = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(1))
    assert decoder(ids_BT).var().item() == pytest.approx(1.0, abs=0.1)


def test_positions_past_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len=24"):
        tiny()(torch.zeros(1, 25, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positional_embedding_type": "learned"}, "rotary, head_rotary, none"),
        ({"model_norm": "batch_norm"}, "default_layer_norm"),
        ({"n_heads": 3}, "hidden_dim=32"),
        ({"n_heads": 2.0}, r"n_heads=2.0: expected a whole number"),
        ({"weight_tying": "false"}, "weight_tying='false': expected true or false"),
        ({"qk_norm": 1}, "qk_norm=1: expected true or false"),
        ({"hiden_dim": 3}, "unknown key 'hiden_dim'"),
    ],
)
def test_a_wrong_model_config_names_key_and_choices(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config(TINY | {"positional_embedding_type": "rotary"} | change)


def test_the_positional_type_is_never_guessed() -> None:
    with pytest.raises(ValueError, match="positional_embedding_type"):
        decoder_config(TINY)


def test_a_tied_decoder_takes_no_embedding_and_output_that_differ() -> None:
    tied, other = tiny(weight_tying=True), tiny()
    state = open_lm_state_dict(other)
    with pytest.raises(ValueError, match="file has an embedding and an output of its own; expected weight_tying=false"):
        load_open_lm_state(tied, state, "file")
    load_open_lm_state(tied, state | {"output.weight": state["tok_embeddings.weight"]}, "file")
    assert torch.equal(tied.output.text, other.tok_embeddings.text)


def test_every_preset_can_be_built() -> None:
    assert all(decoder_config(name).hidden_dim for name in PRESETS)


def test_a_checkpoint_that_does_not_fit_names_the_tensor(tmp_path: Path) -> None:
    save_open_lm(tiny(), tmp_path, torch.float32, {})
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"layers\.2\.attention"):
        load_open_lm(tmp_path, config | {"n_layers": 3})
    with pytest.raises(ValueError, match=r"output\.text .* has shape"):
        load_open_lm(tmp_path, config | {"vocab_size": 51})


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Evil()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        load_open_lm(tmp_path / "model.pt", TINY | {"positional_embedding_type": "rotary"})
    assert not (tmp_path / "ran").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_open_lm(tiny(), tmp_path, torch.float32, {})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        load_open_lm(tmp_path)
