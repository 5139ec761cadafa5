"""Modality experts: the dense function at the start, text to the bit after training, groups, counts, generation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, DistilConfig, OptimConfig
from t2i_lm.models.backbone import Backbone
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.flops import flop_per_token, formula
from t2i_lm.models.freeze import freeze, group_members, group_sizes
from t2i_lm.models.fsdp import blocks_of
from t2i_lm.models.generate import Sampling, continue_text, generate
from t2i_lm.models.modality_experts import ExpertDecoder, add_modality_experts
from t2i_lm.models.packing import ModalitySplit
from t2i_lm.models.parameter_kinds import parameter_places
from t2i_lm.modules.base import DecoderModule
from t2i_lm.modules.distillation import DistilledModule
from t2i_lm.modules.optim import adamw
from t2i_lm.modules.text_to_image import TextToImageModule
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout
from tests.decoders import tiny_decoder

TEXT, IMAGES, LENGTH = 50, 12, 24
VOCAB = JointVocab(TEXT, IMAGES)
LAYOUT = Layout(VOCAB, 4, LENGTH)
CONFIG = ExperimentConfig(data=DataConfig(length=LENGTH))
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "norms": {"positional": "llama_rotary", "qk_norm": True, "model_norm": "rms_norm", "post_embed_norm": True},
    "tied": {"positional": "none", "weight_tying": True, "ffn_type": "gemma_geglu"},
}


def dense(variant: str = "rotary") -> Decoder:
    decoder = tiny_decoder(seed=1, **VARIANTS[variant])
    expand_vocabulary(decoder, IMAGES, torch.Generator().manual_seed(2))
    return decoder


def split(variant: str = "rotary", untied: bool = False) -> ExpertDecoder:
    """With modality experts; `untied` moves the image half away from the text half."""
    decoder = add_modality_experts(dense(variant), VOCAB.special("<image>"))
    if untied:
        draw = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in group_members(decoder, "image_expert").values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return decoder


def batch() -> Tensor:
    """Captions of several lengths with images, and plain text."""
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(3, TEXT, (size,), generator=generator).numpy() for size in (5, 8, 0)]
    pairs_BT = LAYOUT.pack(texts, torch.randint(IMAGES, (3, 4), generator=generator).numpy())
    return torch.cat([pairs_BT, torch.randint(3, TEXT, (1, LENGTH), generator=generator)])


def gradients(module: DecoderModule, ids_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total, nll_M, _ = module.sums(ids_BT)
    total.backward()
    return total, nll_M, {name: p.grad for name, p in module.decoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_halves_compute_the_dense_loss_and_share_its_gradient(variant: str, packing: bool) -> None:
    ids_BT = batch()
    total, nll_M, expected = gradients(TextToImageModule(dense(variant), CONFIG, LAYOUT), ids_BT)
    decoder = split(variant)
    if packing:
        decoder.enable_packing()
    decoder.enable_activation_checkpointing()
    other, other_nll_M, found = gradients(TextToImageModule(decoder, CONFIG, LAYOUT), ids_BT)
    assert other.item() == pytest.approx(total.item(), rel=1e-6)
    assert torch.allclose(other_nll_M, nll_M, rtol=1e-6)
    for name, gradient in expected.items():
        image = name.replace("attention", "image.attention") if "attention" in name else name
        image = image.replace("feed_forward", "image.feed_forward").replace("ffn_norm", "image.ffn_norm")
        if name.startswith(("norm", "post_embed_norm")):
            image = f"image_{name}"
        half = found[name] if image == name else found[name] + found[image]
        assert (half - gradient).norm() <= 2e-6 * gradient.norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_position_is_computed_by_the_half_of_its_id(variant: str) -> None:
    """Positions of one modality alone are those of the plain decoder made of that half."""
    decoder, ids_BT = split(variant, untied=True), batch()
    image = dense(variant)
    state = {
        name.replace(".image.", ".").removeprefix("image_"): value
        for name, value in decoder.state_dict().items()
        if ".image." in name or name.startswith(("image_", "tok_embeddings", "output"))
    }
    image.load_state_dict(state)
    codes_BT = ids_BT.remainder(IMAGES) + VOCAB.image_offset
    assert torch.equal(decoder.hidden(codes_BT), image.hidden(codes_BT))
    assert torch.equal(decoder.hidden(ids_BT[3:]), dense(variant).hidden(ids_BT[3:]))
    both = decoder.hidden(ids_BT)
    assert not torch.allclose(both[:3], dense(variant).hidden(ids_BT[:3]), atol=1e-3)
    assert not torch.allclose(both[:3], image.hidden(ids_BT[:3]), atol=1e-3)


def test_text_is_equal_to_the_bit_after_training_with_a_frozen_text_half() -> None:
    decoder, ids_BT = split("norms"), batch()
    text_BT = ids_BT[3:]
    before = decoder(text_BT)[..., :TEXT]
    freeze(decoder, ["text_expert", "text_rows"])
    optimizer = adamw(list(decoder.named_parameters()), OptimConfig(lr=0.1, weight_decay=0.5))
    module, start = TextToImageModule(decoder, CONFIG, LAYOUT), decoder(ids_BT)
    for _ in range(3):
        optimizer.zero_grad()
        module.sums(ids_BT)[0].backward()
        optimizer.step()
    assert torch.equal(decoder(text_BT)[..., :TEXT], before)
    assert not torch.allclose(decoder(ids_BT), start, atol=0.1)
    moved = group_members(decoder, "image_expert").values()
    assert all(parameter in optimizer.state for parameter in moved)


def test_a_batch_of_plain_text_gives_the_image_half_zero_gradients() -> None:
    """DDP waits for a gradient of every trainable parameter."""
    decoder = split()
    _, _, found = gradients(TextToImageModule(decoder, CONFIG, LAYOUT), batch()[3:])
    for name in group_members(decoder, "image_expert"):
        assert not found[name].any()


def test_groups_are_the_halves_and_the_kinds_of_the_dense_model() -> None:
    decoder, plain = split("norms"), dense("norms")
    sizes, before = ({size.name: size.parameters for size in group_sizes(model)} for model in (decoder, plain))
    rows = before["embedding"] + before["output"]
    assert sizes["text_expert"] == sizes["image_expert"] == before["all"] - rows
    assert {name: 2 * before[name] for name in ("norm", "attention", "ffn", "first_half", "second_half")} == {
        name: sizes[name] for name in ("norm", "attention", "ffn", "first_half", "second_half")
    }
    assert not {"text_expert", "image_expert"} & before.keys()
    assert {place.expert for place in parameter_places(plain)} == {None}
    freeze(decoder, ["image_expert", "norm"])
    trainable = {name for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert not any("image." in name or "norm" in name for name in trainable)
    assert "layers.1.attention.in_proj.weight" in trainable
    with pytest.raises(ValueError, match=r"group text_expert: matches no parameter.*requires modality_experts=true"):
        freeze(plain, ["text_expert"])


def test_a_position_costs_as_much_as_in_the_dense_model() -> None:
    decoder, plain = split("norms"), dense("norms")
    assert flop_per_token(decoder, LENGTH) == flop_per_token(plain, LENGTH)
    assert "one of two modality experts" in formula(decoder, LENGTH, None)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bucket", [1, 8])
def test_cached_generation_equals_the_whole_sequence(variant: str, bucket: int) -> None:
    decoder, plain = split(variant, untied=True).eval(), split(variant, untied=True).eval()
    decoder.bucket = bucket
    ids_BT = batch()
    prompts = [torch.from_numpy(LAYOUT.prompt(ids_BT[row, 2 : 2 + size].numpy())) for row, size in ((0, 5), (1, 8))]
    codes_BN = generate(decoder, VOCAB, prompts, 4, sampling=Sampling(guidance=2.0), null_prompt=prompts[0][-4:])
    for prompt, codes_N in zip(prompts, codes_BN, strict=True):
        sequence = torch.cat([prompt, codes_N + VOCAB.image_offset])
        logits, null = (
            plain(ids[None, :-1])[0, -4:, VOCAB.image_offset :]
            for ids in (sequence, torch.cat([prompts[0][-4:], sequence[-4:]]))
        )
        assert torch.equal((null + 2 * (logits - null)).argmax(-1), codes_N)
    for all_rows in (False, True):
        text = continue_text(decoder, prompts[0], 6, stop=-1, all_rows=all_rows)
        for step in range(6):
            logits_V = plain(torch.cat([prompts[0], text[:step]])[None])[0, -1]
            assert int(logits_V[: None if all_rows else TEXT].argmax()) == int(text[step])


def test_compiled_steps_are_those_of_the_image_half(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = split(untied=True).eval()
    compiled: list[object] = []

    def compile_step(step: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(block: object, *more: object) -> Tensor:
            compiled.append(block)
            return step(block, *more)

        return run

    monkeypatch.setattr(torch, "compile", compile_step)
    decoder.compile_steps()
    prompt = torch.from_numpy(LAYOUT.prompt(batch()[0, 2:5].numpy()))
    generate(decoder, VOCAB, [prompt], 3)
    assert compiled == [block.image for _ in range(2) for block in decoder.layers]


def test_distillation_compares_with_the_initial_text_half() -> None:
    config = ExperimentConfig(data=DataConfig(length=LENGTH), distil=DistilConfig(weight=1.0))
    module = DistilledModule(split(), config, LAYOUT, document_start=2)
    total, nll_M, _ = module.sums(batch()[3:])
    assert total.item() == pytest.approx(float(nll_M.sum()), rel=1e-6)


def test_a_split_on_the_host_and_one_of_the_ids_are_equal() -> None:
    ids_BT = batch()
    found = ModalitySplit.from_ids(ids_BT, VOCAB.special("<image>"))
    is_image = ids_BT.flatten() >= VOCAB.special("<image>")
    assert found.text == int((~is_image).sum())
    assert torch.equal(found.unsort(found.sort(ids_BT)), ids_BT)
    assert [bool(part.any()) for part in found.halves(found.sort(is_image.view_as(ids_BT)))] == [False, True]


def test_other_backbones_are_refused_by_name() -> None:
    class OtherDecoder(Backbone):
        pass

    with pytest.raises(ValueError, match="modality_experts=True: expected false, OtherDecoder is not open_lm's"):
        add_modality_experts(OtherDecoder(), 3)


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_compute_packed_batches_as_uncompiled_ones_do() -> None:
    """With and without images; the backend "eager" runs the traced graphs as they are."""
    torch.compiler.reset()
    decoder, plain, ids_BT = split(untied=True), split(untied=True), batch()
    decoder.enable_packing()
    plain.enable_packing()
    blocks_of(decoder)[0].compile(backend="eager")
    for part_BT in (ids_BT, ids_BT[3:]):
        total, _, found = gradients(TextToImageModule(decoder, CONFIG, LAYOUT), part_BT)
        expected_total, _, expected = gradients(TextToImageModule(plain, CONFIG, LAYOUT), part_BT)
        assert total.item() == pytest.approx(expected_total.item(), rel=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-5), name
