"""Files that are whole or not there, and files of tensors that are checked before they are loaded."""

from __future__ import annotations

import errno
import os
import pickle
import re
import socket
import struct
import time
import uuid
import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

import torch
from torch.serialization import MAP_LOCATION as MapLocation

_locks: ModuleType | None = None
# Windows has none; there a file that somebody has open can be neither deleted nor renamed.
with suppress(ImportError):
    _locks = import_module("fcntl")

_HOST = f"{zlib.crc32(socket.gethostname().encode()):08x}"
_TEMPORARY = re.compile(r"\.fedhaw-(?P<host>[0-9a-f]{8})-\d+-[0-9a-f]{32}\.part")

SECONDS_OF_OTHER_HOSTS = 24 * 3600
"""Age from which the temporary file of another machine is taken for abandoned: its locks may not be visible here."""

_IS_FOLDER = 0x10
"""The bit in the attributes of a record that marks a folder."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READING_ERRORS = (BadZipFile, zlib.error, struct.error, RuntimeError, EOFError, ValueError, LookupError, OSError)
"""What the reader of archives raises depends on the byte at which it fails."""


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file under a temporary name and rename it, so that it is complete whenever it exists.

    The temporary name is this writer's own. The file is locked while it is written, which tells
    :func:`remove_abandoned` that its writer lives.

    Args:
        path: The path of the file; its folder is created.
        write: Writes the content into an open file.

    Raises:
        OSError: If the file cannot be written; where the disk is full, this is said.
    """
    temporary: Path | None = None
    file: BinaryIO | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, file = _open_temporary(path.parent)
        write(file)
        file.flush()
        # Otherwise a crash of the machine could keep the new name and lose the content.
        os.fsync(file.fileno())
        if _locks is None:
            file.close()
        # Before the file is closed, which ends the lock.
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        full = _disk_error(error)
        if full is None:
            raise
        raise OSError(
            full.errno,
            f"The disk is full: {str(path)!r} was not written ({full.strerror}). A file that was there under this name"
            " is still whole. Free some space, or write to another disk",
        ) from error
    finally:
        if file is not None:
            # On a full disk closing fails again, in what is still to be written.
            with suppress(OSError):
                file.close()
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file as :func:`write_whole` does.

    Args:
        path: The path of the file; its folder is created.
        content: Its content.
    """

    def write(file: BinaryIO) -> None:
        file.write(content)

    write_whole(path, write)


def _open_temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """Create a file with a name of its own in a folder, and lock it as long as it is open."""
    while True:
        path = folder / f".fedhaw-{_HOST}-{os.getpid()}-{uuid.uuid4().hex}.part"
        file = path.open("xb")
        # Some file systems have no locks; files of killed runs stay there.
        with suppress(OSError):
            _lock(file)
        # Another process may have locked and removed it in between.
        if path.exists():
            return path, file
        file.close()


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of killed writers from a folder.

    A file whose writer lives is locked, and stays. So does one of another machine that is less than a day old.

    Args:
        folder: The folder.
    """
    # The file may be gone, locked, or another user's.
    with suppress(OSError):
        for path in folder.iterdir():
            name = _TEMPORARY.fullmatch(path.name)
            if name is not None:
                with suppress(OSError):
                    _remove_if_abandoned(path, is_of_this_host=name["host"] == _HOST)


def _remove_if_abandoned(path: Path, *, is_of_this_host: bool) -> None:
    """Remove a temporary file.

    Raises:
        OSError: If it is locked by its writer, or cannot be removed.
    """
    if not is_of_this_host and time.time() - path.stat().st_mtime < SECONDS_OF_OTHER_HOSTS:
        return
    # For writing, which network file systems require for such a lock.
    with path.open("r+b") as file:
        if _locks is not None:
            _lock(file)
            path.unlink()
    if _locks is None:
        path.unlink()


def _lock(file: BinaryIO) -> None:
    """Lock an open file until it is closed or its process ends.

    Raises:
        OSError: If another process has locked it, or the file system has no locks.
    """
    if _locks is not None:
        _locks.flock(file, _locks.LOCK_EX | _locks.LOCK_NB)


def _disk_error(error: BaseException) -> OSError | None:
    """Find the error of a full disk behind an error of ``torch.save``, which raises a later one of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_checked(file: BinaryIO, name: str, *, weights_only: bool = True, map_location: MapLocation = "cpu") -> object:
    """Load what ``torch.save`` has written, after its checksums have been compared.

    Args:
        file: The open file.
        name: Its name, for errors.
        weights_only: Whether everything else than tensors and plain values is refused, which could run code.
        map_location: As in ``torch.load``.

    Raises:
        ValueError: If it is no such file, is cut off or damaged, or could run code.
    """
    check_archive(file, name)
    file.seek(0)
    try:
        return torch.load(file, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{name!r} holds more than tensors and plain values ({_refused(error)}), which could run code, and is not"
            " opened for safety. If you trust its origin, allow what it holds with"
            " `torch.serialization.add_safe_globals`."
        ) from error
    except (RuntimeError, ValueError, EOFError) as error:
        if not weights_only:
            # The file's own code has failed.
            raise
        raise ValueError(f"{name!r} is no checkpoint: {_first_line(error)}") from error


def check_archive(file: BinaryIO, name: str) -> None:
    """Compare the checksum of every record of a file that ``torch.save`` has written.

    Torch itself does not compare them, so a flipped bit would change a weight.

    Args:
        file: The open file.
        name: Its name, for errors.

    Raises:
        ValueError: If it is no archive, is cut off, or a record does not match its checksum.
    """
    file.seek(0)
    beginning = file.read(4)
    try:
        with ZipFile(file) as archive:
            damaged = _damaged_record(archive)
    except _READING_ERRORS as error:
        if beginning[:2] != b"PK":
            raise ValueError(f"{name!r} is no checkpoint.") from error
        raise ValueError(
            f"{name!r} is cut off or damaged ({_first_line(error)}). Resume from another file, or copy it again."
        ) from error
    if damaged is not None:
        raise ValueError(
            f"{name!r} is damaged: its record {damaged!r} does not match its checksum. Resume from another file, or"
            " copy it again."
        )


def _damaged_record(archive: ZipFile) -> str | None:
    """Return the name of a record that does not match its checksum; None if all match."""
    records = archive.infolist()
    for record in records:
        # Torch would take the record for a folder, and read nothing.
        if record.external_attr & _IS_FOLDER:
            return record.filename
    # `torch.serialization.set_crc32_options(False)` leaves zeros instead of checksums.
    if not any(record.CRC for record in records):
        return None
    return archive.testzip()


def _refused(error: pickle.UnpicklingError) -> str:
    """Return the name of what torch has refused, from a page of advice."""
    match = re.search(r"(?:GLOBAL|global|class) (\w[\w.]*\.[\w.]*\w)", str(error))
    if match is None:
        return _first_line(error)
    return f"`{match[1]}`"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
