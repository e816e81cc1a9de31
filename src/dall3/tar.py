"""Reader of the members of a tar, which may be untrusted or truncated."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

from dall3.errors import require

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
    """A regular file in a tar: its name, and the offset and size of its content in bytes."""

    name: str
    start: int
    size: int


def read_members(path: str | Path) -> tuple[list[Member], bool]:
    """List the files of a tar. Returns the complete ones in order, and whether the tar itself is complete.

    Only headers are read. Raises ValueError for a file that is compressed or not a tar, and for a member that is a
    link, a device or a sparse file. Raises OSError for a file that cannot be read.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        begin = file.read(6)
        for magic, name in COMPRESSED.items():
            require(not begin.startswith(magic), f"{path} is compressed with {name}; expected a plain tar")
        file.seek(0)
        found: list[tarfile.TarInfo] = []
        end, ends_well = 0, True
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if member.size < 0 or member.offset_data <= end:
                        raise tarfile.TarError("its members overlap")
                    end = member.offset_data + member.size
                    found.append(member)
                end = tar.offset
        except tarfile.ReadError as error:
            require(bool(found), f"{path}: not a tar, or cut off in its first header ({error})")
            ends_well = False
        except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError, MemoryError) as error:
            raise ValueError(f"{path}: a damaged tar ({type(error).__name__}: {error})") from None
        for member in found:
            kind = kind_of(member)
            require(kind in ("file", "folder"), f"{path}: {member.name!r} is a {kind}; expected plain files")
        # A complete tar ends with blocks of zeros. Without them, more files may have followed.
        file.seek(end)
        ends_well &= file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
        files = [Member(member.name, member.offset_data, member.size) for member in found if member.isreg()]
        return [one for one in files if one.start + one.size <= size], ends_well


def kind_of(member: tarfile.TarInfo) -> str:
    if member.issparse():
        return "sparse file"
    if member.issym() or member.islnk():
        return "link"
    return "file" if member.isreg() else "folder" if member.isdir() else "device"
