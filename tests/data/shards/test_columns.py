import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from t2i_lm.data.datamodules import CaptionedIds
from t2i_lm.data.shards.columns import PairColumns
from t2i_lm.data.shards.format import pair_features, part_folder, read_part, write_index, write_part
from t2i_lm.data.shards.parts import Parts, open_split

COUNTS = (3, 1, 2, 4, 1)  # captions of each row


def write(folder: Path) -> None:
    """Writes a training split of two parts."""
    parts = []
    for number, part in enumerate((range(3), range(3, 5))):

        def rows(part: range = part) -> Iterator[dict[str, Any]]:
            for row in part:
                texts = [np.arange(row + caption) for caption in range(COUNTS[row])]
                yield {"id": str(row), "image_ids": np.full(4, row), "text_ids": texts, "meaning": ""}

        target = part_folder(folder, "train", number)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_part(target, rows, pair_features(100, 4, 8), dict)
        parts.append(read_part(target)["sha256"])
    write_index(folder, {"tokenizers": {}, "splits": {"train": {"rows": 5, "parts": parts}}})


def test_columns_equal_the_rows_of_the_split(tmp_path: Path) -> None:
    write(tmp_path)
    split = open_split(tmp_path, "train")
    columns = PairColumns(Parts(tmp_path, "train"))
    assert len(columns) == len(split) == 5
    assert columns.caption_counts().tolist() == [columns.count(row) for row in range(5)] == list(COUNTS)
    for row in range(5):
        whole = split[row]["text_ids"]
        for caption in range(COUNTS[row]):
            assert np.array_equal(columns.caption(row, caption), whole[caption])
    images = columns.images([4, 0, 4, 2])
    assert np.array_equal(images, np.stack(split[[4, 0, 4, 2]]["image_ids"]))
    assert images.dtype == np.uint16


def test_pickled_columns_contain_no_ids_and_map_the_files_again(tmp_path: Path) -> None:
    write(tmp_path)
    columns = PairColumns(Parts(tmp_path, "train"))
    sent = pickle.dumps(columns)
    assert columns.images([4]).tobytes() not in sent
    again = pickle.loads(sent)
    assert np.array_equal(again.images([3, 0]), columns.images([3, 0]))
    assert np.array_equal(again.caption(2, 1), columns.caption(2, 1))


def test_with_all_captions_every_caption_is_a_sample(tmp_path: Path) -> None:
    write(tmp_path)
    each = CaptionedIds(Parts(tmp_path, "train"), "all", seed=0)
    assert len(each) == sum(COUNTS)
    texts, images = each.pairs([(0, index) for index in range(len(each))])
    assert [len(text) for text in texts] == [row + caption for row in range(5) for caption in range(COUNTS[row])]
    assert images[:, 0].tolist() == [row for row in range(5) for _ in range(COUNTS[row])]
