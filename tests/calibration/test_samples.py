"""Every accepted form of samples gives the same samples; every bad one gives a sentence that names it."""

import io
import json
import re
import sys
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_models import tiny_image

from quant_experts.artifacts import Sample
from quant_experts.calibration.samples import CAPTION_QUESTION, load_samples
from quant_experts.errors import QuantExpertsError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_image(20, 10).save(tmp_path / "a.png")
    tiny_image(20, 10).save(tmp_path / "a.jpg")
    return tmp_path


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.mode == second.mode and np.array_equal(np.asarray(first), np.asarray(second))


RECORDS = [
    {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
    },
    {
        "images": ["a.png"],
        "messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A cat."}],
    },
    {
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
        ]
    },
    {"image": "a.png", "question": "What?", "answer": "A cat."},
    {"image": "a.png", "query": "What?", "answers": ["A cat.", "Cat"]},
]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_every_form_gives_the_same_sample(folder: Path, suffix: str) -> None:
    path = folder / f"samples.{suffix}"
    path.write_text(json.dumps(RECORDS) if suffix == "json" else "\n\n".join(map(json.dumps, RECORDS)) + "\n")
    samples, events = load_samples(path)
    assert len(samples) == len(RECORDS) and not events
    for sample in samples:
        assert (sample.question, sample.answer) == ("What?", "A cat.")
        assert len(sample.images) == 1 and same(sample.images[0], tiny_image(20, 10))


def test_iterables(folder: Path) -> None:
    image = tiny_image(20, 10)
    source = [
        (image, "A cat."),
        (str(folder / "a.png"), "What?", "A cat."),
        (encoded(image), "What?", "A cat."),
        Sample("What?", "A cat.", (image,)),
        (None, "2 + 2?", "4"),
        "plain text",
        ([image, folder / "a.png"], "Same?", "yes"),
        {"image": {"bytes": encoded(image), "path": None}, "question": "What?", "answer": "A cat."},
    ]
    samples, events = load_samples(iter(source))
    assert [len(sample.images) for sample in samples] == [1, 1, 1, 1, 0, 0, 2, 1]
    assert samples[0].question == CAPTION_QUESTION and samples[0].answer == "A cat."
    assert samples[4] == Sample("2 + 2?", "4") and samples[5] == Sample("plain text", "")
    assert all(same(each, image) for sample in samples for each in sample.images)
    assert [event.what for event in events] == ["1 of 8 had no answer"]


def test_limit_reads_no_further() -> None:
    def source():
        yield "one"
        yield "two"
        raise AssertionError("read too far")

    assert [sample.question for sample in load_samples(source(), limit=2)[0]] == ["one", "two"]


def test_folders_with_captions(folder: Path) -> None:
    (folder / "a.png").unlink()
    (folder / "a.txt").write_text(" A cat.\n")
    expected = [(CAPTION_QUESTION, "A cat.", 1)]
    for name, content in {
        "": None,
        "captions.json": {"a.jpg": "A cat."},
        "metadata.jsonl": {"file_name": "a.jpg", "text": "A cat."},
    }.items():
        if name:
            (folder / name).write_text(json.dumps(content))
        samples, _ = load_samples(folder)
        assert [(s.question, s.answer, len(s.images)) for s in samples] == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # multiprocess and fsspec inside datasets
def test_hugging_face_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = tiny_image(20, 10)
    columns = {
        "image": [{"bytes": encoded(image), "path": None}] * 3,
        "question": ["a", "b", "c"],
        "answer": list("xyz"),
    }
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answer=datasets.Value("string")
    )
    data = datasets.Dataset.from_dict(columns, features=features)
    data.save_to_disk(tmp_path / "saved")
    (tmp_path / "files").mkdir()
    data.to_parquet(tmp_path / "files" / "train.parquet")
    for source in (data, tmp_path / "saved", tmp_path / "files", str(tmp_path / "files" / "train.parquet")):
        samples, _ = load_samples(source, limit=2)
        assert [(s.question, s.answer) for s in samples] == [("a", "x"), ("b", "y")]
        assert same(samples[0].images[0], image)


def test_datasets_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QuantExpertsError, match=r"pip install 'quant-experts\[eval\]'"):
        load_samples("owner/name")


def test_conversation_remainders_become_events(folder: Path) -> None:
    turns = [
        ("system", "Be short."),
        ("user", "<image>What?"),
        ("assistant", "Cat."),
        ("user", "And?"),
        ("assistant", "-"),
    ]
    record = {"image": str(folder / "a.png"), "messages": [{"role": r, "content": c} for r, c in turns]}
    samples, events = load_samples([record])
    assert (samples[0].question, samples[0].answer) == ("What?", "Cat.")
    assert sorted(event.what for event in events) == [
        "1 of 1 had a system message, which was left out",
        "1 of 1 had more than one question; the first was used",
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_scaled_down_and_upright(kind: str) -> None:
    image = Image.new("RGB", (400, 100), "red")
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    samples, events = load_samples([(encoded(image, kind, exif=exif), "x")], max_pixels=10_000)
    width, height = samples[0].images[0].size
    assert (width, height) == (50, 200)
    assert events[0].what == "1 of 1 had an image of more than 10000 pixels, which was scaled down"
    small, _ = load_samples([(encoded(image, kind, exif=exif), "x")])
    assert small[0].images[0].size == (100, 400)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_pixel_type_becomes_rgb(mode: str) -> None:
    image = tiny_image(9, 7).convert(mode)
    sample = load_samples([(image, "x")])[0][0]
    assert sample.images[0].mode == "RGB" and sample.images[0].size == (9, 7) and sample.images[0] is not image


def test_images_in_data_uris() -> None:
    """As chat messages hold them; percent-encoded ones too."""
    image = tiny_image(9, 7)
    uri = "data:image/png;base64," + b64encode(encoded(image)).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "Noise."}]
    for record in ({"messages": turns}, {"image": uri.replace("+", "%2B"), "question": "What?", "answer": "Noise."}):
        sample = load_samples([record])[0][0]
        assert (sample.question, sample.answer) == ("What?", "Noise.")
        assert sample.images[0].tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize(("suffix", "where"), [("jsonl", "s.jsonl line 1"), ("json", "s.json")])
@pytest.mark.parametrize("text", ['{"question": "q", "answer": ' + "1" * 5000 + "}", "[" * 200_000])
def test_json_beyond_the_limits_of_python(tmp_path: Path, text: str, suffix: str, where: str) -> None:
    path = tmp_path / f"s.{suffix}"
    path.write_text(text)
    with pytest.raises(QuantExpertsError, match=f"^{re.escape(where)} is JSON that cannot be read .* correct it"):
        load_samples(path)


def test_lines_end_where_json_says(tmp_path: Path) -> None:
    """Strings may hold what Python takes for ends of lines; files may come from Windows."""
    records = [{"question": "a\u2028b\u0085c\u2029d", "answer": "x"}, {"question": "q", "answer": "\x0c"}]
    text = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\r\n"
    (tmp_path / "s.jsonl").write_bytes(text.encode())
    assert [sample.question for sample in load_samples(tmp_path / "s.jsonl")[0]] == ["a\u2028b\u0085c\u2029d", "q"]


def test_palette_with_transparency_bytes() -> None:
    image = tiny_image(9, 7).convert("P")
    data = encoded(image, transparency=bytes([0] * 8 + [255] * 248))
    assert load_samples([(data, "x")])[0][0].images[0].mode == "RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_a_pixel_the_upper_eight_are_read(kind: str) -> None:
    """Upright, as others."""
    values = np.array([[0, 255, 256], [30_000, 40_000, 65_535]], dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn
    image = load_samples([(encoded(Image.fromarray(values), kind, exif=exif), "x")])[0][0].images[0]
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image)[..., 0], (values >> 8)[::-1, ::-1])


@pytest.mark.parametrize(("answer", "text"), [(42, "42"), (0, "0"), (2.5, "2.5"), ([7, 8], "7")])
def test_answers_may_be_numbers(answer: Any, text: str) -> None:
    sample = load_samples([{"question": "How many?", "answer": answer}])[0][0]
    assert sample.answer == text


BAD_IMAGES = {
    "truncated.jpg": (lambda: encoded(tiny_image(200, 200), "JPEG")[:-2000], "is damaged"),
    "truncated.png": (lambda: encoded(tiny_image(200, 200))[:-5000], "is damaged"),
    "text.png": (lambda: b"hello", "is not an image"),
    "empty.png": (lambda: b"", "is not an image"),
    "deep.tif": (lambda: encoded(Image.new("I", (4, 4)), "TIFF"), "8 bits"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_image_names_sample_and_file(tmp_path: Path, name: str) -> None:
    content, message = BAD_IMAGES[name]
    (tmp_path / name).write_bytes(content())
    (tmp_path / "s.jsonl").write_text(json.dumps({"image": name, "question": "q", "answer": "a"}))
    with pytest.raises(QuantExpertsError, match=message) as caught:
        load_samples(tmp_path / "s.jsonl")
    assert "s.jsonl line 1" in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(
    "record, message",
    [
        ({"image": "gone.png", "question": "q", "answer": "a"}, "line 2: image '.*gone.png' does not exist"),
        ({"image": "https://host/a.png", "question": "q", "answer": "a"}, "download it"),
        ({"image": 5, "question": "q", "answer": "a"}, "the image is int"),
        ({"image": ".", "question": "q", "answer": "a"}, "is a folder; correct the path"),
        ({"image": "x" * 5000, "question": "q", "answer": "a"}, r"x+\.\.\.' cannot be read .File name too long"),
        ({"image": "data:image/png,abc", "question": "q", "answer": "a"}, "cannot be decoded .it does not begin"),
        ({"image": "data:image/png;base64,a*b", "question": "q", "answer": "a"}, "'data:.*' cannot be decoded"),
        ({"image": "data:image/png;base64,aGVsbG8=", "question": "q", "answer": "a"}, "data URI is not an image"),
        ({"image": "a.png"}, "line 2 has none of the accepted forms"),
        ([1, 2, 3, 4], "none of the accepted forms"),
        (7, "none of the accepted forms"),
        ({"question": 3, "answer": "a"}, "must be text"),
        ({"question": "q", "answer": True}, "must be text, not str and bool"),
        ({"question": "q", "answer": float("nan")}, "must be text, not str and float"),
        ({"question": " ", "answer": ""}, "has no text"),
        ({"conversations": "hello"}, "none of the accepted forms"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "none of the accepted forms"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "must begin with a user's turn"),
        ({"conversations": [{"from": "human", "value": "<image>x"}]}, "1 image placeholders but 0 images"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "type 'video'"),
        (
            {"images": ["a.png", "a.png"], "messages": [{"role": "user", "content": "<image>x"}]},
            "2 images but 1 image placeholders",
        ),
    ],
)
def test_bad_record(folder: Path, record: Any, message: str) -> None:
    good = {"question": "q", "answer": "a"}
    (folder / "s.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(record))
    with pytest.raises(QuantExpertsError, match=message):
        load_samples(folder / "s.jsonl")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("s.jsonl", '{"question": "q", "answer": "a"}\n{oops\n', "s.jsonl line 2 is not JSON"),
        ("s.json", "[1,\n2", "s.json line 2 is not JSON"),
        ("s.json", "5", "holds int"),
        ("s.json", "[]", "has no samples"),
        ("s.jsonl", "\n", "has no samples"),
        ("s.csv", "a,b", "not a .json"),
        ("s.jsonl", b"\xff\xfe\x00", "UTF-8"),
        ("s.parquet", "no", "Cannot read"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # multiprocess and fsspec inside datasets
def test_bad_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(QuantExpertsError, match=message):
        load_samples(tmp_path / name)


def test_bad_sources(folder: Path) -> None:
    for source, message in [
        ([], "has no samples"),
        (5, "cannot be read from int"),
        ({"a": "b"}, "cannot be read from dict"),
        (folder / "gone.json", "does not exist"),
        ("gone.json", "does not exist"),
        (folder, "has no caption"),
    ]:
        with pytest.raises(QuantExpertsError, match=message):
            load_samples(source)
    (folder / "empty").mkdir()
    with pytest.raises(QuantExpertsError, match="has no samples"):
        load_samples(folder / "empty")
    with pytest.raises(QuantExpertsError, match="at least one"):
        load_samples(["x"], limit=0)


def test_images_folder(folder: Path) -> None:
    (folder / "lists").mkdir()
    (folder / "lists" / "s.json").write_text(json.dumps([RECORDS[0]]))
    with pytest.raises(QuantExpertsError, match="does not exist"):
        load_samples(folder / "lists" / "s.json")
    assert load_samples(folder / "lists" / "s.json", images=folder)[0][0].images
