"""Dataclasses that keep what was found of them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class CopiedByFields:
    """A base of dataclasses with cached properties. Copies, and what is pickled, hold fields alone: what is cached may
    hold views of tensors, which would be copied once more, or mean something in one process only."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
