"""Reads image-text samples from whatever a user has: JSON and JSONL files, image folders, Hugging Face datasets,
Python tuples.

Every source yields records (dicts), and one function turns a record into a `Sample`, so each form works in each source:

- `{"image": ..., "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": ...}]}`
  (ShareGPT4V),
- `{"messages": [{"role": "user", "content": ...}, ...], "images": [...]}`, content a string or a list of typed parts,
- `{"image": ..., "question": ..., "answer": ...}`,
- `{"image": ..., "caption": ...}` or `{"text": ...}`; a caption becomes the answer to `CAPTION_QUESTION`.

A sample is one question and one answer with the images in front of the question; where a conversation has more, the
rest is left out and an event says so.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from quant_experts.artifacts import Event, Sample
from quant_experts.calibration.images import ImageReader
from quant_experts.config import MAX_PIXELS
from quant_experts.errors import QuantExpertsError

CAPTION_QUESTION = "Describe the image."
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
IMAGE_KEYS = ("images", "image", "file_name")
QUESTION_KEYS = ("question", "query")
ANSWER_KEYS = ("answer", "answers", "label")
CAPTION_KEYS = ("caption", "captions", "text")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"

Source = str | Path | Iterable[Any]


def load_samples(
    source: Source, *, limit: int | None = None, images: str | Path | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[list[Sample], list[Event]]:
    """The first `limit` samples of `source` and what a reader of the report must know about them.

    Args:
        source: a JSON, JSONL or Parquet file; a folder of images with `x.txt` beside `x.jpg`, or with `metadata.jsonl`
            or `captions.json`; a dataset saved by `datasets`, or `owner/name` or `owner/name:split` on the Hugging
            Face hub (without a split, "train"); or an iterable of `Sample`, (image, text), (image, question, answer),
            text, or records, where an image is a Pillow image, a path, encoded bytes or None.
        limit: how many samples to read; None for all.
        images: folder at which relative image paths start; by default the folder of the file, or the working folder.
        max_pixels: larger images are scaled down to this many pixels, so that hundreds fit into memory.

    Raises:
        QuantExpertsError: naming the sample and the file, for a source, record or image that cannot be read, or no
            sample.
    """
    if limit is not None and limit < 1:
        raise QuantExpertsError(f"The number of samples is limited to {limit}: ask for at least one.")
    folder, records = _open_source(source)
    reader = ImageReader(Path(images) if images is not None else folder, max_pixels)
    notes: Counter[str] = Counter()
    samples = [_read_sample(record, reader, where, notes) for where, record in islice(records, limit)]
    name = f"'{source}'" if isinstance(source, (str, Path)) else "The given iterable"
    if not samples:
        raise QuantExpertsError(f"{name} has no samples: give at least one image with its text.")
    if reader.scaled_down:
        notes[f"had an image of more than {max_pixels} pixels, which was scaled down"] = reader.scaled_down
    return samples, [Event("samples", f"{count} of {len(samples)} {what}") for what, count in notes.items()]


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(where, value) of each line that is not blank; `where` names file and line. Raises `QuantExpertsError` on bad
    JSON.
    """
    for number, line in enumerate(_read_text(path).split("\n"), start=1):  # strings may hold other ends of lines
        if line.strip():
            where = f"{path.name} line {number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise QuantExpertsError(
                    f"{where} is not JSON ({error.msg}, column {error.colno}); correct it."
                ) from error
            except (ValueError, RecursionError) as error:
                raise _too_much(where, error) from error
            yield where, value


def number_as_text(answer: Any) -> Any:
    """An answer as it is, but for a finite number, which JSON may hold as such."""
    is_number = isinstance(answer, (int, float)) and not isinstance(answer, bool)
    return str(answer) if is_number and math.isfinite(answer) else answer


def _open_source(source: Source) -> tuple[Path, Iterator[tuple[str, Any]]]:
    """(folder of relative image paths, (where, record) pairs)."""
    if not isinstance(source, (str, Path)):
        if isinstance(source, (dict, bytes)) or not isinstance(source, Iterable):
            raise QuantExpertsError(
                f"Samples cannot be read from {type(source).__name__}: give a path or a list of samples."
            )
        return Path(), ((f"sample {number}", record) for number, record in enumerate(source, start=1))
    path = Path(source).expanduser()
    if path.is_dir():
        return path, _folder_records(path)
    if path.is_file():
        return path.parent, _file_records(path)
    if isinstance(source, Path) or path.is_absolute() or path.suffix in (".json", ".jsonl", ".parquet"):
        raise QuantExpertsError(f"'{source}' does not exist: give a file, a folder or a dataset with samples.")
    return Path(), _dataset_records(source)


def _file_records(path: Path) -> Iterator[tuple[str, Any]]:
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    if path.suffix == ".parquet":
        return _dataset_records(str(path))
    if path.suffix != ".json":
        raise QuantExpertsError(
            f"'{path}' is not a .json, .jsonl or .parquet file: convert the samples to one of these."
        )
    text = _read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise QuantExpertsError(
            f"{path.name} line {error.lineno} is not JSON ({error.msg}); correct it, or name the file .jsonl if"
            " every line is one sample."
        ) from error
    except (ValueError, RecursionError) as error:
        raise _too_much(path.name, error) from error
    if isinstance(content, dict) and all(isinstance(value, str) for value in content.values()):
        content = [{"file_name": name, "caption": caption} for name, caption in content.items()]
    if not isinstance(content, list):
        raise QuantExpertsError(f"{path.name} holds {type(content).__name__}: give a list of samples.")
    return ((f"{path.name} sample {number}", record) for number, record in enumerate(content, start=1))


def _folder_records(folder: Path) -> Iterator[tuple[str, Any]]:
    for name in ("metadata.jsonl", "captions.json"):
        if (folder / name).is_file():
            return _file_records(folder / name)
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _dataset_records(str(folder))
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files and any(folder.rglob("*.parquet")):
        return _dataset_records(str(folder))
    return _captioned_images(files)


def _captioned_images(files: list[Path]) -> Iterator[tuple[str, Any]]:
    for path in files:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise QuantExpertsError(
                f"Image '{path}' has no caption: write one to '{caption.name}' or to captions.json."
            )
        yield path.name, {"image": path.absolute(), "caption": _read_text(caption).strip()}


def _dataset_records(name: str) -> Iterator[tuple[str, Any]]:
    """Records of a dataset read with the optional `datasets` package; images stay encoded until `ImageReader` decodes
    them.
    """
    try:
        import datasets
    except ImportError as error:
        raise QuantExpertsError(
            f"Reading '{name}' needs another package: pip install 'quant-experts[eval]'."
        ) from error
    path, split = Path(name), "train"
    try:
        if path.is_file():
            data = datasets.load_dataset("parquet", data_files=name, split="train")
        elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
            data = datasets.load_from_disk(name)
        else:
            if not path.is_dir():
                name, _, asked = name.partition(":")
                split = asked or split
            data = datasets.load_dataset(name, split=split, streaming=True)
        if isinstance(data, dict):
            data = data[split] if split in data else next(iter(data.values()))
        for column, feature in (data.features or {}).items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(column, datasets.Image(decode=False))
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise QuantExpertsError(
            f"Cannot read '{name}' as a dataset ({reason}): give a file, a folder, or owner/name:split of a dataset"
            " that can be reached from here."
        ) from error
    return ((f"'{name}' {split} sample {number}", record) for number, record in enumerate(data, start=1))


def _read_sample(record: Any, reader: ImageReader, where: str, notes: Counter[str]) -> Sample:
    """A record or tuple in any accepted form as a `Sample` with decoded images."""
    question: Any
    answer: Any
    if isinstance(record, Sample):
        images, question, answer = list(record.images), record.question, record.answer
    elif isinstance(record, str):
        images, question, answer = [], record, ""
    elif isinstance(record, (tuple, list)) and len(record) in (2, 3):
        images = _as_list(record[0])
        question, answer = record[1:] if len(record) == 3 else _caption(record[1], images)
    elif isinstance(record, dict):
        images, question, answer = _read_record(record, where, notes)
    else:
        raise _wrong_form(where)
    answer = number_as_text(answer)
    if not isinstance(question, str) or not isinstance(answer, str):
        kinds = f"{type(question).__name__} and {type(answer).__name__}"
        raise QuantExpertsError(f"{where}: question and answer must be text, not {kinds}.")
    question, answer = question.replace(PLACEHOLDER, "").strip(), answer.strip()
    if not question and not answer:
        raise QuantExpertsError(f"{where} has no text: give it a question and an answer, or leave it out.")
    if not answer:
        notes["had no answer"] += 1
    return Sample(question, answer, tuple(reader.read(image, where) for image in images), where)


def _read_record(record: dict[str, Any], where: str, notes: Counter[str]) -> tuple[list[Any], Any, Any]:
    """(images, question, answer) of a dict, text unchecked."""
    images = _as_list(_first(record, IMAGE_KEYS))
    turns = record.get("conversations") or record.get("messages")
    if turns is not None:
        return _read_turns(turns, images, where, notes)
    question, answer = _first(record, QUESTION_KEYS), _first(record, ANSWER_KEYS)
    if question is None:
        caption = _as_list(_first(record, CAPTION_KEYS))
        if not caption:
            raise _wrong_form(where)
        return images, *_caption(caption[0], images)
    answers = _as_list(answer)
    return images, question, answers[0] if answers else ""


def _read_turns(turns: Any, images: list[Any], where: str, notes: Counter[str]) -> tuple[list[Any], str, str]:
    """The first question of a conversation with its answer, and the images that belong to it."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise _wrong_form(where)
    spoken: list[tuple[str, str]] = []
    embedded: list[Any] = []
    for turn in turns:
        role = ROLES.get(str(turn.get("role", turn.get("from"))))
        content = turn.get("content", turn.get("value"))
        if role is None or not isinstance(content, (str, list)):
            raise _wrong_form(where)
        if role == "system":
            notes["had a system message, which was left out"] += 1
            continue
        text, found = _read_content(content, where)
        if len(spoken) < 2:
            embedded += found
        spoken.append((role, text))
    if not spoken or spoken[0][0] != "user" or (len(spoken) > 1 and spoken[1][0] != "assistant"):
        raise QuantExpertsError(f"{where}: a conversation must begin with a user's turn, then the assistant's.")
    if len(spoken) > 2:
        notes["had more than one question; the first was used"] += 1
    question = spoken[0][1]
    answer = spoken[1][1] if len(spoken) > 1 else ""
    return _first_turn_images(question, images, embedded, len(spoken) > 2, where), question, answer


def _first_turn_images(
    question: str, images: list[Any], embedded: list[Any], many_turns: bool, where: str
) -> list[Any]:
    """Images named inside the turn itself, or as many of the record's as the turn has placeholders (none: all of
    them).
    """
    named = [image for image in embedded if image is not None]
    if named:
        return named
    wanted = question.count(PLACEHOLDER) + len(embedded)
    if wanted > len(images):
        raise QuantExpertsError(
            f"{where} has {wanted} image placeholders but {len(images)} images; make the numbers agree."
        )
    if wanted < len(images) and wanted and not many_turns:
        raise QuantExpertsError(
            f"{where} has {len(images)} images but {wanted} image placeholders; make the numbers agree."
        )
    return images[: wanted or None]


def _read_content(content: str | list[Any], where: str) -> tuple[str, list[Any]]:
    """(text, images) of a turn; an image part without its own image gives None, a placeholder."""
    if isinstance(content, str):
        return content, []
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            image = part.get("image") or part.get("path") or part.get("url") or part.get("image_url")
            images.append(image.get("url") if isinstance(image, dict) and "url" in image else image)
        else:
            raise QuantExpertsError(f"{where}: a message part has type {kind!r}; only text and image are supported.")
    return "\n".join(texts), images


def _caption(text: Any, images: list[Any]) -> tuple[Any, Any]:
    """(question, answer) for a text that stands alone: the answer if there is something to describe."""
    return (CAPTION_QUESTION, text) if images else (text, "")


def _first(record: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((record[key] for key in keys if record.get(key) is not None), None)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QuantExpertsError(f"Cannot read '{path}' ({error}): give a readable UTF-8 text file.") from error


def _too_much(where: str, error: Exception) -> QuantExpertsError:
    """Of JSON that Python's limits do not let it read: a number of thousands of digits, or too many brackets."""
    reason = str(error).partition(";")[0]
    return QuantExpertsError(f"{where} is JSON that cannot be read ({reason}); correct it.")


def _wrong_form(where: str) -> QuantExpertsError:
    return QuantExpertsError(
        f"{where} has none of the accepted forms: give image, question and answer; image and caption;"
        " conversations; or messages."
    )
