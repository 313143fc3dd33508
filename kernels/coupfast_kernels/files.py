"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# What file systems answer that cannot sync a folder: CIFS, some of FUSE, and systems that cannot open one.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, or replace one: all of it or nothing, and on the disk when this returns. Its folder is made.

    Raises:
        OSError: if it cannot be written; then nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to write to, which becomes `path` at the end; what is raised meanwhile leaves nothing.

    Raises:
        OSError: if it cannot be made there, or cannot become `path`.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=".partial")
    partial = Path(name)
    try:
        os.close(descriptor)
        yield partial
        # mkstemp makes private files; this one gets what any new file would have had.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        put_in_place(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def put_in_place(made: Path, path: Path) -> None:
    """Give a file that is complete its name in the same file system, and see that both are on the disk."""
    with made.open("rb") as file:
        os.fsync(file.fileno())
    made.replace(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """See that the names in a folder are on the disk, where its file system can do that."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in _NO_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)
