"""Reading evaluation questions: every accepted key, every refusal with its line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_image

from quant_experts.artifacts import Sample
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.questions_file import demo_items, read_questions


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_accepted_keys(tmp_path: Path) -> None:
    tiny_image(8, 6).save(tmp_path / "a.png")
    path = write(
        tmp_path,
        {"question": "2 + 2?", "answer": 4},
        {"question": "What?", "answers": ["cat", "kitten"], "image": "a.png", "kind": "pets", "scorer": "anls"},
        {"question": "Same?", "answer": "yes", "images": ["a.png", "a.png"]},
    )
    first, second, third = read_questions(path)
    assert (first.images, first.kind, first.scorer, first.answers) == ((), "all", "exact_match", ("4",))
    assert (second.kind, second.scorer, second.answers) == ("pets", "anls", ("cat", "kitten"))
    assert second.images[0].size == (8, 6) and len(third.images) == 2
    assert first.as_sample() == Sample("2 + 2?", "4")
    assert len(read_questions(path, limit=1)) == 1
    assert [item.scorer for item in read_questions(path, default_scorer="anls")] == ["anls"] * 3
    moved = write(tmp_path / "..", {"question": "What?", "answer": "cat", "image": "a.png"})
    assert read_questions(moved, images=tmp_path)[0].images


@pytest.mark.parametrize(
    "line, message",
    [
        ({"answer": "4"}, "has no question"),
        ({"question": " ", "answer": "4"}, "has no question"),
        ([1], "has no question"),
        ({"question": "q"}, "needs an answer"),
        ({"question": "q", "answers": []}, "needs an answer"),
        ({"question": "q", "answer": True}, "needs an answer"),
        ({"question": "q", "answer": float("inf")}, "needs an answer"),
        ({"question": "q", "answers": ["4", None]}, "needs an answer"),
        ({"question": "q", "answer": "4", "scorer": "bleu"}, "scorer one of exact_match"),
        ({"question": "q", "answer": "4", "kind": 3}, "kind must be text"),
        ({"question": "q", "answer": "4", "anwsers": []}, "unknown key 'anwsers'"),
        ({"question": "q", "answer": "4", "image": "gone.png"}, "gone.png' does not exist"),
        ("{", "is not JSON"),
    ],
)
def test_refusals_name_the_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path, {"question": "q", "answer": "a"}, line)
    with pytest.raises(QuantExpertsError, match=message) as caught:
        read_questions(path)
    assert "questions.jsonl line 2" in str(caught.value)


def test_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(QuantExpertsError, match="has no questions"):
        read_questions(write(tmp_path, ""))
    with pytest.raises(QuantExpertsError, match="Cannot read"):
        read_questions(tmp_path / "gone.jsonl")


def test_demo_items() -> None:
    items = demo_items("tuning", 7)
    assert len(items) == 7 and all(item.answers[0] and item.scorer == "exact_match" for item in items)
    assert [len(item.images) for item in items if item.kind == "text"] == [0]
