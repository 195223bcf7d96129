"""Locks that end with the process that holds them, also if it is killed.

They are `flock` locks of the operating system, so neither a process id that is used again nor a holder on another host
that has died keeps one (a network file system passes them to its server). A file system without such locks is used
without a lock; EBADF is the answer of NFS for a folder.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
_open_locks: set[int] = set()  # file descriptors


def _close_inherited_locks() -> None:
    """Close the locks of the parent in a forked child: a worker that outlives its parent must not keep them."""
    for handle in _open_locks:
        with contextlib.suppress(OSError):
            os.close(handle)
    _open_locks.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)


@contextlib.contextmanager
def hold(path: Path, *, create: bool = False) -> Iterator[int]:
    """Hold a file or folder for the block, and yield its descriptor. Raises `BlockingIOError` if somebody holds it.

    `create` makes the file if it does not exist, and opens it for writing. A link is not followed.
    """
    handle = os.open(path, os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_RDWR | os.O_CREAT if create else os.O_RDONLY), 0o644)
    _open_locks.add(handle)
    try:
        _lock(handle)
        yield handle
    finally:
        _open_locks.discard(handle)
        os.close(handle)


def is_held(path: Path) -> bool:
    """Return whether a process, this one included, holds a file or folder; True if the file system has no locks."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe has no end to wait for
    except FileNotFoundError:
        return False
    try:
        return not _lock(handle)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)


def _lock(handle: int) -> bool:
    """Lock an open file, and return whether the file system can. Raises `BlockingIOError` if somebody holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True
