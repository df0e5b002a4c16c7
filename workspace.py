"""Workspaces, and the files that scripts which nobody has read leave in them.

The trusted reader of submissions; the directories that runs work in, and their removal whatever happens to the
trainer; copying into a box and back. Nothing here follows a link.
"""

import contextlib
import fcntl
import os
import stat
import time

MAX_DEPTH = 16  # of directories that are copied into a box and back


class SubmissionError(Exception):
    """A script's output file that must not be read. `reason`: one line for whoever wrote the script."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def safe_read(workspace, name: str, max_bytes: int) -> bytes:
    """The bytes of an output file that a script wrote. Call it after the run has ended. Never blocks.

    Raises SubmissionError for a missing file, a link of any kind (on the way to it, too), a FIFO, device or
    socket, a sparse file, and one above max_bytes. Parse the bytes as text or with allow_pickle=False: a pickle
    is a program.
    """
    *parents, last = os.path.normpath(name).split("/")
    if os.path.isabs(name) or ".." in (*parents, last):
        raise SubmissionError(f"{name} is not a path inside the workspace")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    fd = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for is_kind, part in [*((stat.S_ISDIR, p) for p in parents), (stat.S_ISREG, last)]:
            # look before opening: to open a device can have effects
            if not is_kind(os.stat(part, dir_fd=fd, follow_symlinks=False).st_mode):
                raise SubmissionError(f"{name} is not a regular file")
            inner = os.open(part, flags, dir_fd=fd)
            os.close(fd)
            fd = inner
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_nlink != 1:
            raise SubmissionError(f"{name} is a hard link")
        if info.st_size > max_bytes:
            raise SubmissionError(f"{name} is larger than {max_bytes} bytes")
        if info.st_size and os.lseek(fd, 0, os.SEEK_HOLE) < info.st_size:
            raise SubmissionError(f"{name} is a sparse file")
        os.lseek(fd, 0, os.SEEK_SET)
        data = bytearray()
        while len(data) <= max_bytes and (part := os.read(fd, min(1 << 20, max_bytes + 1 - len(data)))):
            data += part
        if len(data) > max_bytes:
            raise SubmissionError(f"{name} is larger than {max_bytes} bytes")
        return bytes(data)
    except FileNotFoundError:
        raise SubmissionError(f"{name} was not written") from None
    except OSError as error:
        raise SubmissionError(f"{name} cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


# ---- where runs work ------------------------------------------------------------------------------


def workspaces() -> str:
    """The directory for workspaces: one directory in it for each process that has some, locked while that lives."""
    import tempfile

    base = os.path.join(tempfile.gettempdir(), f"ml-agent-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(base, 0o711)
    info = os.lstat(base)  # others can write to /tmp: it might be a link, or theirs
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise OSError(f"{base} is not a directory of this user: remove it, or set TMPDIR")
    return base


_mine: tuple[int, str] | None = None  # (pid, directory): where this process keeps its workspaces


def new_workspace():
    """An empty directory (a pathlib.Path) for one run; `remove` it afterwards. If this process is killed, its
    monitors, its servers or the next Pool on this machine will."""
    global _mine
    import atexit  # these are slow to import, and monitors do not need them
    import pathlib
    import tempfile

    if _mine is None or _mine[0] != os.getpid():  # a fork of the owner needs its own
        _mine = os.getpid(), f"{workspaces()}/trainer-{os.urandom(8).hex()}"
        make_locked(_mine[1])
        os.chmod(_mine[1], 0o711)
        atexit.register(_forget, *_mine)
    return pathlib.Path(tempfile.mkdtemp(prefix="run-", dir=_mine[1]))


def _forget(pid: int, path: str) -> None:
    if pid == os.getpid():
        remove(path)


def make_locked(path: str) -> int:
    """Create a directory that `sweep` leaves alone for as long as the returned descriptor is open somewhere."""
    while True:
        os.makedirs(path, mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked
            fd = open_dir(path)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.path.isdir(path):
                return fd
            os.close(fd)


def sweep(base: str | None = None, patience: float = 0.0) -> None:
    """Remove the workspaces (in `base`) of processes that are gone, however they went.

    patience: seconds to wait for a process that is just dying and still holds its lock.
    """
    base = base or workspaces()
    deadline, busy = time.monotonic() + patience, True
    while busy:
        busy = False
        for name in os.listdir(base) if os.path.isdir(base) else ():
            with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
                path = os.path.join(base, name)
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(path)
                except BlockingIOError:
                    busy = time.monotonic() < deadline
                finally:
                    os.close(fd)
        time.sleep(0.02 if busy else 0)


# ---- copying and removing -------------------------------------------------------------------------


def copy_tree(source: int, target: int, skip: set, owner: int = -1, mirror=False, at="", depth=MAX_DEPTH) -> None:
    """Copy directories, and regular files with one name, between two directories given as descriptors.

    skip: relative paths that are left alone on both sides. owner: of the copies; -1: ours. mirror: what the
    target has and the source has not is removed. Links, FIFOs, sockets and devices are left out.
    """
    names = set(os.listdir(source))
    for name in set(os.listdir(target)) - names if mirror else ():
        if at + name not in skip:
            remove(name, target)
    for name in names:
        info = os.stat(name, dir_fd=source, follow_symlinks=False)
        if at + name in skip:
            continue
        if stat.S_ISDIR(info.st_mode) and depth:
            if not is_dir(name, target):
                remove(name, target)
                os.mkdir(name, dir_fd=target)
            os.chown(name, owner, owner, dir_fd=target, follow_symlinks=False)
            pair = open_dir(name, source), open_dir(name, target)
            try:
                copy_tree(*pair, skip, owner, mirror, f"{at}{name}/", depth - 1)
            finally:
                for fd in pair:
                    os.close(fd)
        else:
            remove(name, target)
            if stat.S_ISREG(info.st_mode) and info.st_nlink == 1:  # else links could multiply a file
                copy_file(name, source, target, owner)


def copy_file(name: str, source: int, target: int, owner: int) -> None:
    try:
        reader = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)
    except PermissionError:
        return
    writer = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=target)
    try:
        info, position = os.fstat(reader), 0
        os.truncate(writer, info.st_size)
        while position < info.st_size:  # holes stay holes: a sparse terabyte is not written out
            try:
                position = os.lseek(reader, position, os.SEEK_DATA)
            except OSError:  # a hole up to the end
                break
            end = os.lseek(reader, position, os.SEEK_HOLE)
            os.lseek(writer, position, os.SEEK_SET)
            while position < end:
                position += os.sendfile(writer, reader, position, min(end - position, 1 << 24))
        os.fchmod(writer, 0o644 | (info.st_mode & 0o111))
        os.utime(writer, ns=(info.st_atime_ns, info.st_mtime_ns))
        os.fchown(writer, owner, owner)
    finally:
        os.close(reader)
        os.close(writer)


def open_dir(name: str, parent: int | None = None) -> int:
    try:
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except PermissionError:  # a script may take its own rights away
        os.chmod(name, 0o700, dir_fd=parent)
        return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def is_dir(name: str, parent: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def remove(path, parent: int | None = None) -> None:
    """Delete a file or a directory, whatever a script made of it; links are not followed, nothing is no error.

    Directories without rights, 10^5 files, trees too deep for a path, a stack or a table of descriptors: only
    one level is open at a time. Nobody must be working in there any more.
    """
    try:
        os.unlink(path, dir_fd=parent)
        return
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # the second where unlink of a directory is EPERM
        fd = open_dir(path, parent)
    way: list[str] = []  # the names from `path` to the open level
    left = [empty_of_files(fd)]  # for each level on the way: its directories
    while True:
        if left[-1]:
            way.append(left[-1].pop())
            inner = open_dir(way[-1], fd)
            left.append(empty_of_files(inner))
        elif way:
            inner = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            left.pop()
            os.rmdir(way.pop(), dir_fd=inner)
        else:
            break
        os.close(fd)
        fd = inner
    os.close(fd)
    os.rmdir(path, dir_fd=parent)


def empty_of_files(fd: int) -> list[str]:
    """Remove what is not a directory; the names of what is."""
    os.chmod(fd, 0o700)
    folders = []
    for name in os.listdir(fd):
        if is_dir(name, fd):
            folders.append(name)
        else:
            os.unlink(name, dir_fd=fd)
    return folders
