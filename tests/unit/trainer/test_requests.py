"""Requests and answers as files."""

import pytest

from trainer.inference.requests import (
    Decoding,
    Generate,
    Generated,
    Score,
    Scored,
    read_answers,
    read_requests,
    write_answers,
    write_requests,
)

REQUESTS = [
    Score((1, 2), (3,)),
    Generate((1,), 4, (0, 7), Decoding(temperature=0.7, top_p=0.9, seed=3)),
]
ANSWERS = [Scored((-0.1234567890123,), True), Generated((5, 6, 7))]


def test_files_hold_exactly_what_was_written(tmp_path):
    write_requests(tmp_path / "requests", REQUESTS)
    write_answers(tmp_path / "answers", ANSWERS)
    assert read_requests(tmp_path / "requests") == REQUESTS
    assert read_answers(tmp_path / "answers", REQUESTS) == ANSWERS


def test_files_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "answers").mkdir()
    with pytest.raises(OSError, match="answers"):
        write_answers(tmp_path / "answers", ANSWERS)
    assert [path.name for path in tmp_path.iterdir()] == ["answers"]


def test_answers_to_other_requests_are_refused(tmp_path):
    write_answers(tmp_path / "answers", ANSWERS)
    with pytest.raises(ValueError, match="2 answers to 1 requests"):
        read_answers(tmp_path / "answers", REQUESTS[:1])
    with pytest.raises(ValueError, match="answers another request"):
        read_answers(tmp_path / "answers", REQUESTS[::-1])
