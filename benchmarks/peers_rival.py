"""One run of a peer on the images' MLP: scores, seconds and memory. Started by peers.py with the peer's own Python,
which needs torch, numpy, safetensors and the peer; nothing of influent is imported.

    python peers_rival.py --peer dattri --data FILE --checkpoints A B --out FILE [--k 2048] [--damping 0.1]

FILE.npy gets the scores [queries, rows], FILE.json the time between the imports and the scores, and the peak memory of
the process. `--damping` is a multiple of the mean eigenvalue; without it the peer's own default is used.
"""

import argparse
import json
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_models import new_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """log p / (1 - p) of each label, [B]."""
    own = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), -torch.inf)
    return own - others.logsumexp(1)


def states(paths: list[Path]) -> list[dict[str, Tensor]]:
    return [
        {key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()}
        for path in paths
    ]


class Dattri:
    """TRAK as dattri's examples set it up: gradients of margins, random normal projections."""

    def __init__(self, given: argparse.Namespace, rows: TensorDataset, queries: TensorDataset) -> None:
        from dattri.algorithm.trak import TRAKAttributor
        from dattri.task import AttributionTask

        self.given, self.rows, self.queries = given, rows, queries
        self.make, self.task = TRAKAttributor, AttributionTask

    def __call__(self) -> np.ndarray:
        model = new_model("mlp").eval()

        def margin(params: Any, pair: Any) -> Tensor:
            image, label = pair
            return margins(torch.func.functional_call(model, params, image.unsqueeze(0)), label.unsqueeze(0)).squeeze(0)

        def probability(params: Any, pair: Any) -> Tensor:
            image, label = pair
            return torch.sigmoid(margin(params, (image, label)))

        found = states(self.given.checkpoints)
        attributor = self.make(
            task=self.task(loss_func=margin, model=model, checkpoints=found), correct_probability_func=probability,
            projector_kwargs={"proj_dim": self.given.k, "device": "cpu"}, device="cpu",
            regularization=0.0 if self.given.damping is None else self.given.damping * self.mean_eigenvalue(found),
        )  # fmt: skip
        batch = self.given.batch
        attributor.cache(DataLoader(self.rows, batch_size=batch, shuffle=False))
        with torch.no_grad():
            return attributor.attribute(DataLoader(self.queries, batch_size=batch, shuffle=False)).T.numpy()

    def mean_eigenvalue(self, found: list[dict[str, Tensor]]) -> float:
        """Of its kernel: the squared lengths of the rows' gradients, which projections keep, over their number of
        entries and the k of the kernel; from the first checkpoint and 256 rows, since it takes one number for all."""
        model, total, count = new_model("mlp").eval(), 0.0, 256
        model.load_state_dict(found[0])
        inputs, labels = self.rows.tensors
        for i in range(count):
            loss = margins(model(inputs[i : i + 1]), labels[i : i + 1]).sum()
            total += sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(model.parameters())))
        parameters = sum(p.numel() for p in model.parameters())
        return total / count * len(inputs) / parameters / self.given.k


class Kronfluence:
    """EK-FAC as kronfluence's examples set it up, through labels sampled from the model; scores are the mean over the
    checkpoints."""

    def __init__(self, given: argparse.Namespace, rows: TensorDataset, queries: TensorDataset) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        self.given, self.rows, self.queries = given, rows, queries
        self.analyzer, self.prepare, self.task = Analyzer, prepare_model, Task
        self.factors, self.scores = FactorArguments, ScoreArguments

    def __call__(self) -> np.ndarray:
        class Classify(self.task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                inputs, labels = batch
                logits = model(inputs)
                if sample:
                    with torch.no_grad():
                        labels = torch.multinomial(logits.softmax(1), 1).flatten()
                return functional.cross_entropy(logits, labels, reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return -margins(model(batch[0]), batch[1]).sum()

        damping = {} if self.given.damping is None else {"damping_factor": None}  # None: 0.1 of the mean eigenvalue
        total, batch = 0.0, self.given.batch
        for number, state in enumerate(states(self.given.checkpoints)):
            model = new_model("mlp")
            model.load_state_dict(state)
            task = Classify()
            with tempfile.TemporaryDirectory() as folder:
                analyzer = self.analyzer(
                    f"mlp{number}", self.prepare(model, task), task, cpu=True, disable_tqdm=True, output_dir=folder
                )
                analyzer.fit_all_factors(
                    "factors", self.rows, per_device_batch_size=batch, factor_args=self.factors(strategy="ekfac")
                )
                analyzer.compute_pairwise_scores(
                    "scores", "factors", self.queries, self.rows, per_device_query_batch_size=batch,
                    per_device_train_batch_size=batch, score_args=self.scores(**damping),
                )  # fmt: skip
                total = total + analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
        return total / len(self.given.checkpoints)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("dattri", "kronfluence"), required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--damping", type=float)
    parser.add_argument("--batch", type=int, default=500)
    given = parser.parse_args()
    if given.peer == "kronfluence" and given.damping not in (None, 0.1):
        parser.error("kronfluence has 0.1 of the mean eigenvalue, or its default")
    torch.set_num_threads(1)
    with np.load(given.data) as held:
        rows, queries = (
            TensorDataset(torch.from_numpy(held[f"{name} inputs"]), torch.from_numpy(held[f"{name} labels"]))
            for name in ("train", "query")
        )
    run = {"dattri": Dattri, "kronfluence": Kronfluence}[given.peer](given, rows, queries)
    wall, cpu = time.perf_counter(), time.process_time()
    scores = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    np.save(given.out.with_suffix(".npy"), scores)
    facts = {
        "wall_s": wall, "cpu_s": cpu, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "version": version(given.peer), "torch": torch.__version__,
    }  # fmt: skip
    given.out.with_suffix(".json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
