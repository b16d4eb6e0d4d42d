import math

import pytest

from wardround.canonical import canonical_json, digest_name, frame, sha256


def test_one_value_one_text():
    assert canonical_json({"b": [1, 0.1], "a": "é"}) == '{"a":"é","b":[1,0.1]}'.encode()
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value):
    with pytest.raises(ValueError):
        canonical_json([value])


def test_frame_puts_a_length_before_each_part():
    assert frame(b"ab", b"") == b"\0\0\0\2ab\0\0\0\0"


def test_no_two_lists_of_parts_have_one_frame():
    lists = [(b"ab", b"c"), (b"a", b"bc"), (b"abc",), (b"abc", b""), (b"", b"abc"), ()]
    assert len({frame(*parts) for parts in lists}) == len(lists)


def test_digest_name():
    assert digest_name(sha256(b"")) == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
