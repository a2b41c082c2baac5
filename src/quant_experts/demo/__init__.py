"""The bundled demo: a small vision-language model trained on rendered questions, and the questions themselves.

A test bed that needs no network, not a claim about real models. Importing this package loads neither torch nor
transformers.
"""

from pathlib import Path

from quant_experts.demo.questions import KINDS, Question, questions

__all__ = ["KINDS", "Question", "model_path", "questions"]


def model_path() -> Path:
    """The folder of the bundled model: loads with transformers as a ``Qwen2VLForConditionalGeneration``."""
    return Path(__file__).parent / "weights"
