"""Rows of a file that a user gives: they begin as texts do, and no more of the file is read than they take."""

import json
import re

import pytest
import torch

from surogate_quantize.calibration import text_file
from surogate_quantize.calibration.text import rows_of_file
from surogate_quantize.calibration.text_file import CalibrationTextError, text_pieces

BOS, EOS = 1, 2


class Tokenizer:
    """A token for each character; special ones where a text asks for none would be seen."""

    def __init__(self, bos=BOS, eos=EOS):
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [7] * add_special_tokens + [ord(letter) for letter in text]}


def text_of(path, content):
    path.write_text(content)
    return path


def letters(rows):
    return ["".join(map(chr, row)) for row in rows.tolist()]


@pytest.mark.parametrize(
    ("bos", "eos", "start", "expected"),
    [(BOS, EOS, BOS, ["abc", "def"]), (None, EOS, EOS, ["abc", "def"]), (0, EOS, 0, ["abc", "def"])],
)
def test_each_row_of_text_begins_as_texts_do_and_is_no_longer(tmp_path, bos, eos, start, expected):
    found = rows_of_file(text_of(tmp_path / "a.txt", "abcdefgh"), Tokenizer(bos, eos), 9, 4)
    assert (found.dtype, found[:, 0].tolist()) == (torch.int64, [start] * 2)
    assert letters(found[:, 1:]) == expected


def test_a_tokenizer_without_either_gives_text_alone(tmp_path):
    found = rows_of_file(text_of(tmp_path / "a.txt", "abcdefgh"), Tokenizer(None, None), 9, 4)
    assert letters(found) == ["abcd", "efgh"]


def test_texts_of_lines_follow_each_other(tmp_path):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cde", "fgh"))
    found = rows_of_file(text_of(tmp_path / "a.jsonl", lines), Tokenizer(), 2, 4)
    assert found[:, 0].tolist() == [BOS] * 2
    assert letters(found[:, 1:]) == ["abc", "def"]


@pytest.mark.parametrize("tokenizer", [None, Tokenizer()])
def test_ids_stay_as_they_are(tmp_path, tokenizer):
    lines = "".join(json.dumps({"input_ids": ids}) + "\n" for ids in ([BOS, 5, 6], [7, 8, 9, 10]))
    found = rows_of_file(text_of(tmp_path / "a.jsonl", lines), tokenizer, 9, 3)
    assert found.tolist() == [[BOS, 5, 6], [7, 8, 9]]


def test_a_text_of_less_than_a_row_is_refused_by_what_a_row_takes_of_it(tmp_path):
    with pytest.raises(CalibrationTextError, match=r"a\.txt: has 2 tokens, and a row takes 3; give more text"):
        rows_of_file(text_of(tmp_path / "a.txt", "ab"), Tokenizer(), 9, 4)


class Lines(Tokenizer):
    """A token for each line with the line ends behind it, from the first and last of its words; keeps what it reads."""

    def __init__(self):
        super().__init__(None, None)
        self.read = []

    def __call__(self, text, add_special_tokens=True):
        self.read.append(text)
        lines = re.findall(r"[^\n]+\n*", text)
        return {"input_ids": [int(line.split()[0]) * 1000 + len(line) for line in lines]}


LINES = [f"{number} {'word ' * (number % 5)}end" + "\n" * (1 + number % 3) for number in range(300)]


@pytest.mark.parametrize("chunk", [60, 61, 62, 64, 100, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_chunks_tear_no_line_and_no_run_of_line_ends(tmp_path, monkeypatch, chunk, end):
    monkeypatch.setattr(text_file, "CHUNK", chunk)
    path = tmp_path / "a.txt"
    path.write_bytes("".join(LINES).replace("\n", end).encode())
    tokenizer = Lines()
    found = rows_of_file(path, tokenizer, 3, 100).flatten().tolist()
    assert found == [number * 1000 + len(line) for number, line in enumerate(LINES)]
    assert "".join(tokenizer.read) == "".join(LINES)
    assert max(map(len, tokenizer.read)) <= 3 * chunk


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("abc def ghi jkl", ["abc def", " ghi jkl"]),
        ("abcdefghijklmnopqr", ["abcdefgh", "ijklmnop", "qr"]),
        (" bcdefghijklmnopqr", [" bcdefgh", "ijklmnop", "qr"]),
        ("ab\ncd efgh\n\n\nij", ["ab\n", "cd efgh\n\n\nij"]),
        ("abcdefg\n", ["abcdefg\n", ""]),
        ("", [""]),
    ],
)
def test_a_line_that_is_too_long_is_cut_between_its_words(tmp_path, monkeypatch, line, pieces):
    monkeypatch.setattr(text_file, "CHUNK", 8)
    assert list(text_pieces(text_of(tmp_path / "a.txt", line))) == pieces


def test_no_more_is_read_than_the_rows_take(tmp_path, monkeypatch):
    monkeypatch.setattr(text_file, "CHUNK", 256)
    path = tmp_path / "a.txt"
    path.write_bytes(b"1 a\n" * 50_000 + b"\xff")
    tokenizer = Lines()
    assert rows_of_file(path, tokenizer, 2, 100).shape == (2, 100)
    assert sum(map(len, tokenizer.read)) <= 4 * 200 + 256
    with pytest.raises(CalibrationTextError, match=r"a\.txt: can't be read \(is no UTF-8: byte 0xff, inv") as raised:
        rows_of_file(path, tokenizer, 501, 100)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"ab\xc3", b'{"text": "ab"}\n\xff\xfe'], ids=["txt", "jsonl"])
def test_what_is_no_utf_8_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / ("a.jsonl" if content.startswith(b"{") else "a.txt")
    path.write_bytes(content)
    with pytest.raises(CalibrationTextError, match=r": can't be read \(is no UTF-8: byte 0x[cf][3f], ") as raised:
        rows_of_file(path, Tokenizer(), 9, 4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("number", ["1" + "0" * 5000, str(1 << 63), str(1 << 31), "-1", "1.0", "true"], ids=len)
def test_what_can_be_no_id_is_refused_in_one_line(tmp_path, number):
    path = text_of(tmp_path / "a.jsonl", f'{{"input_ids": [1, {number}]}}\n')
    with pytest.raises(CalibrationTextError, match=r"a\.jsonl") as raised:
        rows_of_file(path, None, 1, 2)
    assert "\n" not in str(raised.value)
