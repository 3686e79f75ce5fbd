"""Sources of labelled images. A new kind of input is a file here, with a class like this, and a line in SOURCES:

@dataclass
class Listed(Source):
    \"\"\"Images named by a file of lines: path, class number.\"\"\"

    file: Path
    name = "listed"
    classes = ["cat", "dog"]

    def __post_init__(self) -> None:
        unique, lines = UniqueKeys(), [line.split(",") for line in self.file.read_text().splitlines()]
        self.splits = {"train": Items(Item(unique(path), int(label), path) for path, label in lines)}

    def read(self, item: Item) -> bytes:
        return Path(item.where).read_bytes()
"""

from .base import Item, Items, Source, UniqueKeys
from .digits import Digits
from .folders import ImageFolder
from .imagenet import ImageNet2010, ImageNet2012

__all__ = ["SOURCES", "Digits", "ImageFolder", "Item", "Items", "Source", "UniqueKeys"]

SOURCES: dict[str, type[Source]] = {
    "digits": Digits,
    "imagenet2012": ImageNet2012,
    "imagenet2010": ImageNet2010,
    "imagefolder": ImageFolder,
}
