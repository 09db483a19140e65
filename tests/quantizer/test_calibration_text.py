"""Rows of a file that a user gives: they begin as texts do, and no more of the file is read than they take."""

import json

import pytest
import torch

from surogate_quantize.calibration.text import CalibrationTextError, rows_of_file

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
