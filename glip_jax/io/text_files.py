"""Text of files that other programs wrote: UTF-8, with or without a byte order mark."""

import codecs

__all__ = ["decoded", "encoding_problem", "without_mark"]

_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"
}  # fmt: skip


def encoding_problem(begin: bytes) -> str:
    """What is wrong with the encoding of a text that begins with these bytes; "" if it can be UTF-8."""
    found = next((name for mark, name in _WIDE.items() if begin.startswith(mark)), "")
    # Without a mark, every other byte of UTF-16 is zero where the text begins with ASCII letters, brackets or white space.
    if not found and len(begin) >= 4 and begin[:4].count(0) == 2 and begin[0:2].count(0) == 1:
        found = "UTF-16"
    return f"is text in {found}: save it as UTF-8" if found else ""


def without_mark(data: bytes) -> bytes:
    """The bytes without the byte order mark of UTF-8."""
    return data.removeprefix(codecs.BOM_UTF8)


def decoded(data: bytes) -> str:
    """The text of a file; ValueError, with the remedy, for another encoding than UTF-8."""
    if problem := encoding_problem(data[:4]):
        raise ValueError(problem)
    return data.decode("utf-8-sig")
