"""Decodes images completely, upright, in RGB and within a pixel budget, or says which one is bad and why."""

from __future__ import annotations

import struct
from base64 import b64decode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from quant_experts.config import MAX_PIXELS
from quant_experts.errors import QuantExpertsError

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for damaged files, by format."""


@dataclass
class ImageReader:
    """Reads images relative to `folder` and counts those that it had to scale down."""

    folder: Path
    max_pixels: int = MAX_PIXELS
    scaled_down: int = 0

    def __post_init__(self) -> None:
        if self.max_pixels < 1:
            raise QuantExpertsError(f"max_pixels is {self.max_pixels}: give the largest number of pixels of an image.")

    def read(self, value: Any, where: str) -> Image.Image:
        """A decoded RGB image of at most `max_pixels` pixels.

        Args:
            value: a path (relative ones start at `folder`), a data URI, encoded bytes, a Pillow image, or the
                `{"bytes", "path"}` of a Hugging Face dataset.
            where: names the sample in errors.

        Raises:
            QuantExpertsError: missing, truncated, not an image, or of a pixel type that has no RGB form. (Of 16 bits a
                pixel the upper eight are read.)
        """
        if isinstance(value, dict) and (value.get("bytes") or value.get("path")):
            value = value.get("bytes") or value["path"]
        if isinstance(value, Image.Image):
            return self._decode(value, f"{where}: the image")
        if isinstance(value, bytes):
            return self._open(BytesIO(value), f"{where}: the image of {len(value)} bytes")
        if not isinstance(value, (str, Path)) or not str(value):
            raise QuantExpertsError(
                f"{where}: the image is {type(value).__name__}; give a path, encoded bytes or a Pillow image."
            )
        if str(value).startswith(("http://", "https://")):
            raise QuantExpertsError(f"{where}: image '{value}' is on the web; download it and give its path.")
        if str(value).startswith("data:"):
            return self._open(BytesIO(_decoded(str(value), where)), f"{where}: the image in the data URI")
        path = self.folder / Path(value).expanduser()
        try:
            found, what = path.is_file(), "is a folder" if path.is_dir() else "does not exist"
        except OSError as error:  # a name that is too long, a folder that is closed
            found, what = False, f"cannot be read ({error.strerror})"
        if not found:
            raise QuantExpertsError(
                f"{where}: image '{_shortened(str(path))}' {what}; correct the path or give its folder."
            )
        return self._open(path, f"{where}: image '{path}'")

    def _open(self, file: Path | BytesIO, name: str) -> Image.Image:
        try:
            with Image.open(file) as image:
                return self._decode(image, name)
        except _UNREADABLE as error:
            raise _unreadable(name, error) from error

    def _decode(self, image: Image.Image, name: str) -> Image.Image:
        pixels = image.width * image.height
        if pixels > self.max_pixels:
            self.scaled_down += 1
            scale = (self.max_pixels / pixels) ** 0.5
            size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
            image.draft("RGB", size)  # lets a JPEG decode straight to a smaller size; other formats ignore it
        try:
            image.load()
        except _UNREADABLE as error:
            raise _unreadable(name, error) from error
        if image.mode.startswith("I;16"):  # Pillow would cut off all above 255
            info, image = image.info, Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image.info |= info  # which way is up
        if image.mode.startswith(("I", "F")):
            raise QuantExpertsError(f"{name} has pixels of mode {image.mode}; convert it to 8 bits per channel.")
        if "transparency" in image.info:
            image = image.convert("RGBA")
        # A new object in any case: the caller's image and the open file stay out of the sample.
        upright = ImageOps.exif_transpose(image.convert("RGB"))
        if pixels > self.max_pixels:
            if (upright.width > upright.height) != (size[0] > size[1]):
                size = size[::-1]
            upright = upright.resize(size, Image.Resampling.BICUBIC)
        return upright


def _decoded(uri: str, where: str) -> bytes:
    """What `data:image/png;base64,...` holds. Raises `QuantExpertsError` if it is not encoded so."""
    head, comma, text = uri.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it does not begin with data:image/...;base64,")
        return b64decode(unquote(text), validate=True)
    except ValueError as error:  # binascii.Error is one
        raise QuantExpertsError(f"{where}: image '{_shortened(uri)}' cannot be decoded ({error}).") from error


def _shortened(text: str) -> str:
    """For an error of one line."""
    return text if len(text) <= 200 else f"{text[:100]}..."


def _unreadable(name: str, error: BaseException) -> QuantExpertsError:
    reason = (
        "is not an image that Pillow can read" if isinstance(error, UnidentifiedImageError) else f"is damaged ({error})"
    )
    return QuantExpertsError(f"{name} {reason}; replace the file or leave the sample out.")
