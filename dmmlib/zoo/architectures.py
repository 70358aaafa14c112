"""The architectures of the study, in PyTorch's default initialisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dmmlib.models import pooled, register


@register("linear", prepare=pooled)
def linear(shape: tuple[int, ...], n_classes: int) -> nn.Module:
    """Multinomial logistic regression."""
    return nn.Linear(shape[0], n_classes)


@register("mlp", prepare=pooled)
def mlp(shape: tuple[int, ...], n_classes: int, hidden: int = 128) -> nn.Module:
    """One hidden layer on pooled pixels (14 x 14 for Fashion-MNIST)."""
    return nn.Sequential(nn.Linear(shape[0], hidden), nn.ReLU(), nn.Linear(hidden, n_classes))


@register("convnet")
def convnet(shape: tuple[int, ...], n_classes: int, width: int = 16) -> nn.Module:
    """Two strided convolutions and a linear layer."""
    channels, height, image_width = shape
    side = [-(-s // 4) for s in (height, image_width)]
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * side[0] * side[1], n_classes),
    )


class Residual(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def _conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class _Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@register("resnet9")
def resnet9(shape: tuple[int, ...], n_classes: int, width: int = 64) -> nn.Module:
    """The CIFAR-10 ResNet-9 of the datamodels and EasyDUB studies (width 64), for 32 x 32 images."""
    w = width
    return nn.Sequential(
        _conv_bn(shape[0], w),
        _conv_bn(w, 2 * w, kernel=5, stride=2, padding=2),
        Residual(nn.Sequential(_conv_bn(2 * w, 2 * w), _conv_bn(2 * w, 2 * w))),
        _conv_bn(2 * w, 4 * w),
        nn.MaxPool2d(2),
        Residual(nn.Sequential(_conv_bn(4 * w, 4 * w), _conv_bn(4 * w, 4 * w))),
        _conv_bn(4 * w, 2 * w, padding=0),
        nn.AdaptiveMaxPool2d((1, 1)),
        nn.Flatten(),
        nn.Linear(2 * w, n_classes, bias=False),
        _Scale(0.2),
    )


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
