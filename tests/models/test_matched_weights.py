"""Random weights that share statistics with pre-trained ones."""

import torch

from t2i_lm.models.decoder import Attention, Decoder
from t2i_lm.models.matched_weights import draw_entries, draw_mimetic, matrices_of_heads, similarities
from tests.decoders import tiny_decoder


def trained_like() -> Decoder:
    """A decoder whose heads have query matrices like their keys, and outputs unlike their values."""
    decoder = tiny_decoder()
    with torch.no_grad():
        for layer in decoder.layers:
            query_HKD, key_HKD, value_HKD, out_HKD = matrices_of_heads(layer.attention)
            key_HKD += 0.8 * query_HKD
            out_HKD -= 0.5 * value_HKD
            layer.attention_norm.weight += 0.5
    return decoder


def attentions(decoder: Decoder) -> list[Attention]:
    return [module for module in decoder.modules() if isinstance(module, Attention)]


def test_drawn_entries_have_mean_and_deviation_of_their_tensor() -> None:
    source, drawn = trained_like(), trained_like()
    draw_entries(drawn, torch.Generator().manual_seed(0))
    for (name, before), after in zip(source.named_parameters(), drawn.parameters(), strict=True):
        error = 4 * before.std(correction=0) / before.numel() ** 0.5
        assert (after.mean() - before.mean()).abs() <= error, name
        assert (after.std() - before.std()).abs() <= error, name
        assert torch.equal(after, before) == bool(before.std() == 0), name


def test_heads_have_the_similarities_of_the_source_and_nothing_else_of_it() -> None:
    source, drawn, plain = trained_like(), trained_like(), trained_like()
    draw_mimetic(drawn, torch.Generator().manual_seed(0))
    draw_entries(plain, torch.Generator().manual_seed(0))
    for ours, theirs, without in zip(*map(attentions, (drawn, source, plain)), strict=True):
        for matched, wanted, unmatched in zip(*map(similarities, (ours, theirs, without)), strict=True):
            assert (wanted.abs() > 0.3).all()
            assert (matched - wanted).abs().max() < 0.15
            assert unmatched.abs().max() < 0.15
        assert (ours.in_proj.weight.std() / theirs.in_proj.weight.std() - 1).abs() < 0.1
        flat = torch.stack([ours.in_proj.weight.flatten(), theirs.in_proj.weight.flatten()])
        assert torch.corrcoef(flat)[0, 1].abs() < 0.1
