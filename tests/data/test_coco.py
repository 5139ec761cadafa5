"""Choice of captions, preprocessing of images, and the protocol of COCO FID-30k."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_lm.data.coco import choose_prompts, listing_sha256, prompts_sha256, read_coco, read_images, square
from t2i_lm.evaluation.protocol_card import CANONICAL, HEADLINE, NOTE, Card, require_headline
from t2i_lm.storage.resumable import ResumableParts
from tests.data.coco_folder import CAPTION, write_coco

HASH = "0" * 64
# Fields of a card whose values do not affect the headline name. Any change of another field rejects it.
RECORDED: dict[str, Any] = {
    # Recorded only: there is no published list to compare with, see the card's note.
    "prompts_sha256": "1" * 64,
    "captions_sha256": "1" * 64,
    "reference_sha256": "1" * 64,
    # Determined by the captions and `prompt_seed`; their hash is `prompts_sha256`.
    "prompt_ids": [[1, 2]],
    # Not a property of the measurement.
    "note": "another wording",
}


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return write_coco(tmp_path / "coco", 12)


def test_prompts_have_distinct_images_and_smaller_counts_are_prefixes(coco: Path) -> None:
    folder = read_coco(coco)
    assert (len(folder.images), folder.caption_count) == (12, 24)
    prompts = choose_prompts(folder, 10, 2014)
    assert len({prompt.image_id for prompt in prompts}) == 10
    assert {prompt.caption_id % 10 for prompt in prompts} == {0, 1}
    assert all(prompt.text.endswith("squares") for prompt in prompts)
    assert choose_prompts(folder, 4, 2014) == prompts[:4]
    assert choose_prompts(folder, 10, 2015) != prompts
    # Published numbers depend on this list: another hash is another protocol.
    assert prompts_sha256(prompts)[:16] == "a6300b100a43af69"


def test_images_are_center_cropped_and_resized_and_damaged_ones_named(coco: Path) -> None:
    ramp_HW3 = np.zeros((64, 100, 3), np.uint8)
    ramp_HW3[:, 18:82] = 200
    assert (square(Image.fromarray(ramp_HW3)) == 200).all()
    exact_HW3 = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert (square(Image.fromarray(exact_HW3)) == exact_HW3).all()
    resized = Image.fromarray(exact_HW3[:, :200]).crop((0, 28, 200, 228)).resize((256, 256), Image.Resampling.LANCZOS)
    assert (square(Image.fromarray(exact_HW3[:, :200])) == np.asarray(resized)).all()
    before = listing_sha256(read_coco(coco))
    broken = coco / "val2014" / "COCO_val2014_000000000003.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    assert listing_sha256(read_coco(coco)) != before
    with pytest.raises(ValueError, match=r"000000000003.jpg: truncated"):
        read_images(read_coco(coco), [broken.name])


def test_errors_name_wrong_folders_captions_and_images(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no .*captions_val2014.json"):
        read_coco(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"--prompts 13: .*captions_val2014.json has captions of 12 images"):
        choose_prompts(read_coco(coco), 13, 2014)
    content = json.loads((coco / CAPTION).read_text())
    for row in content["annotations"]:
        row["caption"] = " \n" if row["image_id"] == 5 else row["caption"]
    (coco / CAPTION).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"caption 5\d of image 5 is empty"):
        choose_prompts(read_coco(coco), 12, 2014)
    (coco / "val2014" / "COCO_val2014_000000000007.jpg").unlink()
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] == 7]
    (coco / CAPTION).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"image 7 \(COCO_val2014_000000000007.jpg\) is not in"):
        choose_prompts(read_coco(coco), 1, 2014)
    content["annotations"][0]["caption"] = None
    (coco / CAPTION).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"caption 7\d is of type NoneType, not a string"):
        read_coco(coco)
    (coco / CAPTION).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not a COCO caption file"):
        read_coco(coco)
    (coco / CAPTION).write_text("{}")
    with pytest.raises(ValueError, match="is not a COCO caption file"):
        read_coco(coco)
    for image in (coco / "val2014").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="holds no"):
        read_coco(coco)


def test_only_the_canonical_protocol_has_the_headline_name() -> None:
    card = Card(prompts_sha256=HASH, captions_sha256=HASH, reference_sha256=HASH, **CANONICAL)
    assert card.title == HEADLINE
    require_headline(card)
    for key in (field.name for field in fields(Card)):
        if key in RECORDED:
            require_headline(replace(card, **{key: RECORDED[key]}))
            continue
        value = getattr(card, key)
        changed = not value if isinstance(value, bool) else "other" if isinstance(value, str) else 7
        other = replace(card, **{key: changed})
        assert other.title != HEADLINE
        with pytest.raises(ValueError, match=rf"not {HEADLINE}: {key}={getattr(other, key)!r} \(not {value!r}\)"):
            require_headline(other)
    assert HEADLINE not in replace(card, pictures="reconstructed").title
    for key in ("prompts_sha256", "captions_sha256", "reference_sha256"):
        with pytest.raises(ValueError, match=rf"{key}='listing' \(not the hash"):
            require_headline(replace(card, **{key: "listing"}))


def test_the_card_notes_that_its_hashes_are_unchecked() -> None:
    card = Card(prompts_sha256=HASH, captions_sha256=HASH, reference_sha256=HASH, **CANONICAL)
    assert card.as_dict()["note"] == NOTE
    for word in ("captions", "reference", "recorded", "not checked against a published list"):
        assert word in NOTE


def test_parts_are_computed_once_and_damaged_or_foreign_ones_again(tmp_path: Path) -> None:
    made: list[range] = []

    def make(span: range) -> dict[str, torch.Tensor]:
        made.append(span)
        return {"numbers": torch.tensor(list(span))}

    parts = ResumableParts(tmp_path / "work", {"seed": 0}, items=10, size=4)
    parts.complete(make, 1, 2, lambda _: None)
    assert made == [range(4, 8)]
    parts.complete(make, 0, 1, lambda _: None)
    assert made[1:] == [range(4), range(8, 10)]
    parts.path(2).write_bytes(parts.path(2).read_bytes()[:-3])  # cut short
    other = ResumableParts(tmp_path / "other", {"seed": 1}, items=10, size=4)
    other.complete(make, 0, 1, lambda _: None)
    other.path(0).replace(parts.path(0))  # of another computation
    assert [parts.done(number) for number in range(3)] == [False, True, False]
    parts.complete(make, 0, 1, lambda _: None)
    assert torch.cat([parts.read(number)["numbers"] for number in range(3)]).tolist() == list(range(10))
    assert not list((tmp_path / "work").glob("*.tmp"))
    with pytest.raises(ValueError, match="seed=0, now 1"):
        ResumableParts(tmp_path / "work", {"seed": 1}, items=10, size=4)
