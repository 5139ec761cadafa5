"""Frozen parameters are bitwise unchanged under weight decay, without gradient or optimizer state."""

from typing import Any

import pytest
import torch

from t2i_lm.config.sections import OptimConfig
from t2i_lm.models.decoder import Decoder
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.freeze import (
    FREEZE_GROUPS,
    TUNE_SETS,
    freeze,
    group_members,
    group_sizes,
    group_table,
    overlaps,
    tune_only,
)
from t2i_lm.modules.optim import adamw
from tests.decoders import tiny_decoder


def expanded(**changes: Any) -> Decoder:
    decoder = tiny_decoder(n_layers=4, **changes)
    expand_vocabulary(decoder, 30, torch.Generator().manual_seed(1))
    return decoder


def train(decoder: Decoder, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = adamw(list(decoder.named_parameters()), OptimConfig(lr=0.1, weight_decay=0.5))
    ids_BT = torch.arange(40).view(2, 20) * 2
    for _ in range(steps):
        optimizer.zero_grad()
        decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:]).total.backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("group", FREEZE_GROUPS)
def test_a_frozen_group_is_bitwise_unchanged_without_gradient_or_state(group: str) -> None:
    decoder = expanded()
    members = group_members(decoder, group)
    before = {name: parameter.clone() for name, parameter in decoder.named_parameters()}
    freeze(decoder, [group])
    optimizer = train(decoder)
    for name, parameter in decoder.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name not in members), name
        assert (parameter in optimizer.state) == (name not in members), name
        assert (parameter.grad is not None) == (name not in members), name


def test_groups_cover_every_parameter_and_halves_share_none() -> None:
    decoder = expanded()
    covered = {name for group in FREEZE_GROUPS for name in group_members(decoder, group)}
    assert covered == {name for name, _ in decoder.named_parameters()}
    first, second = group_members(decoder, "first_half"), group_members(decoder, "second_half")
    assert first.keys().isdisjoint(second)
    assert len(first) == len(second) > 0
    assert all(".0." in name or ".1." in name for name in first)


@pytest.mark.parametrize("tuned", TUNE_SETS)
def test_a_set_tunes_its_groups_and_nothing_else(tuned: str) -> None:
    decoder = expanded()
    tune_only(decoder, tuned)
    expected = {name for group in TUNE_SETS[tuned] for name in group_members(decoder, group)}
    assert {name for name, parameter in decoder.named_parameters() if parameter.requires_grad} == expected


def test_frozen_text_rows_of_a_tied_decoder_are_frozen_in_both_matrices() -> None:
    decoder = expanded(weight_tying=True)
    freeze(decoder, ["output"])
    assert not decoder.tok_embeddings.text.requires_grad
    assert decoder.tok_embeddings.text is decoder.output.text


def test_unknown_names_and_freezing_everything_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nothing_like_this.*embedding, output, norm"):
        freeze(expanded(), ["nothing_like_this"])
    with pytest.raises(ValueError, match="nothing would be left"):
        freeze(expanded(), ["embedding", "output", "first_half", "second_half", "norm"])
    with pytest.raises(ValueError, match=r"tune='half'.*embed, norm, first_half, ffn, all"):
        tune_only(expanded(), "half")


def test_the_table_counts_every_group() -> None:
    decoder = expanded()
    freeze(decoder, ["ffn"])
    sizes = {size.name: size for size in group_sizes(decoder)}
    assert sizes["ffn"].trainable == 0 < sizes["ffn"].parameters
    assert sizes["all"].parameters == sum(parameter.numel() for parameter in decoder.parameters())
    assert sizes["all"].trainable == sizes["all"].parameters - sizes["ffn"].parameters
    assert "no parameters in this backbone" in group_table(decoder)


def test_overlapping_groups_are_reported_with_their_shared_parameters() -> None:
    decoder = expanded()
    norms = sum(
        value.numel()
        for name, value in decoder.named_parameters()
        if "norm" in name and name.startswith(("layers.0.", "layers.1."))
    )
    assert overlaps(decoder, ["norm", "first_half"]) == [
        f"norm and first_half share {norms:,} parameters: the union of the groups is frozen"
    ]
    assert overlaps(decoder, ["ffn", "attention"]) == []
