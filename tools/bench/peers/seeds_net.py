"""The net of the document that this project comes from, as it stands there: torch's own layers and nothing of ours."""

from __future__ import annotations

from torch import Tensor, nn


class SeedsNet(nn.Module):
    """(N, 3, 224, 224) → (N, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        lrn = lambda: nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)  # noqa: E731
        sizes = [(3, 96, 11, 4, 2), (96, 256, 5, 1, 2), (256, 384, 3, 1, 1), (384, 384, 3, 1, 1), (384, 256, 3, 1, 1)]
        conv = [nn.Conv2d(*size) for size in sizes]
        relu, pool = (lambda: nn.ReLU(inplace=True)), (lambda: nn.MaxPool2d(kernel_size=3, stride=2))
        self.AlexNet_model = nn.Sequential(
            conv[0], relu(), lrn(), pool(),
            conv[1], relu(), lrn(), pool(),
            conv[2], relu(), conv[3], relu(), conv[4], relu(), pool(),
            nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), relu(),
            nn.Dropout(0.5), nn.Linear(4096, 4096), relu(),
            nn.Linear(4096, 1000),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.AlexNet_model(x)
