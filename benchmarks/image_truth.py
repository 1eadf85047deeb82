"""What retraining does to two image classifiers: the ground truth for GraSS's two experiments on images.

`mlp`: 784-128-64-10, ReLU, dropout .1, on Fashion-MNIST's first 5,000 training and 500 test images, in place of MNIST;
50 epochs. `resnet`: TRAK's ResNet9 at half its width, 569,056 parameters, on two of its classes, Pullover and Coat, in
place of CIFAR's cats and dogs, averaged to 14 x 14 pixels; 10 epochs. So 60 trainings take about 40 minutes of one core
(those of the MLP 6). Both SGD .01, momentum .9, batches of 64, as in GraSS. The ResNet keeps the published batch norms,
with which it trains in 10 epochs; attribution sees them in evaluation mode, as constants.
A model is trained on each of 50 random halves of the rows (for the linear datamodelling score) and of 10 more (the
checkpoints of TRAK). What is measured of each test image after each training is its margin, log p / (1 - p) of its own
class, and its loss.

    python benchmarks/image_truth.py --work DIR --model mlp     # resnet; interrupted, it resumes

DIR/mlp gets `checkpoints/C.safetensors` and `truth.npz`: `margins` and `losses` [subsets, seeds, queries], `rows`
[subsets, N] and `checkpoint_rows` [10, N] of booleans, `seconds` [subsets, seeds] of CPU time.
"""

import argparse
import gzip
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from influent import fetch

NUM_TRAIN, NUM_QUERIES, NUM_SUBSETS, NUM_CHECKPOINTS = 5_000, 500, 50, 10
BATCH, RATE, MOMENTUM = 64, 0.01, 0.9
MEAN, SCALE = 0.2860, 0.3530  # of Fashion-MNIST's training pixels
FASHION_MNIST = fetch.Package(
    "apt",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One ground truth: the classes that are kept (all if none are named), how many pixels are averaged to one along
    each axis, and how long a model is trained."""

    classes: tuple[int, ...]
    pooled: int
    epochs: int
    seeds: int  # trainings a half, which differ in initial weights, order of batches and dropout


SETTINGS = {"mlp": Setting((), 1, 50, 3), "resnet": Setting((2, 4), 2, 10, 1)}


@dataclass(frozen=True, slots=True)
class Images:
    """Images [n, 1, h, h], normalised, with their labels [n]: the rows, and the queries."""

    train: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]


def fashion_mnist() -> dict[str, np.ndarray]:
    """The data set's four arrays as Debian packages them, unpacked and without the headers of their IDX format."""

    def build(to: Path) -> None:
        with tempfile.TemporaryDirectory(dir=to.parent) as folder:
            subprocess.run(["dpkg-deb", "-x", fetch.package(FASHION_MNIST), folder], check=True)
            found = {}
            for path in Path(folder).glob("usr/share/datasets/fashion-mnist/*.gz"):
                payload = gzip.decompress(path.read_bytes())
                dims = np.frombuffer(payload, ">u4", count=payload[3], offset=4)
                found[path.name.partition("-idx")[0]] = np.frombuffer(
                    payload, np.uint8, offset=4 + 4 * len(dims)
                ).reshape(dims)
            with to.open("wb") as file:
                np.savez(file, **found)

    with np.load(fetch._publish(fetch.cache() / "fashion-mnist.npz", build)) as held:
        return dict(held)


def images(setting: Setting) -> Images:
    """The first rows and queries of the classes; labels count from 0."""
    held, parts = fashion_mnist(), []
    for name, n in (("train", NUM_TRAIN), ("t10k", NUM_QUERIES)):
        labels = torch.from_numpy(held[f"{name}-labels"]).long()
        kept = torch.tensor(setting.classes or range(10))
        chosen = torch.isin(labels, kept).nonzero().flatten()[:n]
        pixels = torch.from_numpy(held[f"{name}-images"])[chosen].float().unsqueeze(1) / 255
        inputs = functional.avg_pool2d((pixels - MEAN) / SCALE, setting.pooled)
        parts.append((inputs, torch.searchsorted(kept, labels[chosen])))
    return Images(*parts)


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


def resnet9(width: int = 32, classes: int = 2) -> nn.Sequential:
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
    return mlp() if name == "mlp" else resnet9()


def train(name: str, rows: tuple[Tensor, Tensor], *, epochs: int, seed: int) -> nn.Module:
    """A model in evaluation mode; the seed draws its first weights, the order of the batches, and dropout."""
    torch.manual_seed(seed)
    model = new_model(name).to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    inputs, labels = rows
    for _ in range(epochs):
        for part in torch.randperm(len(labels)).split(BATCH):
            sgd.zero_grad()
            functional.cross_entropy(model(inputs[part]), labels[part]).backward()
            sgd.step()
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, queries: tuple[Tensor, Tensor]) -> np.ndarray:
    """Margins and losses of the queries, [2, n]."""
    inputs, labels = queries
    losses = -model(inputs).double().log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.stack([-losses - torch.log(-torch.expm1(-losses)), losses]).numpy()


def halves(count: int) -> np.ndarray:
    """Random halves of the rows, [count, NUM_TRAIN] of booleans; more of them begin with the same ones."""
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(NUM_TRAIN) < NUM_TRAIN // 2 for _ in range(count)])


def part_of(data: tuple[Tensor, Tensor], rows: np.ndarray) -> tuple[Tensor, Tensor]:
    kept = torch.from_numpy(rows)
    return data[0][kept], data[1][kept]


def load(name: str, path: Path) -> nn.Module:
    """A saved checkpoint in evaluation mode."""
    model = new_model(name)
    model.load_state_dict(load_file(path))
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=SETTINGS, required=True)
    parser.add_argument("--seeds", type=int)
    given = parser.parse_args()
    setting, work = SETTINGS[given.model], given.work / given.model
    seeds = given.seeds or setting.seeds
    torch.set_num_threads(1)
    (work / "checkpoints").mkdir(parents=True, exist_ok=True)
    (work / "trainings").mkdir(exist_ok=True)
    data, used = images(setting), halves(NUM_SUBSETS + NUM_CHECKPOINTS)

    def trained(j: int, seed: int, target: Path) -> Path:
        """The training of half j, once: its measured queries, and of a checkpoint its weights."""
        if not target.exists():
            start = time.process_time()
            model = train(given.model, part_of(data.train, used[j]), epochs=setting.epochs, seed=1000 * seed + j)
            found = measure(model, data.queries)
            beside = target.with_suffix(".part")
            if target.suffix == ".safetensors":
                save_file({key: value.contiguous() for key, value in model.state_dict().items()}, beside)
            else:
                with beside.open("wb") as file:
                    np.savez(file, measured=found, seconds=time.process_time() - start)
            beside.rename(target)
            right, seconds = (found[0] > 0).mean(), time.process_time() - start
            print(f"half {j} seed {seed}: loss {found[1].mean():.3f}, right {right:.3f}, {seconds:.1f} s", flush=True)
        return target

    for c in range(NUM_CHECKPOINTS):
        trained(NUM_SUBSETS + c, 0, work / "checkpoints" / f"{c}.safetensors")
    measured = np.empty((2, NUM_SUBSETS, seeds, NUM_QUERIES))
    seconds = np.empty((NUM_SUBSETS, seeds))
    # Seed by seed, so that what is there after an interruption covers all halves.
    for seed, j in [(seed, j) for seed in range(seeds) for j in range(NUM_SUBSETS)]:
        with np.load(trained(j, seed, work / "trainings" / f"{j}-{seed}.npz")) as held:
            measured[:, j, seed], seconds[j, seed] = held["measured"], held["seconds"]
    np.savez(
        work / "truth.npz", margins=measured[0], losses=measured[1], seconds=seconds,
        rows=used[:NUM_SUBSETS], checkpoint_rows=used[NUM_SUBSETS:],
    )  # fmt: skip


if __name__ == "__main__":
    main()
