"""Text that others wrote, for messages: file names, keys and metadata can hold whatever moves a terminal's cursor."""

from __future__ import annotations

SHOWN_CHARACTERS = 300


def printable(text: object, most: int = SHOWN_CHARACTERS) -> str:
    """The text on one line: control characters, line ends and the like as escapes, the middle of a long text left out.

    printable("a\\x1b[2J\\nb")  # 'a\\\\x1b[2J\\\\nb'
    """
    shown = str(text)
    if len(shown) > most:
        shown = f"{shown[: most // 2]} … {shown[-most // 2 :]}"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)
