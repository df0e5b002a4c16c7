"""Raw files as people download them: tables and folders, each perhaps still in its archive.

For the prepare.py files of the paper suite. Competitions pack their files twice: the download is
one archive, and it holds others (train.csv.zip, train.zip, train.json.7z). Whether someone has
unpacked the inner ones by hand makes no difference here.
"""

import lzma
import shutil
import sys
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import pandas as pd
from tqdm import tqdm

from tasks import TaskError

DAMAGED_TABLE = (
    pd.errors.ParserError,
    pd.errors.EmptyDataError,
    UnicodeDecodeError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
)


def table(raw: Path, name: str, columns: Iterable[str] = (), **options) -> pd.DataFrame:
    """The table raw/`name`, or the member of that name of raw/`name`.zip.

    Args:
        columns: what it must have; others are kept, too.
        options: for pandas.read_csv.

    Raises TaskError when it is missing, unreadable, empty, or lacks a column.
    """
    path = raw / name
    try:
        if path.is_file():
            found = pd.read_csv(path, **options)
        elif (path := raw / f"{name}.zip").is_file():
            with zipfile.ZipFile(path) as archive:  # pandas refuses archives with a second member
                member = next((m for m in archive.namelist() if _is(m, name)), None)
                if member is None:
                    raise TaskError(f"{path} holds no {name}")
                with archive.open(member) as file:
                    found = pd.read_csv(file, **options)
        else:
            raise TaskError(f"there is neither {name} nor {name}.zip in {raw}")
    except DAMAGED_TABLE as error:
        raise TaskError(f"{path} is damaged ({_line(error)})") from error
    missing = [column for column in columns if column not in found]
    if missing or found.empty:
        what = f"has no column {missing[0]!r}" if missing else "has no rows"
        raise TaskError(f"{path} {what}: it is not the file of this competition")
    return found


def folder(raw: Path, name: str, scratch: Path) -> Path:
    """The folder raw/`name`, or raw/`name`.zip or .7z unpacked below `scratch`.

    Archives with one folder of their own name in them are common, and so are people who unpack such
    an archive into a folder of that name: the innermost one is returned.
    """
    found = raw / name
    if not found.is_dir():
        archives = [raw / f"{name}{ending}" for ending in (".zip", ".7z")]
        archive = next((path for path in archives if path.is_file()), None)
        if archive is None:
            raise TaskError(f"there is neither {name}/ nor {name}.zip in {raw}")
        found = scratch / name
        unpack(archive, found)
    while (found / name).is_dir():
        found = found / name
    return found


def unpack(archive: Path, target: Path) -> None:
    """Unpack a .zip or .7z file into the folder `target`; archives inside it stay packed.

    Raises TaskError for a damaged archive and for one with members that would land outside.
    """
    target.mkdir(parents=True, exist_ok=True)
    if archive.suffix == ".7z":
        return _unpack_7z(archive, target)
    try:
        with zipfile.ZipFile(archive) as file:
            _check_members(archive, file.namelist())
            members = tqdm(file.infolist(), f"unpack {archive.name}", unit=" files", disable=None)
            for member in members:
                file.extract(member, target)  # a link is written as a plain file
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise TaskError(f"{archive} is damaged ({_line(error)})") from error


def copy(pairs: Iterable[tuple[Path, Path]], what: str) -> None:
    """Copy files one by one, (source, target) each, without their dates."""
    for source, target in tqdm(list(pairs), what, unit=" files", disable=None):
        if not source.is_file() or not source.stat().st_size:
            raise TaskError(f"{source} is missing or empty")
        shutil.copyfile(source, target)


def _is(member: str, name: str) -> bool:
    """Whether a zip's member is the file `name`, in any folder, and not a Mac's shadow of it."""
    path = PurePosixPath(member)
    return path.name == name and "__MACOSX" not in path.parts


def _check_members(archive: Path, members: list[str]) -> None:
    for member in members:
        path = PurePosixPath(member)
        if path.is_absolute() or ".." in path.parts:
            raise TaskError(f"{archive} has a member that would land outside: {member!r}")


def _unpack_7z(archive: Path, target: Path) -> None:
    try:
        import py7zr
    except ImportError:
        raise TaskError(f"{archive.name} needs one more package; run: pip install py7zr") from None
    try:
        with py7zr.SevenZipFile(archive) as file:
            _check_members(archive, file.getnames())
            file.extractall(target)
    except (py7zr.exceptions.ArchiveError, lzma.LZMAError, EOFError) as error:
        raise TaskError(f"{archive} is damaged ({_line(error)})") from error


def expect(found: int, expected: int, what: str) -> None:
    """Warn on stderr when there are not as many as the benchmark has: then its split is another."""
    if found != expected:
        note = f"warning: {found:,} {what} instead of {expected:,}: scores will not compare"
        print(note, file=sys.stderr)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
