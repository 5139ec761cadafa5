"""Captions are strings or lists of strings; anything else is a reject that names what it is."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t2i_lm.data.captions import Repeated, caption_value, captions_of, find_name, joined_captions, parse_json
from t2i_lm.data.pairs import RejectedPairError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
# Why text may be no caption.
TEXT_REASONS = ("no caption", "caption is a list or an object written as text", "caption is not valid Unicode")
plain = st.text(st.characters(codec="utf-8"), max_size=20)


@settings(deadline=None)
@given(values)
def test_any_value_gives_text_or_a_reject_and_never_another_error(value: Any) -> None:
    texts = [value] if isinstance(value, str) else value
    intended = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    captions, reject = None, None
    try:
        captions = captions_of(value, "row 3")
    except RejectedPairError as error:
        reject = error
    if reject is not None:
        assert str(reject).startswith("row 3")
        assert not intended or reject.reason in TEXT_REASONS
    else:
        assert intended
        assert captions == [text.strip() for text in texts if text.strip()]


@settings(deadline=None)
@given(values.filter(lambda value: isinstance(value, list | dict)))
def test_structures_written_as_text_are_rejected(value: Any) -> None:
    with pytest.raises(RejectedPairError, match="written as text"):
        captions_of(json.dumps(value), "row 3")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 3: caption is null"),
        (float("nan"), "row 3: caption is NaN, not a string"),
        (7, "row 3: caption is a number"),
        (True, "row 3: caption is a boolean"),
        ({"en": "a", "de": "b"}, r"row 3 \(keys en, de\): caption is an object"),
        (["a", 3], "row 3: caption list holds a number"),
        (["a", None], "row 3: caption list holds null"),
        ([["a"]], "row 3: caption list holds a list"),
        ([{"text": "a"}], "row 3: caption list holds an object"),
        (b"a", "row 3: caption is binary data"),
        (Repeated(), "row 3: caption is given more than once"),
        ('["a", "b"]', "list or an object written as text"),
        ("['a', 'b']", "list or an object written as text"),
        ('{"en": "a"}', "list or an object written as text"),
        ("[" * 5000 + "]" * 5000, "list or an object written as text"),
        ("\ud800", "not valid Unicode"),
        ("", "row 3: no caption"),
        ([], "row 3: no caption"),
        ([" ", "\n"], "row 3: no caption"),
    ],
)
def test_other_values_are_named(value: Any, message: str) -> None:
    with pytest.raises(RejectedPairError, match=message):
        captions_of(value, "row 3")


@pytest.mark.parametrize("text", ["[a dog]", "{x", "['unfinished", "a [b]", '"quoted"', "007", "NaN"])
def test_text_in_brackets_is_a_caption(text: str) -> None:
    assert captions_of(f" {text} ", "x") == [text]


def test_values_of_one_image_are_joined_and_a_wrong_one_rejects_it() -> None:
    assert joined_captions(["a", ["b", "a"], ""], "x") == ["a", "b", "a"]
    with pytest.raises(RejectedPairError, match="a number"):
        joined_captions(["a", 3], "x")
    with pytest.raises(RejectedPairError, match="no caption"):
        joined_captions(["", []], "x")


def test_the_caption_field_is_found_by_name_in_any_case() -> None:
    assert caption_value({"TEXT": "a", "URL": "b"}, "x") == "a"
    assert caption_value({"text": "a", "caption": "b", "captions": ["c"]}, "x") == ["c"]
    assert find_name(("caption",), ["Caption", "caption"]) == "caption"
    with pytest.raises(RejectedPairError, match=r"x \(it has prompt, url\): no caption"):
        caption_value({"prompt": "a", "url": "b"}, "x")
    with pytest.raises(RejectedPairError, match=r"x \('Text' and 'TEXT' are the same name in two cases\)"):
        caption_value({"Text": "a", "TEXT": "b"}, "x")


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "1" * 5000, "", "{'a': 1}"])
def test_json_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_json(text)


@settings(deadline=None)
@given(st.dictionaries(plain, st.integers(), min_size=1, max_size=4))
def test_a_repeated_key_has_no_value(fields: dict[str, int]) -> None:
    assert parse_json(json.dumps(fields)) == fields
    key = next(iter(fields))
    repeated = parse_json(json.dumps(fields)[:-1] + f", {json.dumps(key)}: 1}}")
    assert isinstance(repeated.pop(key), Repeated)
    assert repeated == {name: value for name, value in fields.items() if name != key}
