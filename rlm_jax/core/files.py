"""Files that are there whole or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A file to write beside `path`; it takes that name at the end, and is gone after an error.

    Its name ends as that of `path`, for readers that go by it.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
