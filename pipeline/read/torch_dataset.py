"""The loader as a torch dataset, for frameworks that need a DataLoader."""

from collections.abc import Iterator

from torch.utils.data import IterableDataset, get_worker_info

from ..errors import ConfigError
from .loader import Batch, Loader


class LoaderDataset(IterableDataset[Batch]):
    """A loader for frameworks that need a DataLoader: DataLoader(LoaderDataset(loader), batch_size=None).

    Raises ConfigError in a worker process: the loader has threads of its own, and workers would repeat its batches.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise ConfigError("num_workers must be 0 with LoaderDataset: the loader has threads of its own")
        if not self.loader.plan.train:  # an evaluation counts every sample, also after a loop that ended early
            self.loader.load_state_dict({"epoch": 0, "step": 0})
        return iter(self.loader)
