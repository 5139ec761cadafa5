"""One architecture of transformers per mechanism the whole way, and the table of all in docs/models.md."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from t2i_lm.evaluation.probes.scores import score_targets
from t2i_lm.models.expand import expand_vocabulary
from t2i_lm.models.huggingface import HuggingFaceDecoder
from t2i_lm.models.huggingface_folder import load_huggingface
from tests.models import architectures
from tests.models.architectures import NOT_BUILT, REFUSED, WORKS, Result, check

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gpt2",
        "gemma",  # embeddings scaled by a rounded buffer
        "xglm",  # and by a Python number
        "cohere",  # scaled logits
        "phi",  # output bias
        "bert",  # layers and a bias between body and output rows; tied
        "bart",  # a decoder without its encoder
        "lfm2",  # convolutions and attention in one cache
        "bamba",  # which must be told its positions after a cache
        "roberta",  # and which counts them from after its pad
        "mamba",  # recurrent, without attention
        "bloom",  # no table of positions
    ],
)
def test_an_architecture_works_the_whole_way(kind: str) -> None:
    assert check(kind) == Result(kind, WORKS)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nanochat", "caps or shifts its logits (final_logit_softcapping in its config)"),
        ("rwkv", "changes its weights when it computes logits"),
        ("prophetnet", "fails with its cache: "),
        ("xlnet", "computes other logits where a later token differs, so it is no causal language model"),
        ("gemma4_text", "cannot start from embeddings: RuntimeError: It seems like you tried to call `forward`"),
        # the latter in transformers 5.6
        ("cpmant", ("has (1184, 32) embedding and (160, 32) output rows; equal shapes are", "computes other logits")),
    ],
)
def test_an_architecture_is_refused_in_one_line(kind: str, reason: str | tuple[str, ...]) -> None:
    result = check(kind)
    assert result.outcome == REFUSED
    assert result.reason.startswith(reason)
    assert "\n" not in result.reason


def test_a_cap_shows_though_logits_are_far_below_it() -> None:
    model = architectures.build_small("gemma2")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.1)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM caps or shifts its logits"):
        HuggingFaceDecoder(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gemma", "xglm"])
def test_new_rows_are_scaled_as_the_embedding_scales_its_own(kind: str, dtype: torch.dtype) -> None:
    embedding = architectures.build_small(kind).get_input_embeddings().to(dtype)
    rows = embedding.weight.detach().clone()
    ids_BT = architectures.text_ids()
    decoder = HuggingFaceDecoder(architectures.build_small(kind))
    assert decoder.row_scale is not None
    scaled = decoder.row_scale(nn.functional.embedding(ids_BT, rows))
    assert torch.equal(scaled, embedding(ids_BT))
    assert not torch.equal(scaled, rows[ids_BT])
    assert "row_scale" not in " ".join(decoder.state_dict())


def test_an_output_bias_counts_in_every_loss_and_score() -> None:
    decoder = HuggingFaceDecoder(architectures.build_small("phi")).eval()
    assert decoder.output.bias is not None
    with torch.no_grad():
        decoder.output.bias.normal_()
    vocab = expand_vocabulary(decoder, 30, torch.Generator().manual_seed(1))
    ids_BT = torch.cat([architectures.text_ids(), torch.full((2, 1), vocab.image_offset + 3)], dim=1)
    logits_BTV = decoder(ids_BT[:, :-1])
    expected_N = nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="none")
    loss = decoder.loss(ids_BT[:, :-1], ids_BT[:, 1:])
    assert torch.allclose(loss.nll_N, expected_N, atol=1e-5)
    loss.total.backward()
    bias, gradient = decoder.output.bias, decoder.output.bias.grad
    decoder.output.bias.grad = None
    (wanted,) = torch.autograd.grad(expected_N.sum(), bias)
    assert gradient is not None
    assert torch.allclose(gradient, wanted, atol=1e-5)
    scores = score_targets(decoder, ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
    assert torch.allclose(scores.all_rows_N.float(), expected_N, atol=1e-5)


def test_a_copy_shares_nothing() -> None:
    decoder = HuggingFaceDecoder(architectures.build_small("gemma")).eval()
    teacher, ids_BT = copy.deepcopy(decoder), architectures.text_ids()
    expected = decoder(ids_BT)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.zero_()
    assert torch.equal(teacher(ids_BT), expected)


def test_an_encoder_is_refused_and_what_logits_do_not_depend_on_is_frozen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = architectures.build_small("bert")
    model.config.is_decoder = False
    model.save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertLMHeadModel computes other logits where a later token differs"):
        load_huggingface(tmp_path / "bert")
    architectures.build_small("bart").save_pretrained(tmp_path / "bart")
    bart = load_huggingface(tmp_path / "bart")
    (note,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert f"{tmp_path}/bart has 20 tensors (body.decoder.layers.0.encoder_attn.k_proj.bias, " in note
    assert note.endswith("without effect on its logits, which stay frozen")
    frozen = {name.split(".")[4] for name, parameter in bart.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder_attn", "encoder_attn_layer_norm"}


def test_the_table_in_the_docs_is_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    document = architectures.DOCS.read_text()
    section = document.split(architectures.BEGIN)[1].split(architectures.END)[0]
    head = re.match(
        r"transformers ([\d.]+) has (\d+) causal architectures; (\d+) can be built small; (\d+) of these work\.\n\n"
        r"\| result \| architectures \|\n\|---\|---\|\n",
        section,
    )
    assert head
    version, every, built, work = head[1], *map(int, head.groups()[1:])
    rows = [re.fullmatch(r"\| (.+) \| (.+) \|", line) for line in section[head.end() :].splitlines()]
    results = []
    for row in rows:
        assert row
        outcome, _, reason = row[1].partition(": ")
        outcome = NOT_BUILT if outcome == "not tried" else outcome
        reason = "" if outcome == NOT_BUILT else reason
        results += [Result(kind, outcome, reason) for kind in row[2].split(", ")]
    count = lambda *outcomes: sum(result.outcome in outcomes for result in results)  # noqa: E731
    assert (len(results), len({result.kind for result in results})) == (every, every)
    assert every - count(NOT_BUILT) == built
    assert count(WORKS, architectures.RECOMPUTES) == work >= 120
    assert count(architectures.BROKEN) == 0
    monkeypatch.setattr(transformers, "__version__", version)
    assert architectures.written(document, results) == document


def test_results_are_kept_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept.jsonl"
    kept.write_text(json.dumps({"kind": "llama", "outcome": WORKS, "reason": ""}) + "\n")
    monkeypatch.setattr("sys.argv", ["architectures", "--keep", str(kept), "llama"])
    monkeypatch.setattr(architectures, "check", lambda kind: pytest.fail(f"{kind} was there"))
    assert architectures.main() == 0
