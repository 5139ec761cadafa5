"""Shards behind a URL: the same batches as in place, on any number of processes and workers, from any position."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.utils.data import DataLoader

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.config.sections import DataConfig, OptimConfig, TrainerConfig
from t2i_lm.data.datamodules import BatchDataModule, CaptionedIds, PairDataModule, make_sampler
from t2i_lm.data.shards import remote
from t2i_lm.data.shards.parts import PartError, Parts
from t2i_lm.data.shards.stored import stored_shards
from tests.data.http_server import serving
from tests.data.shards.pair_shards import LAYOUT, TOKENIZERS, write_pairs

STEPS = 21  # two epochs of 112 pairs, and a half
PARTS_OF = (30, 30, 17, 30, 5)


@dataclass
class Server:
    """A folder served by HTTP; counts the requests of files.

    Attributes:
        faults: what happens to the next requests of a file, by the end of its path: `drop` or `damage`.
    """

    url: str
    requests: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[str]] = field(default_factory=dict)


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, server_state: Server, *arguments: Any, **named: Any) -> None:
        self.state = server_state
        super().__init__(*arguments, **named)

    def do_GET(self) -> None:
        self.state.requests[self.path] += 1
        fault = next((queue.pop(0) for end, queue in self.state.faults.items() if end in self.path and queue), None)
        content = Path(self.translate_path(self.path)).read_bytes() if fault else b""
        if fault is None:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "drop" else content[:-1] + b"!")
        self.close_connection = True

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("shards"), PARTS_OF)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "WAIT_S", 0.01)
    state = Server("")
    with serving(partial(Handler, state, directory=str(folder))) as url:
        state.url = url
        yield state


def config_of(path: str, cache: Path, devices: int = 1, **data: Any) -> ExperimentConfig:
    settings = DataConfig(
        source="shards", path=path, cache_dir=str(cache), shuffle_parts=2, batch_size=12, length=LAYOUT.length
    )
    return ExperimentConfig(
        seed=3,
        data=replace(settings, **data),
        optim=OptimConfig(warmup_steps=1),
        trainer=TrainerConfig(max_steps=STEPS, devices=devices),
    )


def batches(config: ExperimentConfig, rank: int = 0, consumed: int = 0, workers: int = 0) -> list[torch.Tensor]:
    """Training batches of one rank, as its data module loads them."""
    data: BatchDataModule = PairDataModule(config, stored_shards(config, TOKENIZERS, 4), LAYOUT)
    data.setup("fit")
    sampler = make_sampler(config, data.train_set.part_sizes, rank, config.trainer.devices)
    sampler.consumed, sampler.announce, sampler.ahead = consumed, data.train_set.announce, 3 * 12
    loader: Any = DataLoader(data.train_set, batch_sampler=sampler, collate_fn=lambda batch: batch, num_workers=workers)
    found = [batch["ids_BT"] for batch in loader]
    assert isinstance(data.train_set, CaptionedIds)
    if threads := data.train_set.columns.parts._threads:
        threads.shutdown()  # which may still fetch and make room
    return found


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture
def in_place(folder: Path, tmp_path: Path) -> list[torch.Tensor]:
    """The batches of one process that maps the folder."""
    return batches(config_of(str(folder), tmp_path))


@pytest.mark.parametrize("protocol", ["http", "file", "memory"])
def test_batches_are_those_of_the_folder_read_in_place(
    protocol: str, server: Server, folder: Path, tmp_path: Path, in_place: list[torch.Tensor]
) -> None:
    url = {"http": server.url, "file": f"file://{folder}", "memory": "memory://shards/of/pairs"}[protocol]
    if protocol == "memory":
        fsspec.filesystem("memory").put(f"{folder}/", "/shards/of/pairs/", recursive=True)
    assert same(batches(config_of(url, tmp_path / "cache")), in_place)
    parts = {path: count for path, count in server.requests.items() if path.endswith(".arrow")}
    # Each part of the training data once, and the validation part whose image size was read.
    assert sorted(parts.values()) == ([1] * (len(PARTS_OF) + 1) if protocol == "http" else [])


def test_two_ranks_with_two_workers_draw_the_batches_of_one_process_and_resume_in_the_middle(
    server: Server, tmp_path: Path, in_place: list[torch.Tensor]
) -> None:
    config = config_of(server.url, tmp_path / "cache", devices=2)
    for consumed in (0, 12 * 8):
        ranks = [batches(config, rank, consumed, workers=2) for rank in range(2)]
        for step, (first, second) in enumerate(zip(*ranks, strict=True)):
            whole = in_place[consumed // 12 + step]
            assert torch.equal(whole[:6, : first.shape[1]], first)
            assert torch.equal(whole[6:, : second.shape[1]], second)
    # One process fetched for all.
    assert all(count == 1 for path, count in server.requests.items() if path.endswith(".arrow"))


def test_a_dropped_connection_and_damage_in_transit_are_tried_again(
    server: Server, tmp_path: Path, in_place: list[torch.Tensor]
) -> None:
    server.faults = {"part-00002/data": ["drop", "drop"], "train/part-00000/data": ["damage"]}
    assert same(batches(config_of(server.url, tmp_path / "cache")), in_place)
    assert server.faults == {"part-00002/data": [], "train/part-00000/data": []}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("drop", r"part-00002/data-00000-of-00001\.arrow cannot be read: .*4 tries"),
        ("damage", r"part-00002/data-00000-of-00001\.arrow is damaged: its sha256 is .*4 tries.*--resume continues"),
    ],
)
def test_a_part_that_stays_out_of_reach_is_named(fault: str, message: str, server: Server, tmp_path: Path) -> None:
    server.faults = {"train/part-00002/data": [fault] * 20}
    with pytest.raises(PartError, match=rf"^token shard {server.url}/train/{message}"):
        batches(config_of(server.url, tmp_path / "cache"))


def test_the_cache_takes_at_most_its_limit_and_damage_in_it_is_repaired(
    server: Server, folder: Path, tmp_path: Path, in_place: list[torch.Tensor]
) -> None:
    largest = Parts(folder, "train").largest
    limit = 4 * largest + 100
    config = config_of(server.url, tmp_path / "cache", remote_cache_gib=limit / 2**30)
    assert same(batches(config), in_place)
    (files,) = (tmp_path / "cache").glob("remote-*/files")
    kept = [file for file in files.iterdir() if len(file.name) == 64]
    assert 0 < sum(file.stat().st_size for file in kept) <= limit
    fetched = sum(server.requests.values())
    for file in kept:
        file.write_bytes(file.read_bytes()[:-9])
    assert same(batches(config), in_place)
    assert sum(server.requests.values()) >= fetched + len(kept)
    with pytest.raises(ValueError, match=r"data\.remote_cache_gib=.*twice data\.shuffle_parts=2 parts"):
        batches(replace(config, data=replace(config.data, remote_cache_gib=1e-9)))


def test_what_cannot_be_trained_on_is_refused_at_the_start(server: Server, folder: Path, tmp_path: Path) -> None:
    config = config_of(server.url, tmp_path / "cache")

    def refused(message: str, tokenizers: dict[str, str] = TOKENIZERS, tokens: int = 4, **data: Any) -> None:
        with pytest.raises(ValueError, match=message):
            stored_shards(replace(config, data=replace(config.data, **data)), tokenizers, tokens)

    refused(r"another image tokenizer \(sha256 1111.*image_tokenizer\.path", TOKENIZERS | {"image": "2" * 64})
    refused(r"images have 4 ids, but the image tokenizer makes 64", tokens=64)
    refused(r"data\.shuffle_parts=null: expected a number of parts, such as 16", shuffle_parts=None)
    refused(r"data\.train_size=5: expected null", train_size=5)
    refused(r"/nothing: index\.json cannot be read", path=f"{server.url}/nothing")
    refused(r"data\.path=nosuch://x: index\.json cannot be read: Protocol not known", path="nosuch://x")
    refused(r"no index\.json; expected token shards", path=str(tmp_path))
    local = config_of(str(folder), tmp_path, shuffle_parts=None)
    assert stored_shards(local, TOKENIZERS, 4) == folder


class NoCredentialsError(Exception):
    """As botocore names it."""


class Denied(fsspec.AbstractFileSystem):
    """A place that refuses; counts what it is asked."""

    protocol, asked = "denied", Counter[str]()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        Denied.asked[path] += 1
        errors = {"none": NoCredentialsError("Unable to locate credentials"), "gone": FileNotFoundError(path)}
        raise errors.get(path.split("/")[0]) or PermissionError("Forbidden")


def test_a_missing_package_or_credentials_are_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("denied", Denied, clobber=True)
    monkeypatch.setattr(remote, "WAIT_S", 9.0)
    monkeypatch.setitem(remote.LOGINS, "denied", "DENIED_TOKEN")
    expected = {
        "s3://bucket/x": "requires s3fs, which is not installed: pip install s3fs",
        "gs://bucket/x": "requires gcsfs, which is not installed: pip install gcsfs",
        "denied://none": "access is denied (NoCredentialsError: Unable to locate credentials); "
        "it requires credentials: DENIED_TOKEN",
        "denied://key": "access is denied (PermissionError: Forbidden); it requires credentials: DENIED_TOKEN",
        "denied://gone": "FileNotFoundError: gone/index.json; a private one requires credentials: DENIED_TOKEN",
    }
    for url, message in expected.items():
        if find_spec({"s3": "s3fs", "gs": "gcsfs"}.get(url[:2], "none")):
            continue
        with pytest.raises(
            ValueError, match=f"^{re.escape(f'data.path={url}: index.json cannot be read: {message}')}$"
        ):
            remote.read_remote_index(url)
    assert set(Denied.asked.values()) == {1}  # another try cannot help


def test_hf_addresses_are_opened_by_the_hub_client() -> None:
    files, path = remote.open_place("hf://datasets/ORG/NAME/folder/index.json")
    assert type(files).__name__ == "HfFileSystem"
    assert path == "datasets/ORG/NAME/folder/index.json"
