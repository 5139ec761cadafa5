"""Token shards that were prepared elsewhere: `data.source=shards`, a folder that is read in place, or a URL.

Training reads them part by part: of remote ones, only the parts in use are on this machine (`remote.py`).
"""

import json
from pathlib import Path
from typing import Any

from t2i_lm.config.experiment import ExperimentConfig
from t2i_lm.data.shards.cache import say, short_hash
from t2i_lm.data.shards.format import PARTS, data_hash, read_index
from t2i_lm.data.shards.held_out import RECURRING, require_held_out
from t2i_lm.data.shards.parts import Parts
from t2i_lm.data.shards.rejects import require_few_rejects
from t2i_lm.data.shards.remote import RemoteFiles, is_url, read_remote_index
from t2i_lm.storage.writing import DiskError, write_atomic


def stored_shards(config: ExperimentConfig, tokenizers: dict[str, str], image_tokens: int) -> Path:
    """The folder of the shards at `data.path`; of a URL, one in `data.cache_dir` with a copy of its index.

    Raises:
        ValueError: if there are none, they cannot be read, or were made with other tokenizers or image sizes.
    """
    data, path = config.data, str(config.data.path)
    for split, size in (("train", data.train_size), ("val", data.val_size)):
        if size is not None:
            raise ValueError(f"data.{split}_size={size}: expected null, since shards are read whole")
    folder = _mirror(config, path.rstrip("/")) if is_url(path) else Path(path)
    index = read_index(folder)
    if index is None:
        raise ValueError(
            f"data.path={path}: no index.json; expected token shards, which python -m t2i_lm.prepare writes"
        )
    _require_fit(index, f"data.path={path}", tokenizers)
    held_out = Parts(folder, next(split for split in index["splits"] if split != "train"))
    found = held_out.table(int(held_out.rows.argmax())).schema.field("image_ids").type.list_size
    if found != image_tokens:
        raise ValueError(
            f"data.path={path}: images have {found} ids, but the image tokenizer makes {image_tokens} of "
            f"image_tokenizer.size={config.image_tokenizer.size} pixels"
        )
    rows = ", ".join(f"{entry['rows']:,} {split}" for split, entry in sorted(index["splits"].items()))
    say(f"reading {path}: {rows} rows, data hash {index['data_hash']}")
    require_few_rejects(data.max_reject_share, index, f"data.path={path}")
    require_held_out(config, folder)
    return folder


def _mirror(config: ExperimentConfig, url: str) -> Path:
    """A folder with the index of remote shards, whose parts are fetched when they are read."""
    data = config.data
    if data.shuffle_parts is None:
        raise ValueError(
            f"data.shuffle_parts=null: expected a number of parts, such as 16, with data.path={url}: in one "
            "permutation of all samples, every batch would read from many parts"
        )
    index = read_remote_index(url)
    if PARTS not in index or RECURRING not in index:
        raise ValueError(
            f"data.path={url}: index.json is of an older version, which does not tell the sizes of parts; run "
            "python -m t2i_lm.prepare where the shards were prepared, and copy index.json again"
        )
    if data_hash(index) != index.get("data_hash"):
        raise ValueError(f"data.path={url}: index.json is damaged: its data hash is {data_hash(index)}")
    folder = Path(data.cache_dir) / f"remote-{short_hash([url, index['data_hash']])}"
    limit = int(data.remote_cache_gib * 2**30)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        RemoteFiles(str((folder / "files").absolute()), url, limit).write(folder)
        write_atomic(folder / "index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot write {DiskError.of(error, folder)}") from error
    # The parts in use, and those that follow them.
    least = 2 * data.shuffle_parts * max(Parts(folder, split).largest for split in index["splits"])
    if limit < least:
        raise ValueError(
            f"data.remote_cache_gib={data.remote_cache_gib}: expected at least {least / 2**30:.3g} GiB, twice "
            f"data.shuffle_parts={data.shuffle_parts} parts"
        )
    return folder


def _require_fit(index: dict[str, Any], origin: str, tokenizers: dict[str, str]) -> None:
    for name, sha256 in tokenizers.items():
        made = index.get("tokenizers", {}).get(name)
        if made != sha256:
            raise ValueError(
                f"{origin}: made with another {name} tokenizer (sha256 {str(made)[:12]}) than {name}_tokenizer.path "
                f"({sha256[:12]})"
            )
    if "train" not in index["splits"] or len(index["splits"]) < 2:
        raise ValueError(f"{origin}: expected the splits train and val, found {', '.join(index['splits'])}")
