"""Files from outside are regular ones, and are read within bounds."""

import io
import os
from pathlib import Path

from cli import UserError

MOST_BYTES = 1 << 30  # of a file that is read at once, such as one of captions


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file, or a link to one: a pipe or a device would block, or never end.

    Raises UserError for other things, and OSError where there is nothing.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no file but a folder, a pipe or a device; name a file")
    return open(path, "rb")


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return what a file holds; raises UserError for one of more than `most` bytes, and for what is no file."""
    with open_file(path) as file:
        if (size := os.fstat(file.fileno()).st_size) <= most:
            return file.read(size)
    raise UserError(f"{path} is too large: at most {most:,} bytes are read; check that it is the right file")
