"""Makes the manifest's content from the records of all shards: for new shards and for existing tars."""

from collections.abc import Iterable
from math import isqrt

import numpy as np

from .. import manifest
from ..errors import DataError
from ..files import Json
from ..geometry import principal_axes
from ..shards import write_array
from ..storage import Folder
from .journal import Listed, ShardRecord
from .resize import Totals

NAMED_BAD = 10  # in the error's one line


class BadImages(DataError):
    """More images than allowed cannot be used; `listed` names all of them."""

    def __init__(self, listed: Listed, of: int) -> None:
        self.listed = listed
        named = "; ".join(f"{bad['image']}: {bad['reason']}" for bad in listed[:NAMED_BAD])
        more = f"; and {len(listed) - NAMED_BAD} more" if len(listed) > NAMED_BAD else ""
        super().__init__(
            f"{len(listed)} of {of} images cannot be used ({named}{more});"
            " repair or remove them, or allow them with --max-bad-fraction"
        )


def timm_info(splits: Json) -> Json:
    """The content of manifest.INFO. splits: of the manifest."""
    return {
        "splits": {
            name: {
                "name": name,
                "num_samples": split["samples"],
                "filenames": [shard["name"] for shard in split["shards"]],
                "shard_lengths": [shard["samples"] for shard in split["shards"]],
            }
            for name, split in splits.items()
        }
    }


def write_statistics(totals: Totals, folder: Folder, name: str) -> Json:
    """Writes the mean image as `name`; returns all other statistics for the manifest, with the file's sha256."""
    (images, pixels), sums = totals.numbers[:2].tolist(), totals.numbers[2:]
    if not images:
        raise DataError("no training image could be decoded for the statistics; repair them or measure more")
    mean = sums[:3] / pixels
    pairs = np.array([[0, 1, 2], [1, 3, 4], [2, 4, 5]])  # of rr, rg, rb, gg, gb and bb
    covariance = sums[3:][pairs] / pixels - np.outer(mean, mean)
    values, vectors = principal_axes(covariance)
    side = isqrt(len(totals.image) // 3)
    mean_image = (totals.image / images).astype(np.float32).reshape(side, side, 3)
    return {
        "mean": mean.tolist(),
        "std": np.sqrt(np.diag(covariance)).tolist(),
        "covariance": covariance.tolist(),
        "eigenvalues": values.round(9).tolist(),  # the last digits depend on the machine's linear algebra
        "eigenvectors": vectors.T.round(9).tolist(),  # each a row, of unit length, in the order of the values
        "mean_image": {"file": name, "sha256": write_array(folder, name, mean_image)},
    }


class Collected:
    """The records of all shards by split, their statistics, and the images that were converted or cannot be used.

    The records are kept without their totals: a mean image a shard would be a gigabyte for ImageNet.
    Raises BadImages if more images than max_bad_fraction cannot be used.
    """

    def __init__(self, records: Iterable[tuple[str, ShardRecord]], *, size: int, max_bad_fraction: float) -> None:
        self.of_split: dict[str, list[ShardRecord]] = {}
        self.totals = Totals.zeros(size, np.int64)
        self.converted: Listed = []
        self.bad: Listed = []
        samples = 0
        for split, record in records:
            if record.totals:
                self.totals = Totals(*map(np.add, self.totals, record.totals))
            self.of_split.setdefault(split, []).append(record._replace(totals=None))
            self.converted += record.converted
            self.bad += record.bad
            samples += record.shard.samples
        for listed in (self.converted, self.bad):
            listed.sort(key=lambda entry: entry["image"])  # and not in the order of the shuffle
        if len(self.bad) > max_bad_fraction * (samples + len(self.bad)):
            raise BadImages(self.bad, samples + len(self.bad))

    def write_splits(self, folder: Folder, dataset: str) -> Json:
        """Writes each split's index; returns the splits for the manifest."""
        splits = {}
        for split, records in self.of_split.items():
            for number, record in enumerate(records):
                record.rows["shard"] = number
            if not any(len(record.rows) for record in records):
                raise DataError(f"{split}: no usable image is left in this split")
            rows = np.concatenate([record.rows for record in records])
            index = f"{dataset}-{split}.index.npy"
            splits[split] = manifest.split_record(
                [record.shard for record in records], index, write_array(folder, index, rows)
            )
        return splits
