"""Recognizes errors of a full disk."""

import errno
import os

__all__ = ["full_disk"]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def full_disk(error: BaseException | None) -> str:
    """The message of the operating system if `error`, or its cause, is that of a full disk or quota; else "".

    Libraries in C++ raise other types than OSError, with this message in their text.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return os.strerror(error.errno)
        for code in _FULL:
            if os.strerror(code) in str(error):
                return os.strerror(code)
        error = error.__cause__ or error.__context__
    return ""
