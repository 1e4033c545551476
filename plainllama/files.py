"""Files and directories that a kill, a full disk or a damaged byte cannot turn into wrong ones."""

import errno
import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from plainllama.settings import UserError

MANIFEST = "train_state/sha256.json"  # of a checkpoint: the checksums of its other files

LOCKED = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what a lock that another holds is refused by


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError names the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: no JSON object")
    return content


def to_json(content: dict[str, Any]) -> bytes:
    """Return a JSON object as it is written: indented, UTF-8."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_bytes(to_json(content))


def flush(directory: Path) -> None:
    """Bring a directory's files, and the directories that name them, to the disk itself."""
    paths = [directory, *directory.rglob("*")]
    for path in sorted(paths, reverse=True):  # what a directory holds before the directory
        if path.is_dir() and os.name == "nt":
            continue  # Windows cannot open directories
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename_into_place(scratch: Path, final: Path) -> None:
    """Give a finished directory its name: a kill leaves either no such directory or all of it."""
    flush(scratch)
    scratch.rename(final)
    if os.name != "nt":
        descriptor = os.open(final.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seal(scratch: Path, final: Path) -> None:
    """Add the checksums of its files to a directory, and rename it into place."""
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    sums = {path.relative_to(scratch).as_posix(): sha256(path) for path in files}
    write_json(scratch / MANIFEST, sums)
    rename_into_place(scratch, final)


def verify_sealed(directory: Path) -> None:
    """Compare a directory's files with the checksums that were written with them."""
    if not (directory / MANIFEST).is_file():
        return  # an older one, which has none
    for name, expected in read_json(directory / MANIFEST).items():
        path = directory / name
        inside = path.is_file() and directory.resolve() in path.resolve().parents
        if not inside or sha256(path) != expected:
            raise UserError(
                f"{path} is damaged: it is not what was written; delete {directory} to go on "
                "from the checkpoint before it"
            )


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_space(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk unless that of `folder` has `needed` bytes free."""
    if needed > shutil.disk_usage(folder).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def is_locked(path: Path) -> bool:
    """Tell whether a process holds the lock of a file, which is not changed."""
    with suppress(FileNotFoundError):
        try:
            with path.open("rb") as file:
                if os.name == "nt":
                    file.read(1)  # which Windows refuses
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # until it is closed here
        except OSError as error:
            return error.errno in LOCKED
    return False


def lock(path: Path, what: str) -> IO[bytes]:
    """Open and lock a file until it is closed or the process ends; UserError if another has it."""
    file = path.open("a+b")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.1)  # is_locked() may have held it for an instant
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in LOCKED:
            with file, suppress(OSError):  # Windows does not let others read what is locked
                file.seek(0)
                number = file.read(20).decode(errors="replace").strip()
                what += f" (process {number})" if number.isdigit() else ""
            raise UserError(f"another process is writing {what}; wait for it or stop it") from None
        # A file system without locks: then nobody is kept out.
    file.truncate(0)
    file.write(f"{os.getpid()}\n".encode())
    file.flush()
    return file
