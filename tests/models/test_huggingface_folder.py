"""Folders as users have them: read whole, or refused in one line that says why."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_lm.config.load import load_experiment
from t2i_lm.models.factory import huggingface_folder, weights_hashes
from t2i_lm.models.huggingface_folder import empty_huggingface, is_huggingface, load_huggingface
from t2i_lm.models.wrapped_names import ANYWHERE, OUTERMOST, renaming, unwrapped, unwrapped_state
from t2i_lm.train import main

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
SIZES |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0}
IDS_BT = torch.arange(20).view(2, 10) * 3
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def save(folder: Path, kind: str = "CausalLM", config: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    own = getattr(transformers, f"{config}Config")(**SIZES | more)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(own)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder)
    return model


def change(folder: Path, how: Change) -> None:
    """Rewrites the tensors and the config of a folder."""
    state, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    how(state, config)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        load_huggingface(folder)
    assert "\n" not in str(raised.value)
    return str(raised.value).replace(str(folder), "FOLDER")


def put(**values: Any) -> Change:
    return lambda state, config: config.update(values)


def add(name: str, *shape: int) -> Change:
    return lambda state, config: state.update({name: torch.ones(*shape)})


def drop(name: str) -> Change:
    def how(state: dict[str, Tensor], config: dict[str, Any]) -> None:
        del state[name]

    return how


@pytest.mark.parametrize(
    ("more", "how", "message"),
    [
        (
            {"num_hidden_layers": 3},
            put(num_hidden_layers=2),
            "FOLDER has 9 tensors (model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
            "model.layers.2.mlp.gate_proj.weight, ...) that LlamaForCausalLM with its config.json does not use",
        ),
        ({"attention_bias": True}, put(attention_bias=False), "8 tensors (model.layers.0.self_attn.k_proj.bias, "),
        (
            {},
            put(tie_word_embeddings=True),
            "FOLDER has a tensor lm_head.weight of its own, but tie_word_embeddings=true in its config.json",
        ),
        ({}, add("score.weight", 3, 16), "has 1 tensor (score.weight) that LlamaForCausalLM with its config"),
        ({}, drop("model.norm.weight"), "lacks 1 tensor (model.norm.weight) of LlamaForCausalLM"),
        ({}, put(intermediate_size=48), "has 6 tensors (model.layers.0.mlp.down_proj.weight, "),
        ({}, put(quantization_config={"quant_method": "gptq", "bits": 4}), "has quantized weights (gptq)"),
        ({}, put(quantization_config={"quant_method": "nosuch"}), "has quantized weights (nosuch)"),
        ({}, put(compression_config={"quant_method": "fp8"}), "has quantized weights (fp8)"),
        (
            {},
            put(model_type="mine", auto_map={"AutoConfig": "configuration_x.XConfig"}),
            "has model_type='mine', which transformers "
            f"{transformers.__version__} does not have; its own code (auto_map) is never run",
        ),
        ({}, put(model_type="mine"), f"transformers {transformers.__version__} does not have"),
        ({}, put(model_type="t5", architectures=["T5Model"]), "FOLDER (T5Model) is an encoder-decoder"),
        ({}, put(model_type="clip", architectures=["CLIPModel"]), "FOLDER (CLIPModel) is no causal language model"),
        ({}, put(model_type="gemma3"), "(LlamaForCausalLM) wraps a language model with other modalities"),
        ({}, put(hidden_size="wide"), "FOLDER/config.json cannot be read by transformers: "),
    ],
)
def test_weights_and_configs_that_do_not_belong_together_are_refused(
    more: dict[str, Any], how: Change, message: str, tmp_path: Path
) -> None:
    save(tmp_path / "model", **more)
    change(tmp_path / "model", how)
    assert message in refusal(tmp_path / "model")


def test_the_head_of_a_classifier_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model", "SequenceClassification")
    message = (
        "lacks 1 tensor (lm_head.weight) of LlamaForCausalLM; it has 1 tensor (score.weight) that LlamaForCausalLM "
    )
    assert message in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("config", "extras"),
    [
        ("Llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)}),
        ("GPT2", {"transformer.h.0.attn.bias": (1, 1, 64, 64)}),
        ("GPTNeoX", {"gpt_neox.layers.0.attention.bias": (64,), "gpt_neox.layers.0.attention.masked_bias": (1,)}),
    ],
)
def test_what_transformers_declares_as_obsolete_is_passed_over(
    config: str, extras: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    model = save(tmp_path / "model", config=config)
    for name, shape in extras.items():
        change(tmp_path / "model", add(name, *shape))
    backbone = load_huggingface(tmp_path / "model").eval()
    assert torch.allclose(backbone(IDS_BT), model(IDS_BT).logits, atol=1e-5)


def test_equal_rows_twice_in_a_tied_model_are_read(tmp_path: Path) -> None:
    model = save(tmp_path / "model", tie_word_embeddings=True)
    change(
        tmp_path / "model",
        lambda state, config: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}),
    )
    backbone = load_huggingface(tmp_path / "model").eval()
    assert backbone.config.weight_tying
    assert torch.allclose(backbone(IDS_BT), model(IDS_BT).logits, atol=1e-5)


@pytest.mark.parametrize(
    "form", ["bin", "sharded", "float16", "bfloat16", "_orig_mod.", "module.", "module._orig_mod."]
)
def test_forms_of_a_folder_are_read(form: str, tmp_path: Path) -> None:
    model, folder = save(tmp_path / "first"), tmp_path / "model"
    if form in ("float16", "bfloat16"):
        model = model.to(getattr(torch, form))
    model.save_pretrained(folder, **({"max_shard_size": "8KB"} if form == "sharded" else {}))
    if form == "bin":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif form.endswith("."):
        state = {form + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
        inner = "model.layers.1"  # one block compiled by itself
        state = {name.replace(inner, f"{inner}._orig_mod"): tensor for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (form == "sharded")
    backbone = load_huggingface(folder).eval()
    assert torch.allclose(backbone(IDS_BT), model.float()(IDS_BT).logits, atol=1e-5)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a busy machine
@given(
    st.lists(st.sampled_from(["model", "layers", "0", "norm", "modules", "weight"]), min_size=1, max_size=5),
    st.lists(st.sampled_from([*ANYWHERE, OUTERMOST]), max_size=4),
    st.lists(st.tuples(st.integers(0, 5), st.sampled_from(ANYWHERE)), max_size=4),
)
def test_wrappers_leave_names_in_any_nesting(parts: list[str], outer: list[str], inner: list[tuple[int, str]]) -> None:
    wrapped = list(parts)
    for place, wrapper in inner:
        wrapped.insert(min(place, len(wrapped) - 1), wrapper)  # around a module, never after a tensor's own name
    name = ".".join([*outer, *wrapped])
    assert unwrapped(name) == ".".join(parts)
    for pattern, replacement in renaming().items():
        name = re.sub(pattern, replacement, name)
    assert name == ".".join(parts)


def test_two_tensors_of_one_name_are_refused() -> None:
    state = {"module.a": torch.zeros(1), "_orig_mod.a": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"tensors module\.a and _orig_mod\.a in x\.pt have one name, a, without wrap"):
        unwrapped_state(state, "x.pt")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's own calls
def test_an_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    save(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "adapter"
    assert is_huggingface(folder)
    merged = load_huggingface(folder).eval()
    assert torch.allclose(merged(IDS_BT), adapted(IDS_BT).logits, atol=1e-5)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert empty_huggingface(folder).config.n_layers == 2
    overrides = [f"backbone.path={folder}"]
    hashes = weights_hashes(load_experiment(ROOT / "experiments" / "t2i_pretrained.yaml", "demo", overrides))
    assert set(hashes or ()) == {"adapter_model.safetensors", "base/model.safetensors"}
    state = load_file(folder / "adapter_model.safetensors")
    save_file({**state, "base_model.model.model.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")
    assert "has unused 1 tensor (base_model.model.model.x.lora_A.weight)" in refusal(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for named in ("meta-llama/Llama-3.1-8B", None):
        (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        own = f"is a peft adapter of {named or 'no named model'}, which is no folder of a model; set base_model_name_or"
        assert own in refusal(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.gguf", "/model.gguf: .gguf files are not read; expected a transformers folder with safetensors"),
        ("model.safetensors", "/model.safetensors: a file of a transformers model; give its folder, "),
    ],
)
def test_files_are_named_with_what_is_read_instead(name: str, message: str, tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / name).touch()
    config = load_experiment(ROOT / "experiments" / "t2i_pretrained.yaml", "demo", [f"backbone.path={tmp_path / name}"])
    with pytest.raises(ValueError, match=r"backbone\.path=") as raised:
        huggingface_folder(config)
    assert message in str(raised.value)


def test_a_folder_without_weights_is_named_with_what_it_has(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.gguf")
    assert refusal(tmp_path).endswith("; the folder has .gguf")


def test_a_refusal_is_one_line_before_any_data_is_prepared(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "model", vocab_size=512, max_position_embeddings=128)
    change(tmp_path / "model", put(num_hidden_layers=1))
    overrides = [f"backbone.path={tmp_path}/model", f"data.cache_dir={tmp_path}/cache"]
    assert main([str(ROOT / "experiments" / "t2i_pretrained.yaml"), *tiny, *overrides]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "has 9 tensors (model.layers.1.input_layernorm.weight, " in line
    assert not (tmp_path / "cache").exists()
