"""Copies of whole shards on a disk of this machine, made in the order in which the shards are read.

A copy gets its final name, the shard's sha256, only after its bytes were verified: a file with such a name is complete.
The processes of a machine share the folder. A process that copies a shard holds the lock of the partial file; the lock
of a killed process is released, and the next one continues where the copy ended.
"""

import fcntl
import hashlib
import os
import re
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy import ndarray

from ..errors import LOG, StorageError
from ..files import OpenFile, fsync_path, locked
from ..manifest import Split
from ..storage import Copies, file_size
from .plan import Plan

AT_ONCE = 8  # shards that are copied at a time
CLAIMED = 2 * AT_ONCE  # shards that are being copied or queued, except those that are needed now
PIECE = 8 << 20  # bytes of a request
TRIES = 3  # attempts to copy a shard whose sha256 is wrong
LOCK_SECONDS = 60.0
PAUSE = 0.05  # seconds between two checks of another process's copy
OURS = re.compile(r"[0-9a-f]{64}\.(?:tar|(\d+)\.partial)")  # a partial file's name contains its final size


class ShardCache:
    """The copies of a split's shards.

    read: (shard, first byte, end) → bytes of the shard itself; raises StorageError or DataError. changed: called after
    a copy was made or deleted. closing: once it is set, nothing is copied or waited for.
    """

    def __init__(
        self,
        place: Copies,
        split: Split,
        read: Callable[[int, int, int], Any],
        changed: Callable[[], None],
        closing: threading.Event,
    ) -> None:
        self.place, self._shards, self._read, self._changed = place, split.shards, read, changed
        self._copies = [place.path(of.sha256) for of in split.shards]
        self._partial = [place.folder / f"{of.sha256}.{of.bytes}.partial" for of in split.shards]
        self._whole, self._failed = set[int](), set[int]()
        self._claims: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="express-copy")
        self._lock, self._closing = threading.RLock(), closing
        self._at: tuple[Plan, int, int]
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            os.close(self._locked())
        except OSError as err:
            raise StorageError(f"{place.folder}: cannot hold copies of shards: {err.strerror}") from err

    def _locked(self) -> int:
        return locked(self.place.folder / "lock", wait_seconds=LOCK_SECONDS)

    def is_whole(self, shard: int) -> bool:
        return os.path.isfile(self._copies[shard])

    def request(self, plan: Plan, epoch: int, step: int, needed: Collection[int] = ()) -> set[int]:
        """Starts to copy this rank's shards, in the order in which they are read from this step on.

        A copy that is needed later is deleted to make room for one that is needed earlier. Returns the shards among
        `needed` whose images must be read from copies.
        """
        wait = self.place.wait and (plan.window > 0 or not plan.train)
        with self._lock:
            self._at = plan, epoch, step
            mine = plan.shards()
            if not self._closing.is_set() and not self._whole.union(self._failed).issuperset(mine):
                try:
                    with open(self._locked(), "rb"):
                        self._claim(plan.steps_until(epoch, step), mine, needed)
                except OSError as err:
                    self._give_up(err)
            coming = {shard for shard in needed if wait and (shard in self._claims or _is_locked(self._partial[shard]))}
            return coming.union(filter(self.is_whole, needed))

    def _claim(self, away: ndarray, mine: range, needed: Collection[int]) -> None:
        """Starts copies. away: (shards,) steps until any rank reads each shard: copies that others need soon stay."""
        sizes, busy = self._files()
        used = sum(sizes.values())
        self._whole = {shard for shard, copy in enumerate(self._copies) if copy in sizes}
        free, idle = dict[Path, int](), sizes.keys() - busy  # shards with the same bytes share a file
        for shard, paths in enumerate(zip(self._copies, self._partial, strict=True)):
            for path in idle.intersection(paths):
                free[path] = min(away[shard], free.get(path, away[shard]))
        last = sorted(free, key=free.__getitem__)
        for shard in sorted(mine, key=away.__getitem__):
            partial = self._partial[shard]
            if partial in busy or shard in self._whole or shard in self._claims or shard in self._failed:
                continue
            if len(self._claims) >= CLAIMED and shard not in needed:
                return
            room = self._shards[shard].bytes - sizes.get(partial, 0)
            while used + room > self.place.bytes and last and free[last[-1]] > away[shard]:
                last[-1].unlink(missing_ok=True)
                used -= sizes[last.pop()]
            if used + room > self.place.bytes:
                return
            lock = OpenFile(locked(partial, wait_seconds=LOCK_SECONDS))
            self._claims[shard] = self._pool.submit(self._copy, shard, lock)
            used += room
            busy.add(partial)  # another shard may have the same bytes

    def _files(self) -> tuple[dict[Path, int], set[Path]]:
        """Returns {file: bytes} of our files, and the partial files that a process is filling, which count with their
        final size."""
        sizes, busy = {}, set()
        for path in self.place.folder.iterdir():
            if found := OURS.fullmatch(path.name):
                size = file_size(path)
                if found[1] and size is None:  # it was just renamed, and may be listed under both names
                    path = path.with_name(f"{path.name[:64]}.tar")
                    size = file_size(path)
                elif found[1] and _is_locked(path):
                    size = int(found[1])
                    busy.add(path)
                if size is not None:
                    sizes[path] = size
        return sizes, busy

    def _copy(self, shard: int, lock: OpenFile) -> None:
        """A pool thread's task. lock: of the partial file, until it is whole or given up."""
        partial = self._partial[shard]
        try:
            for _ in range(TRIES):
                if self._closing.is_set() or self._filled(shard, partial):
                    break
            else:
                partial.unlink()
                self._failed.add(shard)
                LOG.warning("shard %s: its sha256 is not the manifest's; it is not copied", self._shards[shard].name)
        except OSError as err:
            with suppress(OSError):
                partial.unlink()
            self._give_up(err)
        except BaseException:  # an error of the source, which reading an image will raise too
            self._failed.add(shard)
            raise
        finally:
            del lock
            with self._lock:
                del self._claims[shard]
                self._changed()
                self.request(*self._at)

    def _give_up(self, err: OSError) -> None:
        with self._lock:
            if len(self._failed) < len(self._shards):
                LOG.warning("%s: %s; no more shards are copied", self.place.folder, err.strerror)
            self._failed.update(range(len(self._shards)))

    def _filled(self, shard: int, partial: Path) -> bool:
        """Copies the missing bytes, verifies the copy and renames it. Returns False if its sha256 is wrong."""
        if self.is_whole(shard):  # another process named its copy while the folder was listed
            partial.unlink()
            return True
        of, digest = self._shards[shard], hashlib.sha256()
        with open(partial, "r+b") as file:
            while chunk := file.read(PIECE):
                digest.update(chunk)
            while (done := file.tell()) < of.bytes and not self._closing.is_set() and shard not in self._failed:
                data = self._read(shard, done, min(done + PIECE, of.bytes))
                digest.update(data)
                file.write(data)
            if done < of.bytes:  # the next run may continue
                return True
            file.flush()
            os.fsync(file.fileno())
            if digest.hexdigest() != of.sha256:
                file.truncate(0)
                return False
        os.replace(partial, self._copies[shard])
        fsync_path(self.place.folder)
        return True

    def wait(self, shard: int) -> bool:
        """Waits while a shard is being copied; returns whether its copy is complete. Raises what `read` raised."""
        while not self.is_whole(shard):
            if claim := self._claims.get(shard):
                claim.result()
            elif self._closing.is_set() or not _is_locked(self._partial[shard]):
                return self.is_whole(shard)
            time.sleep(PAUSE)
        return True

    def drop(self, shard: int) -> None:
        """Deletes a copy with wrong bytes: another program wrote it, or the disk failed."""
        with suppress(OSError):
            self._copies[shard].unlink()
            self._whole.discard(shard)
            LOG.warning("%s: a damaged copy of a shard; deleted", self._copies[shard])
        self._changed()  # it may be open though another process has deleted it

    def close(self) -> None:
        self._closing.set()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _is_locked(path: Path) -> bool:
    try:
        with open(path, "rb") as file:  # makes none: it may just be renamed or deleted
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the folder was deleted, or may not be read any more
        pass
    return False
