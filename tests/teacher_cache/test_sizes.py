"""Numbers of bytes as users write and read them."""

import pytest

from textbrewer.teacher_cache.sizes import in_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1, 1),
        (12345, 12345),
        ("7", 7),
        ("7b", 7),
        ("1kb", 1000),
        ("1K", 1000),
        ("500 MB", 500 * 1000**2),
        (" 20GB ", 20 * 1000**3),
        ("1.5g", 1500 * 1000**2),
        (".5tb", 500 * 1000**3),
    ],
)
def test_parse_bytes(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "20 PB", "-1GB", "1,5GB", "20GiB", "0", 0, -3, 2.5, "1e9"])
def test_what_is_no_size_is_refused_by_name(text):
    with pytest.raises((ValueError, TypeError), match=r"max_bytes must be .*, got"):
        parse_bytes(text)


@pytest.mark.parametrize("size", [None, True, ["1GB"]])
def test_what_is_no_number_and_no_text_is_refused(size):
    with pytest.raises(TypeError, match="max_bytes must be a number of bytes, or a text such as '20GB'"):
        parse_bytes(size)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (1234567, "1.2 MB"),
        (2 * 10**10, "20.0 GB"),
        (3.5 * 10**12, "3.5 TB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_in_bytes(count, text):
    assert in_bytes(count) == text
