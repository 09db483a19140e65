"""An open directory of a checkpoint.

Every name is looked up from one descriptor of the directory, so that nothing changes its meaning between a
check and the use. Windows opens no directories: there a name is looked up by its path.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from surogate_formats.checkpoint.errors import (
    CheckpointIsAFileError,
    CheckpointNotFoundError,
    JsonTooLargeError,
    SymlinkedDirectoryError,
    shown,
)
from surogate_formats.checkpoint.files import open_regular, read_whole, unreadable


class Directory:
    """A directory held open; a context manager.

    Attributes:
        where: Its path as the error messages show it.
        names: Names of its entries.
    """

    def __init__(self, path: Path) -> None:
        """Open and list a directory.

        Raises:
            CheckpointNotFoundError: Nothing is there.
            CheckpointIsAFileError: It is no directory.
            UnreadableFileError: It may not be read.
        """
        self.where = shown(path)
        self._opened = _Opened(path, self.where) if hasattr(os, "O_DIRECTORY") else _Named(path, self.where)
        self.names = self._opened.names

    def close(self) -> None:
        """Close the directory; files opened from it stay open."""
        self._opened.close()

    def __enter__(self) -> Directory:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def show(self, name: str) -> str:
        """The path of an entry as the error messages show it."""
        return f"{self.where}/{shown(name)}"

    def open(self, name: str) -> int:
        """Open the regular file at a relative path of plain components, through real directories only.

        The last component may be a link: the Hub's cache is made of links into its `blobs`.

        Returns:
            A descriptor, which the caller closes.

        Raises:
            FileNotFoundError: Nothing is there; the caller knows what that means.
            SymlinkedDirectoryError: A directory on the way is a symbolic link.
            NotARegularFileError: It is something else than a file.
            UnreadableFileError: It may not be read.
        """
        return self._opened.open(name.split("/"), self.show(name))

    def read(self, name: str, cap: int) -> bytes:
        """Read a whole small file of at most `cap` bytes.

        Raises:
            FileNotFoundError: Nothing is there; the caller knows what that means.
            NotARegularFileError: It is something else than a file.
            UnreadableFileError: It may not be read.
            JsonTooLargeError: It is larger than `cap`; nothing was read.
            TruncatedFileError: It shrank while it was read.
        """
        where = self.show(name)

        def larger(size: int) -> JsonTooLargeError:
            return JsonTooLargeError(f"{where}: {size} bytes, more than the {cap} allowed; download it again")

        descriptor = self.open(name)
        try:
            return read_whole(descriptor, where, cap, larger)
        finally:
            os.close(descriptor)


class _Opened:
    """A directory held open."""

    def __init__(self, path: Path, where: str) -> None:
        with _opening(path, where):
            self._descriptor = os.open(path, _directory_flags())
        try:
            with os.scandir(self._descriptor) as entries:
                self.names = [entry.name for entry in entries]
        except OSError as error:
            self.close()
            raise unreadable(where, error) from None

    def close(self) -> None:
        os.close(self._descriptor)

    def open(self, components: Sequence[str], where: str) -> int:
        *parents, last = components
        current = os.dup(self._descriptor)
        try:
            for parent in parents:
                below = _open_real(current, parent, where)
                os.close(current)
                current = below
            return open_regular(last, where, directory=current)
        finally:
            os.close(current)


class _Named:
    """A directory that the system can't hold open."""

    def __init__(self, path: Path, where: str) -> None:
        self._path = path
        with _opening(path, where), os.scandir(path) as entries:
            self.names = [entry.name for entry in entries]

    def close(self) -> None:
        pass

    def open(self, components: Sequence[str], where: str) -> int:
        *parents, last = components
        current = self._path
        for parent in parents:
            current = current / parent
            if current.is_symlink() or _is_junction(current):
                raise _linked(where, parent)
        return open_regular(current / last, where)


@contextmanager
def _opening(path: Path, where: str) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, ValueError):  # ValueError: a null byte in the path
        raise CheckpointNotFoundError(f"{where}: no such directory; check the path") from None
    except NotADirectoryError:
        if not path.exists():  # a file stands where the path wants a directory
            raise CheckpointNotFoundError(f"{where}: no such directory; check the path") from None
        raise CheckpointIsAFileError(f"{where}: not a directory; give the directory that holds it") from None
    except OSError as error:
        raise unreadable(where, error) from None


def _open_real(directory: int, name: str, where: str) -> int:
    try:
        return os.open(name, _directory_flags() | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        raise
    except OSError as error:
        if stat.S_ISLNK(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            raise _linked(where, name) from None
        raise unreadable(where, error) from None


def _is_junction(path: Path) -> bool:
    """Whether it is Windows' other kind of link to a directory, where Python (3.12 or newer) can tell."""
    return bool(getattr(os.path, "isjunction", lambda _: False)(path))


def _directory_flags() -> int:
    return os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY


def _linked(where: str, name: str) -> SymlinkedDirectoryError:
    return SymlinkedDirectoryError(
        f"{where}: its directory {shown(name)} is a symbolic link; put the directory itself there"
    )
