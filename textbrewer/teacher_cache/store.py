"""The file of a cache: rows of bytes by key in LMDB, safe against killed and concurrent writers."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from textbrewer.teacher_cache.errors import CacheError
from textbrewer.teacher_cache.files import check_folder, lengthen

FORMAT = 1
_HEADER = b"textbrewer teacher cache"
_SPACES = "spaces"
_MOST_SPACES = 512
# Of a disk's free space, a cache without a limit leaves this.
_LEFT_FREE = 1 << 30
# LMDB maps its lock file before it is known to fit: on a full disk, the process would be killed at once (SIGBUS).
_NEEDED = 1 << 20
# Pages of the file that were read count as this process's memory, so the file is mapped anew after this many bytes.
_MAPPED = 16 << 20
# Pages at the end that LMDB gave out in a transaction, took back, and never wrote.
_UNWRITTEN_PAGES = 16

R = TypeVar("R")


def import_lmdb() -> ModuleType:
    """Return the lmdb module.

    Raises:
        ImportError: if it is not installed; the message has the command.
    """
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(
            "a teacher cache on disk needs the package lmdb: pip install 'textbrewer[cache]' (or: pip install lmdb)"
        ) from error
    return lmdb


class Store:
    """Rows of bytes by key, in named spaces, in one folder.

    Every write is a transaction, flushed to the disk: a killed process leaves what it had committed. Several threads,
    processes and machines' ranks may read and write one folder (on a local disk: LMDB does not work on network drives).

    Args:
        path: the folder; made if it is not there.
        max_bytes: the file grows no further than this; ``None``: as far as the disk allows, but for 1 GB.

    Raises:
        CacheError: if the folder holds something else, or a damaged file.
        ImportError: if lmdb is not installed.
    """

    def __init__(self, path: Path, max_bytes: int | None) -> None:
        self.path, self.lmdb = path, import_lmdb()
        self._lock = threading.RLock()
        self._spaces: dict[str, Any] = {}
        self._read = 0
        self._env: Any = None
        check_folder(path)
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "lock.mdb").exists() and shutil.disk_usage(path).free < _NEEDED:
            raise self._damaged(self.lmdb.DiskError("No space left on device"))
        used = self._file_size()
        free = max(shutil.disk_usage(path).free - _LEFT_FREE, 0)
        self._limit = max(used + free if max_bytes is None else max_bytes, 1 << 20)
        self._open()
        self._check_header()

    # ---- opening ---------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._env = self.lmdb.open(
                str(self.path),
                # The pages that hold the tree's roots are not what a user's limit means.
                map_size=max(self._limit, self._file_size()) + (1 << 20),
                max_dbs=_MOST_SPACES,
                metasync=False,
                readahead=False,
                max_spare_txns=2,
            )
            # Readers that were killed would keep old pages from being used again.
            self._env.reader_check()
            info, page = self._env.info(), self._env.stat()["psize"]
        except self.lmdb.Error as error:
            raise self._damaged(error) from error
        if self._file_size() < (info["last_pgno"] + 1 - _UNWRITTEN_PAGES) * page:
            self.close()
            raise self._damaged("it is shorter than it says")
        lengthen(self.path / "data.mdb", (info["last_pgno"] + 1) * page)

    def _damaged(self, reason: object) -> CacheError:
        lmdb = self.lmdb
        if isinstance(reason, (lmdb.DiskError, lmdb.LockError, lmdb.ReadersFullError, lmdb.ReadonlyError)):
            return CacheError(
                f"teacher cache {str(self.path)!r} cannot be opened ({reason}); free the disk, allow this process to "
                "write there, or name another folder"
            )
        return CacheError(
            f"teacher cache {str(self.path)!r} cannot be read, its file is damaged or of another program ({reason}); "
            "delete the folder, and the teacher's outputs are stored anew, or name another one"
        )

    def _check_header(self) -> None:
        """Write the header of a new file; refuse a file of something else."""
        try:
            with self._env.begin() as txn:
                header, entries = txn.get(_HEADER), txn.stat()["entries"]
            if header is None and entries == 0:
                with self._env.begin(write=True) as txn:
                    txn.put(_HEADER, json.dumps({"format": FORMAT}).encode(), overwrite=False)
                return
        except self.lmdb.Error as error:
            self.close()
            raise self._damaged(error) from error
        if header is None:
            self.close()
            raise CacheError(f"{str(self.path)!r} is an LMDB file, but no teacher cache; name another folder")
        try:
            found = json.loads(header)["format"]
        except (ValueError, KeyError, TypeError) as error:
            self.close()
            raise self._damaged("its header is not readable") from error
        if found != FORMAT:
            self.close()
            raise CacheError(
                f"teacher cache {str(self.path)!r} has the format {found}, this version reads {FORMAT}; "
                "delete the folder, or name another one"
            )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            if self._env is not None:
                self._env.close()
            self._env, self._spaces, self._read = None, {}, 0

    # ---- transactions ----------------------------------------------------------------------------------------------

    def _transact(self, write: bool, work: Callable[[Any], R]) -> R:
        """Do some work in a transaction."""

        def transaction() -> R:
            with self._env.begin(write=write) as txn:
                return work(txn)

        with self._lock:
            try:
                return self._grown(transaction)
            except self.lmdb.Error as error:
                if write:
                    raise
                raise self._damaged(error) from error

    def _grown(self, work: Callable[[], R]) -> R:
        """Do some work, again where another process has let the file grow beyond this one's map."""
        try:
            return work()
        except self.lmdb.MapResizedError:
            self._env.set_mapsize(0)
            return work()

    def _space(self, name: str, make: bool = False) -> Any:
        """Return the handle of a space; ``None`` if it is not there and not to be made: reading writes nothing."""
        if name not in self._spaces:
            try:
                self._spaces[name] = self._grown(lambda: self._env.open_db(name.encode(), create=make))
            except self.lmdb.NotFoundError:
                return None
            except self.lmdb.Error as error:
                if make:
                    raise
                raise self._damaged(error) from error
        return self._spaces[name]

    def _change(self, space: str, work: Callable[[Any, Any], R]) -> R:
        """Do some work in a transaction that writes, given it and the handle of a space."""
        with self._lock:
            try:
                handle = self._space(space, make=True)
                return self._transact(True, lambda txn: work(txn, handle))
            except self.lmdb.MapFullError as error:
                raise OSError(f"the limit of {self._limit:,} bytes is reached") from error
            except self.lmdb.Error as error:
                # A write that failed half way leaves the open file unusable, not what is on the disk.
                self._reopen()
                full = shutil.disk_usage(self.path).free < _NEEDED
                raise OSError(f"the disk is full: {error}" if full else str(error)) from error

    def describe(self, name: str, make: Callable[[], Mapping[str, Any]] | None = None) -> dict[str, Any] | None:
        """Return what is noted of a space; where nothing is, note what ``make`` gives (first come, first served).

        Raises:
            OSError: if it cannot be written.
        """
        with self._lock:
            spaces = self._space(_SPACES)
            found = None if spaces is None else self._transact(False, lambda txn: txn.get(name.encode(), db=spaces))
            if found is None and make is not None:
                text = json.dumps(make()).encode()

                def note(txn: Any, spaces: Any) -> bytes:
                    txn.put(name.encode(), text, overwrite=False, db=spaces)
                    return bytes(txn.get(name.encode(), db=spaces))

                found = self._change(_SPACES, note)
        return None if found is None else json.loads(found)

    def note(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace what is noted of a space.

        Raises:
            OSError: if it cannot be written.
        """
        text = json.dumps(content).encode()
        self._change(_SPACES, lambda txn, spaces: txn.put(name.encode(), text, db=spaces))

    def _reopen(self) -> None:
        self.close()
        self._open()

    def spaces(self) -> dict[str, dict[str, Any]]:
        """Return what is noted of all spaces."""
        with self._lock:
            spaces = self._space(_SPACES)
            found = [] if spaces is None else self._transact(False, lambda txn: list(txn.cursor(db=spaces)))
        return {bytes(name).decode(): json.loads(content) for name, content in found}

    def get(self, space: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the value of each key, ``None`` where there is none."""
        with self._lock:
            handle = self._space(space)
            if handle is None:
                return [None] * len(keys)
            values = self._transact(False, lambda txn: [txn.get(key, db=handle) for key in keys])
            self._read += sum(len(value) for value in values if value is not None)
            if self._read > _MAPPED:
                self._reopen()
        return values

    def put(self, space: str, entries: Mapping[bytes, bytes]) -> None:
        """Write entries in one transaction.

        Raises:
            OSError: if the limit is reached or the disk is full; the file keeps what was in it.
        """

        def write(txn: Any, handle: Any) -> None:
            for key, value in entries.items():
                txn.put(key, value, db=handle)

        self._change(space, write)

    # ---- figures ---------------------------------------------------------------------------------------------------

    def entries(self, space: str) -> int:
        """Return the number of rows in a space."""
        with self._lock:
            handle = self._space(space)
            return 0 if handle is None else int(self._transact(False, lambda txn: txn.stat(handle)["entries"]))

    def used(self) -> int:
        """Return the bytes of the file."""
        with self._lock:
            return int((self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"])

    def room(self) -> int:
        """Return the bytes that can still be written."""
        return max(self._limit - self.used(), 0)

    def _file_size(self) -> int:
        try:
            return os.path.getsize(self.path / "data.mdb")
        except OSError:
            return 0
