"""When a curvature of whole gradients, applied before the compressor, beats the stored rows' own Fisher matrix.

For rows z = P g and h = H^-1 q, with H that of EK-FAC: `before` scores <P h, z>; `own` inverts the Fisher matrix of the
rows, damped, at P q; `guess` is the best linear guess of h^T g from z for gradients whose second moment is EK-FAC's F,
(P F P^T)^-1 P F h. All exact, in memory, on a ground truth of ground_truth.py; a weighted basis takes its dual. The
fit is the package's.

    python benchmarks/kron_sketch.py --work DIR --out FOLDER [--model llama]
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, environment
from lds import MAX_LENGTH, Rows, Truth, bind, collect, compress, influence, interval, products
from torch import Tensor

import influent
from influent import curvature
from influent.bind import Bound
from influent.damping import Damping
from influent.kron import KronFull
from influent.kronecker import Kronecker
from influent.rowstore import Index

TEXTS = ("gauss:16x16", "pca:16x16", "whiten:16x16", "gauss:64x64", "pca:64x64", "whiten:64x64")
DAMPINGS = (0.01, 0.1, 1.0)  # of the rows' own Fisher matrix
GUESSED = 1024  # width of a layer's rows up to which P F P^T is formed
NOISE = 1e-2  # of the mean eigenvalue of P F P^T, added to it


def lines(folder: Path, out: Path, damping: str) -> Iterator[tuple[str, str, str, Any]]:
    """(rows, how, its damping, scores [Q, N]), as they come."""
    gradients = collect(folder, [0])
    full = fitted(folder, out, damping)
    inverses = {key: full.inverse(key) for key in gradients.queries}
    solved = {key: inverses[key](q) for key, q in gradients.queries.items()}
    curved = {key: q - amount(inverses[key]) * solved[key] for key, q in gradients.queries.items()}  # F H^-1 q
    yield "none", "before", damping, products(gradients.train, solved)
    for text in TEXTS:
        maps = bind(gradients, text, 0)
        rows, queries = (compress(x, maps) for x in (gradients.train, gradients.queries))
        yield text, "before", damping, products(rows, compress(solved, {k: each.dual() for k, each in maps.items()}))
        for relative, scores in influence(rows, queries, DAMPINGS).items():
            yield text, "own", f"relative:{relative:g}", scores
        if max(row.shape[1] for row in rows.values()) <= GUESSED:
            yield text, "guess", damping, products(rows, guess(compress(curved, maps), maps, inverses))


def fitted(folder: Path, out: Path, damping: str) -> KronFull:
    model = str(folder / "model")
    influent.index(model, str(folder / "train.jsonl"), str(out), max_length=MAX_LENGTH, method="ekfac", device="cpu")
    influent.fit(str(out), curvature="ekfac", model=model, device="cpu")
    found = curvature.fit(Index.open(str(out)), curvature="ekfac", damping=Damping.parse(damping))
    assert isinstance(found, KronFull)
    return found


def amount(inverse: Any) -> float:
    return inverse.damping


def guess(queries: Rows, maps: Mapping[str, Bound], inverses: Mapping[str, Any]) -> Rows:
    """(P F P^T + noise)^-1 of each compressed query."""
    return {key: _solved(q, sketched(maps[key], inverses[key])) for key, q in queries.items()}


def sketched(bound: Bound, inverse: Kronecker) -> Tensor:
    """P F P^T [K, K] of one layer, for a map of both sides: what P makes of the pairs of eigenvectors, weighted."""
    assert inverse.inner is not None and inverse.outer is not None, "layers of linear maps alone"
    a = inverse.inner.T.float() @ _matrix(bound.inner, bound.block.in_width)  # [I, a]
    b = inverse.outer.T.float() @ _matrix(bound.outer, bound.block.out_width)  # [O, b]
    inside = torch.einsum("io,oc,od->icd", inverse.values.float(), b, b)
    return torch.einsum("ia,ib,icd->acbd", a, a, inside).reshape(a.shape[1] * b.shape[1], -1).double()


def _matrix(maps: Any, width: int) -> Tensor:
    matrix = torch.eye(width)
    for each in maps:
        matrix = each(matrix)
    return matrix


def _solved(q: Tensor, matrix: Tensor) -> Tensor:
    shift = NOISE * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)
    return torch.linalg.solve(matrix + shift, q.double().T).T.float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where ground_truth.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="for an index without rows and its fit")
    parser.add_argument("--model", default="llama")
    parser.add_argument("--damping", default="relative:0.01")
    given = parser.parse_args()
    torch.set_num_threads(1)
    truth, done = Truth.load(given.work / given.model), []
    for rows, how, damping, scores in lines(given.work / given.model, given.out, given.damping):
        found = truth.lds(scores)
        done.append({
            "model": given.model, "rows": rows, "how": how, "damping": damping, "lds": round(float(found.mean()), 4),
            "interval": [round(x, 4) for x in interval(found)],
        })  # fmt: skip
        print(done[-1], flush=True)
        text = json.dumps({"environment": environment(), "lines": done}, indent=1)
        (RESULTS / "kron_sketch.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
