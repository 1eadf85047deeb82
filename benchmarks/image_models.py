"""The two image classifiers, which need torch alone: image_truth.py trains them, peers_rival.py attributes them."""

from torch import Tensor, nn


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    """A convolution without a bias, its batch norm and a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def resnet9(width: int = 16, classes: int = 2) -> nn.Sequential:
    """The ResNet9 of TRAK's experiments, whose width is 64."""
    two, four = 2 * width, 4 * width
    return nn.Sequential(
        convolution(1, width),
        convolution(width, two, kernel=5, stride=2, padding=2),
        Residual(convolution(two, two), convolution(two, two)),
        convolution(two, four),
        nn.MaxPool2d(2),
        Residual(convolution(four, four), convolution(four, four)),
        convolution(four, two, padding=0),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(two, classes, bias=False),
    )


def mlp() -> nn.Sequential:
    """109,386 parameters."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(64, 10),
    )  # fmt: skip


def new_model(name: str) -> nn.Module:
    """`resnet64` has the width that TRAK gives its ResNet9."""
    return {"mlp": mlp, "resnet": resnet9, "resnet64": lambda: resnet9(64)}[name]()
