"""What retraining does to two image classifiers: the ground truth for GraSS's two experiments on images.

`mlp`: 784-128-64-10, ReLU, dropout .1, on Fashion-MNIST's first 5,000 training and 500 test images, in place of MNIST;
50 epochs, 10 checkpoints. `resnet`: TRAK's ResNet9 at a quarter of its width, 142,704 parameters, on two of its
classes, Pullover and Coat, in place of CIFAR's cats and dogs, averaged to 14 x 14 pixels: 2,000 training and 500 test
images, 20 epochs, 3 checkpoints, which is what an hour of one core allows. A training takes about 5 to 10 seconds.
`resnet64`: the same with the whole width, 2.27 million parameters, which wants a GPU (1 seed of trainings). All of them
SGD .01, momentum .9, batches of 64, as in GraSS. The ResNet keeps the published batch norms; attribution sees them in
evaluation mode, as constants.
A model is trained on each of 50 random halves of the rows (for the linear datamodelling score) and on each of some more
(the checkpoints of TRAK, kept in half precision). What is measured of each test image after each training is its
margin, log p / (1 - p) of its own class, and its loss.

    python benchmarks/image_truth.py --work DIR --model mlp     # resnet, resnet64; interrupted, it resumes
    python benchmarks/image_truth.py --work DIR --model mlp --device cuda --part 0/2 &   # and 1/2, beside it

DIR/mlp gets `checkpoints/C.safetensors`, `trainings/HALF-SEED.npz` and, once all are there, `truth.npz`: `margins` and
`losses` [subsets, seeds, queries], `rows` [subsets, N] and `checkpoint_rows` of booleans, `seconds` [subsets, seeds]
and the `machines` that took them: CPU time of one core, or wall time on a GPU that others used as well.
"""

import argparse
import gzip
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environment
import numpy as np
import torch
from image_models import new_model
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from influent import fetch

NUM_QUERIES, NUM_SUBSETS = 500, 50
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
    each axis, how many rows there are, and how long a model is trained."""

    classes: tuple[int, ...]
    pooled: int
    rows: int
    epochs: int
    checkpoints: int
    seeds: int  # trainings a half, which differ in initial weights, order of batches and dropout


COATS = Setting((2, 4), 2, 2_000, 20, 3, 1)
SETTINGS = {"mlp": Setting((), 1, 5_000, 50, 10, 3), "resnet": COATS, "resnet64": COATS}


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
    for name, n in (("train", setting.rows), ("t10k", NUM_QUERIES)):
        labels = torch.from_numpy(held[f"{name}-labels"]).long()
        kept = torch.tensor(setting.classes or range(10))
        chosen = torch.isin(labels, kept).nonzero().flatten()[:n]
        pixels = torch.from_numpy(held[f"{name}-images"])[chosen].float().unsqueeze(1) / 255
        inputs = functional.avg_pool2d((pixels - MEAN) / SCALE, setting.pooled)
        parts.append((inputs, torch.searchsorted(kept, labels[chosen])))
    return Images(*parts)


def train(name: str, rows: tuple[Tensor, Tensor], *, epochs: int, seed: int) -> nn.Module:
    """A model in evaluation mode, on the rows' device; the seed draws its first weights, the order of the batches, and
    dropout."""
    torch.manual_seed(seed)
    inputs, labels = rows
    model = new_model(name).to(inputs.device, memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    for _ in range(epochs):
        for part in torch.randperm(len(labels)).to(labels.device).split(BATCH):
            sgd.zero_grad()
            functional.cross_entropy(model(inputs[part]), labels[part]).backward()
            sgd.step()
    return model.eval()


@torch.no_grad()
def measure(model: nn.Module, queries: tuple[Tensor, Tensor]) -> np.ndarray:
    """Margins and losses of the queries, [2, n]."""
    inputs, labels = queries
    losses = -model(inputs).double().log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.stack([-losses - torch.log(-torch.expm1(-losses)), losses]).cpu().numpy()


def halves(setting: Setting, count: int = NUM_SUBSETS) -> np.ndarray:
    """Random halves of the rows, [count, rows] of booleans; more of them begin with the same ones."""
    rng = np.random.default_rng(1)
    return np.stack([rng.permutation(setting.rows) < setting.rows // 2 for _ in range(count)])


def part_of(data: tuple[Tensor, Tensor], rows: np.ndarray) -> tuple[Tensor, Tensor]:
    kept = torch.from_numpy(rows).to(data[1].device)
    return data[0][kept], data[1][kept]


def weights(path: Path) -> dict[str, Tensor]:
    """A checkpoint's state dict, in single precision."""
    return {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}


def load(name: str, path: Path) -> nn.Module:
    """A saved checkpoint in evaluation mode."""
    model = new_model(name)
    model.load_state_dict(weights(path))
    return model.eval()


def exact_float32() -> None:
    """No TF32: float32 products and convolutions are what they say."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def machine(device: str) -> str:
    """What a time was taken on."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name()
    return f"one core of an {environment.cpu()}"


def put(path: Path, write: Any) -> None:
    """A file that is there whole or not at all, also when several processes write it."""
    beside = path.with_suffix(f".part{os.getpid()}")
    with beside.open("wb") as file:
        write(file)
    beside.rename(path)


def share(text: str) -> tuple[int, int]:
    """`i/n`: of n processes the i-th, from 0."""
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n with i below n, such as 0/4")
    return int(i), int(n)


@dataclass(frozen=True, slots=True)
class Trainer:
    """Trainings of one setting into its folder, each once."""

    name: str
    work: Path
    device: str
    data: Images  # on the device
    used: np.ndarray

    def path(self, j: int, seed: int) -> Path:
        if j >= NUM_SUBSETS:
            return self.work / "checkpoints" / f"{j - NUM_SUBSETS}.safetensors"
        return self.work / "trainings" / f"{j}-{seed}.npz"

    def __call__(self, j: int, seed: int) -> None:
        """The training on half j: its measured queries, and of a checkpoint its weights."""
        if (target := self.path(j, seed)).exists():
            return
        clock = time.perf_counter if torch.device(self.device).type == "cuda" else time.process_time
        start, epochs = clock(), SETTINGS[self.name].epochs
        model = train(self.name, part_of(self.data.train, self.used[j]), epochs=epochs, seed=1000 * seed + j)
        found = measure(model, self.data.queries)
        seconds = clock() - start
        if target.suffix == ".safetensors":
            state = {key: value.cpu().contiguous() for key, value in model.state_dict().items()}
            halved = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
            put(target, lambda file: file.write(save(halved)))
        else:
            put(
                target,
                lambda file: np.savez(
                    file, measured=found.astype(np.float32), seconds=seconds, machine=machine(self.device)
                ),
            )
        right = (found[0] > 0).mean()
        print(f"half {j} seed {seed}: loss {found[1].mean():.3f}, right {right:.3f}, {seconds:.1f} s", flush=True)


def assemble(trainer: Trainer, seeds: int) -> None:
    """truth.npz of all seeds whose trainings are there."""
    whole = 0
    while whole < seeds and all(trainer.path(j, whole).exists() for j in range(NUM_SUBSETS)):
        whole += 1
    if not whole:
        return
    shape = (NUM_SUBSETS, whole)
    measured, seconds = np.empty((2, *shape, NUM_QUERIES)), np.empty(shape)
    machines = np.empty(shape, dtype="U80")
    for seed, j in [(seed, j) for seed in range(whole) for j in range(NUM_SUBSETS)]:
        with np.load(trainer.path(j, seed)) as held:
            measured[:, j, seed], seconds[j, seed] = held["measured"], held["seconds"]
            machines[j, seed] = held["machine"]
    used = trainer.used
    put(
        trainer.work / "truth.npz",
        lambda file: np.savez(
            file, margins=measured[0], losses=measured[1], seconds=seconds, machines=machines,
            rows=used[:NUM_SUBSETS], checkpoint_rows=used[NUM_SUBSETS:],
        ),
    )  # fmt: skip
    print(f"{trainer.name}: truth of {whole} seeds", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=SETTINGS, required=True)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--part", type=share, default=(0, 1), help="i/n: every n-th training from the i-th on")
    parser.add_argument("--checkpoints", action="store_true", help="train these alone")
    given = parser.parse_args()
    torch.set_num_threads(1)
    exact_float32()
    setting, work = SETTINGS[given.model], given.work / given.model
    for folder in ("checkpoints", "trainings"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    data = images(setting)
    pairs = [tuple(tensor.to(given.device) for tensor in pair) for pair in (data.train, data.queries)]
    used = halves(setting, NUM_SUBSETS + setting.checkpoints)
    trainer = Trainer(given.model, work, given.device, Images(*pairs), used)
    seeds = given.seeds or setting.seeds
    todo = [(NUM_SUBSETS + c, 0) for c in range(setting.checkpoints)]
    if not given.checkpoints:  # seed by seed, so that what is there after an interruption covers all halves
        todo += [(j, seed) for seed in range(seeds) for j in range(NUM_SUBSETS)]
    i, n = given.part
    for j, seed in todo[i::n]:
        trainer(j, seed)
    assemble(trainer, seeds)


if __name__ == "__main__":
    main()
