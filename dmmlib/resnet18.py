"""ResNet-18 for ImageNet-sized images.

In a module of its own: a trained model is bound to the source of the module that its factory is in, and this
one should not touch the stores of the others.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dmmlib.models import register


class _Basic(nn.Module):
    """Two 3 x 3 convolutions beside the identity, or beside a 1 x 1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
            nn.ReLU(),
            nn.Conv2d(c_out, c_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(c_out),
        )
        self.beside: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.beside = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x) + self.beside(x))


@register("resnet18")
def resnet18(shape: tuple[int, ...], n_classes: int, width: int = 64) -> nn.Module:
    """ResNet-18 (He et al., 2016), 11.2 million parameters at width 64; PyTorch's default initialisation."""
    w = width
    stages = [(w, w, 1), (w, 2 * w, 2), (2 * w, 4 * w, 2), (4 * w, 8 * w, 2)]
    return nn.Sequential(
        nn.Conv2d(shape[0], w, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(w),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        *(nn.Sequential(_Basic(a, b, stride), _Basic(b, b, 1)) for a, b, stride in stages),
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(8 * w, n_classes),
    )
