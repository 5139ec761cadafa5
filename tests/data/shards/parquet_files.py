"""Small Parquet files of captioned images, and a server that sends parts of them."""

import io
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.http_server import serving

GROUP = 7  # rows of a row group
TRAIN, VAL = (31, 20), 9  # rows of each training file, and of the validation file


def png(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(file, "PNG")
    return file.getvalue()


def table(rows: list[tuple[bytes | None, Any]]) -> pa.Table:
    images = [{"bytes": content, "path": None} for content, _ in rows]
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table({"image": image, "caption": [caption for _, caption in rows], "more": [1] * len(rows)})


def write(folder: Path, **changed: tuple[bytes | None, Any]) -> Path:
    """Two training files and a validation file, in row groups of `GROUP`; `rowN` replaces row N of training."""
    (folder / "data").mkdir(parents=True)
    rows: list[tuple[bytes | None, Any]] = [(png(n), f"a red square {n}") for n in range(sum(TRAIN))]
    for name, row in changed.items():
        rows[int(name.removeprefix("row"))] = row
    files = {"train-0": rows[: TRAIN[0]], "train-1": rows[TRAIN[0] :]}
    files["validation-0"] = [(png(1000 + n), f"a circle {n}") for n in range(VAL)]
    for name, part in files.items():
        pq.write_table(table(part), folder / "data" / f"{name}.parquet", row_group_size=GROUP, compression="none")
    return folder


@dataclass
class Server:
    """A folder served by HTTP with byte ranges.

    Attributes:
        requests: by path, of files that are not folders.
        faults: requests of a file to cut short, by the end of its path.
        ranges: whether parts of files are served.
        lost_after: requests of files after which all are cut short; None: never.
    """

    url: str
    requests: Counter[str] = field(default_factory=Counter)
    faults: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    lost_after: int | None = None


class Handler(BaseHTTPRequestHandler):
    def __init__(self, server_state: Server, root: Path, *arguments: Any) -> None:
        self.state, self.root = server_state, root
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        place = self.root / self.path.strip("/")
        if place.is_dir():
            links = "".join(f'<a href="{entry.name}{"/" * entry.is_dir()}">x</a>' for entry in sorted(place.iterdir()))
            self.respond(200, links.encode(), body, {"Content-Type": "text/html"})
        elif not place.is_file():
            self.send_error(404)
        else:
            self.state.requests[self.path] += body
            if self.state.lost_after is not None:
                self.state.lost_after -= body
            content, wanted = place.read_bytes(), self.headers.get("Range", "")
            if not self.state.ranges or not wanted:
                self.respond(200, content, body, {"Accept-Ranges": "bytes"} if self.state.ranges else {})
                return
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(content)), len(content) - 1)
            head = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            self.respond(206, content[start : end + 1], body, head)

    def respond(self, status: int, content: bytes, body: bool, head: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in head.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        fault = next((end for end, left in self.state.faults.items() if end in self.path and left and body), None)
        if fault is not None:
            self.state.faults[fault] -= 1
        short = fault is not None or (self.state.lost_after or 0) < 0
        if body:
            self.wfile.write(content[: len(content) // 2] if short else content)
        self.close_connection = short

    def log_message(self, *arguments: Any) -> None: ...


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serves the files in `data` of a folder."""
    state = Server("")
    with serving(partial(Handler, state, folder)) as url:
        state.url = f"{url}/data"
        yield state
