"""Training on Parquet files that lie elsewhere: the rows of `prepare`, in one order, wherever parts are made."""

import json
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.load import load_experiment
from t2i_lm.data.alignment import BagDataModule
from t2i_lm.data.datamodules import BatchDataModule, PairDataModule, make_sampler
from t2i_lm.data.shards import made_parts, remote
from t2i_lm.data.shards.format import read_index
from t2i_lm.data.shards.made_parts import MAKER, MAKERS, StreamedParts, replaced
from t2i_lm.data.shards.parts import PartError, Parts, open_split
from t2i_lm.data.shards.prepare import prepare_pairs
from t2i_lm.data.shards.streamed import training_shards
from t2i_lm.experiment.build import open_image, open_text
from t2i_lm.tokenizers.joint_vocab import JointVocab
from t2i_lm.tokenizers.layout import Layout
from tests.data.shards.parquet_files import GROUP, VAL, Server, png, serve, table, write
from tests.runs import PRETRAINED

BATCH, STEPS = 8, 16  # two epochs and a half
LAYOUT = Layout(JointVocab(512, 32), image_tokens=64, length=110)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "set")


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    with serve(folder) as state:
        yield state


@dataclass(frozen=True)
class Setting:
    """The config of a run on a path, and what it opens."""

    config: ExperimentConfig

    def shards(self) -> Path:
        return training_shards(self.config, open_text(self.config), open_image(self.config))

    def parts(self) -> StreamedParts:
        return StreamedParts(self.shards(), self.config)

    def batches(self, rank: int = 0, consumed: int = 0, workers: int = 0) -> list[torch.Tensor]:
        """Training batches of one rank, as its data module loads them."""
        data: BatchDataModule = PairDataModule(self.config, self.shards(), LAYOUT)
        data.setup("fit")
        sampler = make_sampler(self.config, data.train_set.part_sizes, rank, self.config.trainer.devices)
        sampler.consumed, sampler.announce, sampler.ahead = consumed, data.train_set.announce, 3 * BATCH
        loader: Any = DataLoader(data.train_set, batch_sampler=sampler, collate_fn=lambda x: x, num_workers=workers)
        try:
            return [batch["ids_BT"] for batch in loader]
        finally:
            data.teardown("fit")

    def having(self, devices: int = 1, **data: Any) -> "Setting":
        trainer = replace(self.config.trainer, devices=devices)
        return Setting(replace(self.config, trainer=trainer, data=replace(self.config.data, **data)))


@pytest.fixture
def setting(tiny: list[str], tmp_path: Path) -> Any:
    def of(path: str | Path, cache: str = "cache", **data: Any) -> Setting:
        config = load_experiment(
            PRETRAINED,
            "demo",
            [
                *tiny,
                "data.source=hub_stream",
                f"data.path={path}",
                f"data.cache_dir={tmp_path / cache}",
                f"data.batch_size={BATCH}",
                f"trainer.max_steps={STEPS}",
                "data.train_size=null",
                "data.val_size=null",
                "data.shuffle_parts=2",
                f"data.length={LAYOUT.length}",
            ],
        )
        return Setting(config).having(**data)

    return of


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture
def alone(folder: Path, setting: Any) -> list[torch.Tensor]:
    """The batches of one process on the local folder, for two epochs and a half."""
    found: list[torch.Tensor] = setting(folder, "alone").batches()
    return found


def ids(rows: Any) -> list[tuple[list[int], list[list[int]]]]:
    """Image ids and captions of rows of a table or of a split."""
    if isinstance(rows, pa.Table):
        return list(zip(rows["image_ids"].to_pylist(), rows["text_ids"].to_pylist(), strict=True))
    columns = zip(rows["image_ids"], rows["text_ids"], strict=True)
    return [(list(image), [list(text) for text in texts]) for image, texts in columns]


def every_row(parts: StreamedParts) -> pa.Table:
    return pa.concat_tables([parts.table(number) for number in range(len(parts.rows))])


def test_rows_are_those_that_prepare_writes_and_its_shards_are_used_where_they_are(
    folder: Path, setting: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    streamed = setting(folder)
    parts = streamed.parts()
    assert parts.rows.tolist() == [7, 7, 7, 7, 3, 7, 7, 6]
    assert not list(parts.folder.glob("made-*/*.arrow"))  # nothing is made before it is needed
    rows = every_row(parts)
    assert (rows["id"][30].as_py(), parts.id(31)) == ("data/train-0.parquet row 30", "data/train-1.parquet row 0")
    prepared = prepare_pairs(streamed.config, open_text(streamed.config), open_image(streamed.config))
    assert ids(rows) == ids(open_split(prepared, "train"))
    assert ids(open_split(parts.folder, "val")) == ids(open_split(prepared, "val"))
    with pytest.raises(ValueError, match=r"train: with data\.source=hub_stream, .*python -m t2i_lm\.prepare writes"):
        Parts(parts.folder, "train")
    assert streamed.shards() == prepared
    run = {"data_hash": (read_index(parts.folder) or {})["data_hash"]}
    text, image = open_text(streamed.config), open_image(streamed.config)
    assert training_shards(streamed.config, text, image, run) == parts.folder  # a run that began to stream goes on so
    assert "50 train rows" not in capsys.readouterr().err


@pytest.mark.parametrize("module", [PairDataModule, BagDataModule])
def test_a_run_with_a_validation_size_uses_so_many_rows_of_the_shards_that_prepare_wrote(
    folder: Path, setting: Any, capsys: pytest.CaptureFixture[str], module: Any
) -> None:
    whole = setting(folder)
    prepared = prepare_pairs(whole.config, open_text(whole.config), open_image(whole.config))
    some = whole.having(val_size=5, batch_size=4)
    assert some.shards() == prepared
    rows = len(open_split(prepared, "val"))
    assert f"data.val_size=5: the first of {rows} validation rows are used" in capsys.readouterr().err
    layout = [LAYOUT] if module is PairDataModule else []
    cut, every = (module(one.config, prepared, *layout) for one in (some, whole.having(batch_size=4)))
    for data in (cut, every):
        data.setup("fit")
    assert (len(cut.val_set), len(every.val_set)) == (5, rows)
    assert len(cut.train_set) == len(every.train_set)
    draws = [(0, index) for index in range(5)]
    ours, theirs = (data.val_set.__getitems__(draws) for data in (cut, every))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if torch.is_tensor(ours[name]))


@pytest.mark.parametrize("protocol", ["http", "file", "memory"])
def test_batches_do_not_depend_on_where_the_files_lie(
    protocol: str, server: Server, folder: Path, setting: Any, alone: list[torch.Tensor]
) -> None:
    url = {"http": server.url, "file": f"file://{folder}", "memory": "memory://a/set"}[protocol]
    if protocol == "memory":
        fsspec.filesystem("memory").put(f"{folder}/", "/a/set/", recursive=True)
    assert same(setting(url).batches(), alone)


def test_two_ranks_with_two_workers_draw_the_batches_of_one_process_and_resume_in_the_middle(
    server: Server, setting: Any, alone: list[torch.Tensor]
) -> None:
    for consumed, cache in ((0, "first"), (BATCH * 6, "first"), (BATCH * 6, "another machine")):
        run = setting(server.url, cache).having(devices=2)
        ranks = [run.batches(rank, consumed, workers=2) for rank in range(2)]
        assert len(ranks[0]) == STEPS - consumed // BATCH
        for step, (first, second) in enumerate(zip(*ranks, strict=True)):
            whole = alone[consumed // BATCH + step]
            assert torch.equal(whole[:4, : first.shape[1]], first)
            assert torch.equal(whole[4:, : second.shape[1]], second)
        (record,) = (run.shards()).glob("made-cpu.jsonl")
        parts = [json.loads(line)["part"] for line in record.read_text().splitlines()]
        assert sorted(parts) == list(range(8))  # each was made by one process for all


BAD: dict[str, tuple[bytes | None, Any]] = {
    "row2": (b"broken", "a"),
    "row3": (None, "a"),
    "row9": (png(9), None),
    "row40": (png(1003), "an image of the validation split"),
}


def test_rows_that_cannot_be_used_are_replaced_in_the_same_way_everywhere(
    setting: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "set", **BAD)
    runs = [setting(folder, cache, max_reject_share=0.1).parts() for cache in ("one", "two")]
    tables = [every_row(runs[0]), pa.concat_tables([runs[1].table(n) for n in reversed(range(8))][::-1])]
    assert tables[0].equals(tables[1])
    names = [name.as_py().replace("data/train-", "").replace(".parquet row ", ":") for name in tables[0]["id"]]
    expected = [f"0:{n}" for n in range(31)] + [f"1:{n}" for n in range(20)]
    expected[2:4], expected[9], expected[40] = ["0:0", "0:4"], "0:7", "1:7"
    assert names == expected
    by_pixels = setting(folder, "three", max_reject_share=0.1).parts()
    by_pixels._held_out = {digest for digest in by_pixels._held_out if isinstance(digest, str)}
    assert len(by_pixels._held_out) == VAL
    assert by_pixels.table(6).equals(runs[0].table(6))  # so it is where equal images have other ids
    runs[0].fetch_later([])
    runs[0].close()
    said = capsys.readouterr().err
    assert "4 of 51 rows read so far were replaced by others" in said
    for part in ("1 not an image (first: data/train-0.parquet row 2", "1 no image", "1 a validation image (first: "):
        assert part in said


def test_a_dataset_with_too_many_unusable_rows_ends_the_run(setting: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "set", **BAD)
    parts = setting(folder, max_reject_share=0.03).parts()
    with pytest.raises(PartError, match=r"4 of 51 rows .*no image.*data\.max_reject_share=0\.03 allows fewer"):
        every_row(parts)


def test_a_row_group_without_a_usable_row_has_those_of_the_next(setting: Any, tmp_path: Path) -> None:
    nothing = {f"row{n}": (b"", "a") for n in (*range(7, 14), *range(45, 51))}
    parts = setting(write(tmp_path / "set", **nothing), max_reject_share=0.9).parts()
    assert parts.table(1)["id"].to_pylist() == parts.table(2)["id"].to_pylist()
    assert ids(parts.table(7)) == ids(parts.table(0))[:6]
    everything = {f"row{n}": (b"", "a") for n in range(51)}
    parts = setting(write(tmp_path / "empty", **everything), max_reject_share=1.0).parts()
    message = (
        r"row group 2: neither it nor the 7 row groups after it have a usable row: 51 of 51 rows .* 51 not an image"
    )
    with pytest.raises(PartError, match=message):
        parts.table(2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
def test_replacements_are_usable_and_spread_evenly(usable: list[bool]) -> None:
    places = [place for place, good in enumerate(usable) if good]
    found = replaced(len(usable), places)
    assert all(usable[place] for place in found)
    assert all(found[place] == place for place in places)
    extra = Counter(found[place] for place, good in enumerate(usable) if not good)
    counts = [extra[place] for place in places]
    assert max(counts) - min(counts) <= 1


def test_the_cache_takes_at_most_its_limit_and_damage_in_it_is_repaired(
    folder: Path, setting: Any, alone: list[torch.Tensor]
) -> None:
    limit = 2 * 2 * GROUP * (64 * 2 + 2 * LAYOUT.length) + 100
    run = setting(folder, remote_cache_gib=limit / 2**30)
    assert same(run.batches(), alone)
    kept = sorted((run.shards() / "made-cpu").glob("*.arrow"))
    assert 0 < sum(file.stat().st_size for file in kept) <= limit
    assert len(kept) < 8
    for file in kept:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert same(run.batches(), alone)
    with pytest.raises(ValueError, match=r"data\.remote_cache_gib=.*twice data\.shuffle_parts=2 row groups of up to 7"):
        run.having(remote_cache_gib=1e-9).shards()


def test_a_dropped_connection_is_tried_again_and_a_file_out_of_reach_is_named(
    server: Server, setting: Any, alone: list[torch.Tensor]
) -> None:
    shards = setting(server.url).shards()  # the footers are read
    server.faults = {"train-1": 2}
    assert same(setting(server.url).batches(), alone)
    assert server.faults == {"train-1": 0}
    for file in (shards / "made-cpu").glob("*.arrow"):
        file.unlink()
    server.faults = {"train-1": 10**6}
    for workers in (0, 1):
        with pytest.raises((PartError, ValueError), match=r"train-1\.parquet .*cannot be read: .*\(4 tries\)"):
            setting(server.url).batches(workers=workers)
    server.faults = {}
    assert same(setting(server.url).batches(consumed=BATCH * 3), alone[3:])


def test_a_server_that_sends_whole_files_only_is_named(server: Server, setting: Any) -> None:
    server.ranges = False
    with pytest.raises(ValueError, match=r"train-0\.parquet cannot be read: its server sends whole files"):
        setting(server.url).shards()


def test_data_that_changes_between_sessions_has_another_hash_and_in_a_session_is_refused(
    setting: Any, tmp_path: Path
) -> None:
    folder = write(tmp_path / "set")
    run = setting(folder)
    before, parts = run.shards(), run.parts()
    parts.table(0)
    file = folder / "data" / "train-1.parquet"
    shutil.copy(file, tmp_path / "kept")
    other = write(tmp_path / "other", row45=(png(45), "another caption"))
    shutil.copy(other / "data" / "train-1.parquet", file)
    after = run.shards()
    indices = [read_index(place) or {} for place in (before, after)]
    assert indices[0]["data_hash"] != indices[1]["data_hash"]
    with pytest.raises(PartError, match=r"train-1\.parquet row group 0 has changed since the run was started"):
        parts.table(5)
    # Content that changes in place, with the same footer, is found when a part is made again.
    shutil.copy(tmp_path / "kept", file)
    first = folder / "data" / "train-0.parquet"
    content = first.read_bytes()
    first.write_bytes(content.replace(b"a red square 3", b"a big square 3", 1))
    assert first.read_bytes() != content
    for kept in before.glob("made-cpu/*.arrow"):
        kept.unlink()
    with pytest.raises(PartError, match=r"train-0\.parquet row group 0 has changed since it was first read"):
        run.parts().table(0)


def test_without_a_validation_split_row_groups_are_held_out_and_their_images_are_not_trained_on(
    setting: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows: list[tuple[bytes | None, Any]] = [(png(n % 55), f"a red square {n}") for n in range(60)]
    pq.write_table(table(rows), folder / "all.parquet", row_group_size=5)
    parts = setting(folder).parts()
    assert len(parts.rows) == 11
    held_out = ids(open_split(parts.folder, "val"))
    assert len(held_out) == 5
    assert not {str(image) for image, _ in ids(every_row(parts))} & {str(image) for image, _ in held_out}
    assert [
        note for note in (read_index(parts.folder) or {})["notes"]["train"] if "1 of 12 row groups are held out" in note
    ]
    sized = setting(folder, val_size=12).parts()
    assert len(sized.rows) == 9
    assert len(open_split(sized.folder, "val")) == 12
    assert set(parts.rows.tolist()) == {5}
    pq.write_table(table(rows), folder / "all.parquet")
    with pytest.raises(ValueError, match=r"its training split is one row group.*python -m t2i_lm\.prepare once"):
        setting(folder).shards()
    with pytest.raises(ValueError, match=r"none can be held out; write smaller ones$"):
        setting(f"file://{folder}").shards()


def test_what_cannot_be_streamed_is_refused_at_the_start(
    folder: Path, setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "WAIT_S", 0.0)

    def refused(message: str, path: str | Path = folder, **data: Any) -> None:
        with pytest.raises(ValueError, match=message) as error:
            setting(path, **data).shards()
        assert "\n" not in str(error.value)

    refused(r"data\.shuffle_parts=None: expected a number of parts, such as 16, with data\.source", shuffle_parts=None)
    refused(r"data\.captions=all: expected random or first.*run python -m t2i_lm\.prepare once", captions="all")
    refused(r"data\.text_ratio=0\.1: expected null", text_ratio=0.1)
    refused(r"data\.train_size=5: expected null.*which is read while training$", train_size=5)
    refused(r"data\.captions=all: .*which is read while training$", f"file://{folder}", captions="all")
    shuffled = setting(folder)
    with pytest.raises(ValueError, match=r"align\.shuffle_pairs=True: expected false with data\.source=hub_stream"):
        Setting(replace(shuffled.config, align=replace(shuffled.config.align, shuffle_pairs=True))).shards()
    refused(r"data\.path=s3://b/c cannot be read: requires s3fs, which is not installed: pip install s3fs", "s3://b/c")
    refused(r"data\.path=nosuch://b cannot be read: Protocol not known: nosuch", "nosuch://b")
    refused(r"data\.path=file:///nothing/here: no Parquet file among its 0 files", "file:///nothing/here")
    lines = tmp_path / "lines"
    lines.mkdir()
    (lines / "train.jsonl").write_text('{"image": "x.png", "caption": "a"}')
    refused(r"its files are of format json, and only Parquet is streamed; run python -m t2i_lm\.prepare once", lines)
    named = tmp_path / "named"
    named.mkdir()
    pq.write_table(pa.table({"image": ["x.png"], "caption": ["a"]}), named / "train.parquet")
    refused(r"column image of train\.parquet holds paths of images", f"file://{named}")
    pq.write_table(pa.table({"pixels": [1], "caption": ["a"]}), named / "train.parquet")
    refused(r"train\.parquet: no column image or .*; it has pixels \(int64\), caption \(string\)", named)
    (named / "train.parquet").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    refused(r"train\.parquet cannot be read: no Parquet file", f"file://{named}")
    pq.write_table(table([(png(1), "a")]), named / "train.parquet")
    pq.write_table(table([(png(1), "a")]), named / "more.parquet")
    refused(r"some names say the split and others do not \(train\.parquet, more\.parquet\)", f"file://{named}")


def soon(holds: Callable[[], bool]) -> bool:
    """Whether something comes true within ten seconds."""
    for _ in range(200):
        if holds():
            return True
        time.sleep(0.05)
    return False


def makers() -> int:
    return sum(thread.name == MAKER for thread in threading.enumerate())


def test_ranks_begin_at_other_parts(monkeypatch: pytest.MonkeyPatch, folder: Path, setting: Any) -> None:
    monkeypatch.setattr(made_parts, "MAKERS", 0)
    orders = []
    for rank in range(3):
        ranks = SimpleNamespace(is_initialized=lambda: True, get_rank=lambda rank=rank: rank, get_world_size=lambda: 3)
        monkeypatch.setattr(made_parts, "dist", ranks)
        parts = setting(folder).parts()
        parts.fetch_later([6, 1, 6, 4])
        assert parts._ahead is not None
        orders.append(list(parts._ahead._queue.queue))
    assert orders == [[6, 1, 4], [1, 4, 6], [4, 6, 1]]


def test_threads_that_make_parts_end_with_them(folder: Path, setting: Any) -> None:
    assert soon(lambda: makers() == 0)
    parts = setting(folder).parts()
    parts.fetch_later(range(8))
    assert makers() == MAKERS
    made = parts.folder / "made-cpu"
    assert soon(lambda: len(list(made.glob("*.arrow"))) == 8)
    copy = pickle.loads(pickle.dumps(parts))  # as a spawned worker has it
    assert copy.table(3).equals(parts.table(3))
    copy._path(2).unlink()
    assert copy.table(2).num_rows == 7
    del parts
    assert soon(lambda: makers() == 0)
    copy.fetch_later([5])
    copy.close()
    assert soon(lambda: makers() == 0)
