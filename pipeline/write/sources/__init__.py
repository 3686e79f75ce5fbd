"""Sources of labelled images, by name. CONTRIBUTING.md shows how to add one."""

from .base import Source
from .digits import Digits
from .folders import ImageFolder
from .hub import HubParquet
from .imagenet import ImageNet2010, ImageNet2012
from .tables import CSV, Kaggle, TinyImageNet
from .tars import WebDataset

SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "imagenet2012": ImageNet2012,
    "imagenet2010": ImageNet2010,
    "kaggle": Kaggle,
    "tiny-imagenet": TinyImageNet,
    "imagefolder": ImageFolder,
    "csv": CSV,
    "webdataset": WebDataset,
    "hf-parquet": HubParquet,
}
