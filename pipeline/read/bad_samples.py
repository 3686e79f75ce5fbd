"""Samples that cannot be used. In training another sample takes the place of each, in evaluation it is left out.

The replacement depends only on the ids of the bad samples (order.replacement), not on which rank finds them, or when.
"""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ..errors import LOG, BadSample, DataError

SHOWN = 10  # ids in a message
COLLECTED = 16  # bad samples between garbage collections, which take a tenth of a second


@dataclass
class BadSamples:
    """The known bad samples of a loader's split, at most `limit`.

    found: id → reason, "" if it comes from a saved state. partition: the ids that may replace an id. together: the
    ranks count together, and all of them raise in the same `share`. unshared: how many may be unknown to other ranks.
    """

    limit: int
    partition: Callable[[int], range]
    together: bool = False
    found: dict[int, str] = field(default_factory=dict)
    unshared: int = 0

    def add(self, err: BadSample) -> None:
        """Counts and logs a bad sample. Raises `err` if none may be bad, DataError if there are too many."""
        if not self.limit:
            raise err
        self.found[err.sample] = str(err)
        self.unshared += 1
        if len(self.found) % COLLECTED == 0:
            gc.collect()  # tracebacks keep each failed batch in a reference cycle, 0.25 MB of small images
        LOG.warning("bad sample %d of %d: %s", len(self.found), self.limit, err)
        if not self.together and (error := self.error()):
            del self.found[err.sample]  # so that a retry finds it again, unless it was repaired
            raise error from err

    def load(self, ids: Iterable[int]) -> None:
        """Adds those of a loader's state. Raises DataError, and adds none, if they are too many."""
        found = dict.fromkeys(ids, "") | self.found
        if error := replace(self, found=found).error():
            raise error
        self.found |= found
        self.unshared = len(found)

    def share(self, from_all: Callable[[dict[int, str]], Iterable[dict[int, str]]]) -> None:
        """Adds those of all ranks. Raises DataError, at all ranks, if they are too many.

        from_all: gathers the ranks' values, as torch.distributed.all_gather_object does.
        """
        for of_rank in from_all(self.found):
            self.found |= of_rank
        self.unshared = 0
        if error := self.error():
            raise error

    def error(self) -> DataError | None:
        """The reason why no further batch can be made, or None."""
        ids = sorted(self.found)
        if len(ids) > self.limit:
            why = f"more than loader.max_bad_samples={self.limit}"
        elif lost := [part for part in map(self.partition, ids) if all(i in self.found for i in part)]:
            why = f"and samples {lost[0].start} to {lost[0].stop - 1}, a whole partition, are among them"
        else:
            return None
        shown = ", ".join(map(str, ids[:SHOWN])) + (", …" if len(ids) > SHOWN else "")
        reason = next((f"; {reason}" for reason in reversed(self.found.values()) if reason), "")
        return DataError(f"{len(ids)} bad samples, {why}: {shown}{reason}", together=self.together)
