"""The questions are the same for ever, differ between splits, and have answers that exact match can judge."""

import hashlib
import subprocess
import sys
from collections import Counter
from typing import get_args

import pytest

from quant_experts.demo import KINDS, Question, questions
from quant_experts.demo.questions import SEEDS, Split, question
from quant_experts.demo.rendering import SIDE

SPLITS: tuple[Split, ...] = get_args(Split)


def contents(asked: Question) -> tuple[str, bytes | None, str, str]:
    picture = asked.image.tobytes() if asked.image is not None else None
    return asked.kind, picture and hashlib.sha256(picture).digest(), asked.question, asked.answer


@pytest.mark.parametrize("split", SPLITS)
def test_a_longer_list_begins_with_a_shorter_one(split: Split) -> None:
    long, short = questions(split, 21), questions(split, 9)
    assert [contents(one) for one in long[:9]] == [contents(one) for one in short]
    assert contents(question(split, 20)) == contents(long[20])


def test_splits_share_no_question() -> None:
    assert len(set(SEEDS.values())) == len(SPLITS)
    seen = [contents(one)[1:] for split in SPLITS for one in questions(split, 70)]
    assert len(set(seen)) == len(seen)


def test_kinds_are_even() -> None:
    assert len(KINDS) >= 6
    assert set(Counter(one.kind for one in questions("test", 5 * len(KINDS))).values()) == {5}


def test_questions_are_well_formed() -> None:
    for asked in questions("calibration", 210):
        assert (asked.image is None) == (asked.kind == "text")
        if asked.image is not None:
            assert asked.image.mode == "RGB" and asked.image.size == (SIDE, SIDE)
        assert asked.answer == asked.answer.strip() and 1 <= len(asked.answer) <= 24
        assert asked.answer.isascii() and asked.question.isascii()
        if asked.kind == "ocr":
            assert len(asked.answer) >= 12


def test_answers_of_text_questions_are_right() -> None:
    checked = Counter[str]()
    for asked in questions("tuning", 40 * len(KINDS)):
        match asked.kind, asked.question.split():
            case "text", ["Reverse", word]:
                assert asked.answer == "".join(reversed(word))
            case "text", ["Sort", digits]:
                assert list(asked.answer) == sorted(digits)
            case "text", ["Add", first, "and", second]:
                assert int(asked.answer) == int(first) + int(second)
            case "text", ["Replace", old, "by", new, "in", word]:
                assert asked.answer == new.join(word.split(old))
            case _:
                continue
        checked[asked.question.split()[0]] += 1
    assert len(checked) == 4 and checked.total() == 40


def test_importing_the_demo_is_light() -> None:
    code = "import quant_experts.demo, sys; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
