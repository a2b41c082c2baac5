"""Lets processors load where torchvision is not installed.

transformers 5 gives the processors of most vision-language families a `video_processor`, and every video processor
needs torchvision, although their image processors also come in a version for Pillow. Without torchvision such a
processor cannot be made at all, images or not. Importing this module leaves the slot out in that case; with torchvision
nothing is changed, and without it nothing that worked works otherwise.
"""

from __future__ import annotations

from typing import Any

from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available

_Mixin: Any = ProcessorMixin  # transformers is only partly typed; this is more than its annotations allow
_all_attributes = _Mixin.__dict__["get_attributes"]


def _attributes_without_video(cls: type) -> list[str]:
    """What a processor class is made of, less its video processor."""
    names: list[str] = _all_attributes.__func__(cls)
    return [name for name in names if name != "video_processor"]


if not is_torchvision_available():
    _Mixin.get_attributes = classmethod(_attributes_without_video)
