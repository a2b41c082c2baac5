"""The one exception type that a user is meant to read.

Everything that a user can cause (a bad path, a bad image, a scheme that does not exist) raises `QuantExpertsError` with
one sentence that names the cause and the cure. The command line prints that sentence and exits with code 2; any other
exception is a bug of ours and keeps its traceback.
"""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


class QuantExpertsError(Exception):
    """A problem in the input or the environment, described in one sentence that says what to do."""


def printable(text: str) -> str:
    """The text for a terminal, without control characters: a model may produce them."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
