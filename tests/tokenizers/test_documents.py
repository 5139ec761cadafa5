"""The two ends of a document, from a model's own files, from keys, and as transformers' own tokenizer has them."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import tokenizers
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t2i_lm.config.forgetting import ForgettingConfig
from t2i_lm.data.shards.tokenize import text_rows
from t2i_lm.evaluation.probes.completions import complete
from t2i_lm.evaluation.probes.heldout import target_count, text_losses
from t2i_lm.evaluation.probes.questions import encode_option
from t2i_lm.evaluation.probes.scores import score_continuations, score_targets
from t2i_lm.evaluation.probes.suite import Probes
from t2i_lm.tokenizers.base import TextTokenizer
from t2i_lm.tokenizers.documents import context_id, describe_documents, document_key, document_start, leading_ids
from t2i_lm.tokenizers.exported import write_tokenizer
from t2i_lm.tokenizers.text import JsonTokenizer, open_text_tokenizer, train_sentencepiece
from tests.decoders import tiny_decoder
from tests.storage.hub_cache import COMMIT, offline_snapshot

EOS, BOS, PAD = 256, 257, 258  # beside the 256 bytes


def write_json(folder: Path, first: str | None = None, end: str = "<eos>", **files: Any) -> Path:
    """A byte-level tokenizer.json whose post-processor puts `first` in front, and further files of JSON beside it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([end, "<bos>", "<pad>"])
    if first is not None:
        special = [(first, model.token_to_id(first))]
        model.post_processor = tokenizers.processors.TemplateProcessing(f"{first} $A", None, special)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder / "tokenizer.json"


ADDS = {"add_bos_token": True, "bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}
# Post-processor, files beside it -> start, end.
FILES: list[tuple[str | None, dict[str, Any], int | None, int]] = [
    (None, {}, None, EOS),
    ("<bos>", {}, BOS, EOS),
    (None, {"tokenizer_config": ADDS}, BOS, EOS),
    (None, {"tokenizer_config": {"add_bos_token": True}, "special_tokens_map": {"bos_token": "<bos>"}}, BOS, EOS),
    (None, {"tokenizer_config": ADDS | {"add_bos_token": False}}, None, EOS),
    ("<bos>", {"tokenizer_config": ADDS | {"add_bos_token": False}}, BOS, EOS),  # as transformers reads it
    (None, {"tokenizer_config": {"bos_token": "<bos>"}, "config": {"bos_token_id": BOS}}, None, EOS),
    (None, {"tokenizer_config": {"eos_token": "<pad>"}, "config": {"eos_token_id": EOS}}, None, PAD),
    (None, {"special_tokens_map": {"eos_token": {"content": "<pad>"}}}, None, PAD),
    (None, {"generation_config": {"eos_token_id": [PAD, EOS]}, "config": {"eos_token_id": BOS}}, None, PAD),
    (None, {"config": {"eos_token_id": PAD}}, None, PAD),
    (None, {"config": {"eos_token_id": 9_999}}, None, EOS),  # of a model whose vocabulary was expanded
    (None, {"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": None}}, None, EOS),
]


@pytest.mark.parametrize(("first", "files", "start", "end"), FILES)
def test_the_files_of_a_model_state_its_documents(
    first: str | None, files: dict[str, Any], start: int | None, end: int, tmp_path: Path
) -> None:
    path = write_json(tmp_path, first, **files)
    text = open_text_tokenizer(path)
    assert (document_start(text), text.document_end) == (start, end)
    assert context_id(text) == (end if start is None else start)
    assert bool(document_key(text)) == (start is not None or end != EOS)
    line = describe_documents(text)
    assert ("begin with <bos> (id 257, " in line) == (start is not None)
    assert f"(id {end}, " in line
    elsewhere = path.rename(tmp_path / "other.json")  # not the tokenizer of the folder's model
    assert open_text_tokenizer(elsewhere).document_end == EOS


@pytest.mark.parametrize("first", [None, "<bos>"])
@pytest.mark.parametrize("adds", [None, False])
def test_the_beginning_is_that_of_transformers(first: str | None, adds: bool | None, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    path = write_json(tmp_path, first, tokenizer_config=config if adds is None else config | {"add_bos_token": adds})
    text, own = open_text_tokenizer(path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = own("a red ring").input_ids
    assert ids == ([] if document_start(text) is None else [document_start(text)]) + text.encode("a red ring")
    assert own.eos_token_id == text.document_end


def test_keys_replace_what_the_files_say(tmp_path: Path) -> None:
    path = write_json(tmp_path, "<bos>", tokenizer_config=ADDS)
    text = open_text_tokenizer(path, "none", "<pad>")
    assert (document_start(text), text.document_end) == (None, PAD)
    assert "text_tokenizer.document_end" in describe_documents(text)
    assert document_start(open_text_tokenizer(path, "<pad>")) == PAD
    for key in ("start", "end"):
        with pytest.raises(ValueError, match=f"text_tokenizer.document_{key}='<no>': the tokenizer has no such token"):
            open_text_tokenizer(path, **{f"document_{key}": "<no>"})
    with pytest.raises(ValueError, match=r"document_start, document_end: expected null, plugin:x has its own"):
        open_text_tokenizer("plugin:x", "<bos>")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<no>"}}, r"tokenizer_config\.json has eos_token='<no>', a token that"),
        ({"tokenizer_config": ADDS | {"bos_token": "<no>"}}, r"tokenizer_config\.json has bos_token='<no>'"),
        ({"tokenizer_config": {"add_bos_token": True}}, "add_bos_token is true, but bos_token names no token"),
    ],
)
def test_files_that_contradict_the_tokenizer_are_named(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        open_text_tokenizer(write_json(tmp_path, **files))


def test_a_damaged_file_and_a_missing_end_are_named(tmp_path: Path) -> None:
    path = write_json(tmp_path, end="<over>")
    with pytest.raises(ValueError, match=r"has no end of a document .*name its token by text_tokenizer\.document_end"):
        _ = open_text_tokenizer(path).document_end
    assert open_text_tokenizer(path, document_end="<over>").document_end == EOS
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"text_tokenizer\.path: .*tokenizer_config\.json is not JSON"):
        open_text_tokenizer(path)


@pytest.mark.parametrize("first", [None, "<bos>"])
@pytest.mark.parametrize(("start", "end"), [(None, None), ("<bos>", "<pad>"), ("<pad>", None), ("none", "<eos>")])
@pytest.mark.parametrize("stem", ["tokenizer", "text_tokenizer"])
def test_an_exported_tokenizer_keeps_both_ends(
    first: str | None, start: str | None, end: str | None, stem: str, tmp_path: Path
) -> None:
    path = write_json(tmp_path / "base", first, tokenizer_config=ADDS)
    text, out = open_text_tokenizer(path, start, end), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"eos_token_id": 65, "bos_token_id": 66}))  # the model's
    file = write_tokenizer(text, out, stem, {"model_max_length": 8})
    again = open_text_tokenizer(file)
    assert (document_start(again), again.document_end) == (document_start(text), text.document_end)
    assert (again.sha256 == text.sha256) == (first is None or start in (None, "<bos>"))  # copied where it can be
    assert again.encode("a red ring <bos>") == text.encode("a red ring <bos>")
    assert json.loads((out / "tokenizer_config.json").read_text())["model_max_length"] == 8
    transformers = pytest.importorskip("transformers")
    with_start = write_tokenizer(text, out, "tokenizer", {"tokenizer_class": "PreTrainedTokenizerFast"}, begin=True)
    again, own = open_text_tokenizer(with_start), transformers.AutoTokenizer.from_pretrained(out)
    ids = [] if document_start(text) is None else [document_start(text)]
    assert own("a red ring").input_ids == [*ids, *text.encode("a red ring")]
    assert own.eos_token_id == again.document_end == text.document_end
    assert document_start(again) == document_start(text)


def test_an_exported_sentencepiece_model_keeps_both_ends_and_one_of_earlier_versions_its_own(tmp_path: Path) -> None:
    lines = [f"sentence number {n} of many" for n in range(200)]
    path = train_sentencepiece(iter(lines), 340, tmp_path / "pieces.spm").path
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9}))
    file = write_tokenizer(open_text_tokenizer(path, "<s>", "<unk>"), tmp_path, "text_tokenizer")
    assert file.name == "text_tokenizer.model"
    again = open_text_tokenizer(file)
    assert (document_start(again), again.document_end) == (1, 0)
    (tmp_path / "tokenizer_config.json").unlink()
    again = open_text_tokenizer(file)
    assert (document_start(again), again.document_end) == (None, 2)


def test_a_sentencepiece_model_begins_documents_only_where_its_folder_says_so(tmp_path: Path) -> None:
    lines = [f"sentence number {n} of many" for n in range(200)]
    path = train_sentencepiece(iter(lines), 340, tmp_path / "tokenizer.model").path
    text = open_text_tokenizer(path)
    assert (document_start(text), text.document_end, document_key(text)) == (None, 2, {})
    assert describe_documents(text) == "documents: follow the end of another one, end with </s> (id 2, sentencepiece)"
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = open_text_tokenizer(path)
    assert (document_start(text), text.document_end) == (1, 2)
    with pytest.raises(ValueError, match="no such token"):
        open_text_tokenizer(path, "<no>")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, without a network, after `hf download` of a repository's tokenizer.json alone."""
    snapshot = offline_snapshot(tmp_path, "some/model", monkeypatch)
    write_json(snapshot)
    return snapshot.parents[1]


REFERENCE = "hf://some/model/tokenizer.json"
OTHERS = ("special_tokens_map.json", "generation_config.json", "config.json")


@pytest.mark.parametrize(
    ("held", "start", "end", "read"),
    [
        ({"tokenizer_config.json": ADDS}, BOS, EOS, 1),  # which states both ends
        ({"generation_config.json": {"eos_token_id": PAD}}, None, PAD, 4),
    ],
)
def test_files_beside_a_cached_tokenizer_of_the_hub_are_fetched(
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    held: dict[str, Any],
    start: int | None,
    end: int,
    read: int,
) -> None:
    asked = list[str]()

    def download(repo: str, name: str, revision: str | None = None, local_files_only: bool = False) -> str:
        file = repository / "snapshots" / COMMIT / name
        if not file.exists() and not local_files_only:
            assert revision == COMMIT  # not a newer one, whose files would lie elsewhere
            asked.append(name)
            if name not in held:
                response: Any = SimpleNamespace(headers={}, request=None)
                raise RemoteEntryNotFoundError("no such file", response=response)
            file.write_text(json.dumps(held[name]))
        if not file.exists():
            raise LocalEntryNotFoundError("offline")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    text = open_text_tokenizer(REFERENCE)
    assert (document_start(text), text.document_end) == (start, end)
    assert asked == ["tokenizer_config.json", *OTHERS][:read]
    assert not capsys.readouterr().err


def test_files_beside_a_tokenizer_that_are_out_of_reach_are_said(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert document_start(open_text_tokenizer(REFERENCE)) is None
    said = capsys.readouterr().err
    assert said.count("note: ") == 1
    assert f"{REFERENCE}: tokenizer_config.json is not in the cache and cannot be fetched" in said
    assert f"hf download some/model tokenizer.json tokenizer_config.json {' '.join(OTHERS)}\n" in said
    open_text_tokenizer(REFERENCE, "<bos>", "<eos>")
    assert not capsys.readouterr().err  # what they would say is given


@pytest.mark.parametrize("by_list", [False, True])
def test_files_that_the_cache_knows_to_be_absent_are_not_asked_for(
    repository: Path, capsys: pytest.CaptureFixture[str], by_list: bool
) -> None:
    (repository / "snapshots" / COMMIT / "tokenizer_config.json").write_text("{}")
    if by_list:
        if not hasattr(huggingface_hub, "get_cached_repo_tree"):
            pytest.skip("this version of huggingface_hub keeps no lists of files")
        (repository / "trees").mkdir()
        files = {"tokenizer_config.json": {"size": 2, "blob_id": "x"}}
        (repository / "trees" / f"{COMMIT}.json").write_text(json.dumps({"format_version": 1, "files": files}))
    else:
        (repository / ".no_exist" / COMMIT).mkdir(parents=True)
        for name in OTHERS:
            (repository / ".no_exist" / COMMIT / name).touch()
    assert open_text_tokenizer(REFERENCE).document_end == EOS
    assert not capsys.readouterr().err


class PlugIn:
    """As plug-ins were before a tokenizer could have a beginning of documents."""

    path = Path(__file__)
    vocab_size, document_end, sha256 = 257, 256, "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_plug_in_without_a_beginning_stands_behind_the_end() -> None:
    text: Any = PlugIn()
    assert (document_start(text), context_id(text), document_key(text)) == (None, 256, {})
    assert describe_documents(text) == "documents: follow the end of another one, end with id 256 (plug-in)"
    assert encode_option(text, "ab", "c", 10) == ([256, *b"abc"], 3)


@pytest.fixture(scope="module", params=[None, "<bos>"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return open_text_tokenizer(write_json(tmp_path_factory.mktemp("json"), request.param))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.text("ab\n ", min_size=1, max_size=30).filter(lambda one: bool(one.strip())), max_size=8),
    st.integers(2, 9),
)
def test_rows_hold_every_id_once_behind_the_beginning(text: TextTokenizer, documents: list[str], length: int) -> None:
    rows = [row["text_ids"] for row in text_rows(documents, text, length)]
    start = document_start(text)
    assert all(len(row) == length + 1 for row in rows)
    whole = [
        id_
        for document in documents
        for id_ in [*(text.encode("".join(f"{part}\n\n" for part in document.split("\n\n") if part.strip()))), EOS]
    ]
    if start is None:
        seen = [*(rows[0][:1] if rows else []), *(id_ for row in rows for id_ in row[1:])]
    else:
        assert all(row[0] == start for row in rows)
        assert all(row[at + 1] == start for row in rows for at in range(1, length) if row[at] == EOS)
        assert all((start, start) != pair for row in rows for pair in pairwise(row))
        seen = [id_ for row in rows for id_ in row if id_ != start]
    assert seen == whole[: len(seen)]
    assert len(whole) - len(seen) <= length


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 255), max_size=12), st.integers(2, 14))
def test_a_cut_text_keeps_its_beginning_and_loses_an_end(text: TextTokenizer, ids: list[int], limit: int) -> None:
    kept, over = leading_ids(text, ids, limit)
    assert len(kept) == min(len(ids) + 1, limit)
    assert over == len(ids) + 1 - len(kept)
    if document_start(text) is None:
        assert kept == [EOS, *ids][over:]
    else:
        assert kept == [BOS, *ids[over:]]


def test_probes_stand_behind_what_the_model_was_trained_behind(text: TextTokenizer) -> None:
    decoder = tiny_decoder(seed=1, seq_len=64, vocab_size=259).eval()
    document, first = "a red ring", context_id(text)
    ids = torch.tensor([[first, *text.encode(document)]])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(decoder(ids)[0, :-1], ids[0, 1:], reduction="sum")
    scores = score_continuations(decoder, [encode_option(text, "", document, 64)])[0]
    assert float(scores.text_rows_N.sum()) == pytest.approx(float(nll), abs=1e-4)
    rest = text.decode(decoder_greedy(decoder, [first, *text.encode("a red")], 4))
    assert complete(decoder, text, "a red", 4, 64)["masked"] == rest


def decoder_greedy(decoder: Any, ids: list[int], tokens: int) -> list[int]:
    added: list[int] = []
    with torch.no_grad():
        for _ in range(tokens):
            added.append(int(decoder(torch.tensor([[*ids, *added]]))[0, -1].argmax()))
    return added[: added.index(EOS)] if EOS in added else added


def test_a_beginning_inside_a_row_is_no_target() -> None:
    decoder = tiny_decoder(seed=1, seq_len=64, vocab_size=259).eval()
    ids_RT = torch.tensor([[BOS, 1, 2, EOS, BOS, 3], [BOS, 4, 5, 6, 7, 8]])
    target_RT = ids_RT != BOS
    losses = text_losses(decoder, ids_RT, BOS)
    direct = score_targets(decoder, ids_RT, target_RT).all_rows_N
    assert target_count(ids_RT, BOS) == len(direct) == 9
    assert sum(losses["all_rows"]) / 2 == pytest.approx(float(direct.mean()))
    assert losses["all_rows"] == losses["text_rows"]


def test_values_behind_another_beginning_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\f".join(f"a ring of {n} stars" for n in range(40)))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "cloze.jsonl").write_text(json.dumps({"context": "the ring", "continuation": "of stars"}))
    decoder = tiny_decoder(seed=1, seq_len=64, vocab_size=259).eval()
    wanted = ForgettingConfig(text=str(tmp_path / "book.txt"), rows=4, length=32, tasks=str(tasks), completion_tokens=2)
    path = write_json(tmp_path, "<bos>")
    Probes(wanted, open_text_tokenizer(path, "none"), tmp_path / "before.json")(decoder, initial=True)
    later = Probes(wanted, JsonTokenizer(path), tmp_path / "before.json")(decoder)
    assert "change" not in later["text"]["all_rows"]
    assert "change" not in later["tasks"]["cloze"]["all_rows"]
    assert "no change for text, tasks/cloze" in later["note"]
