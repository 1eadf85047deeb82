"""Low-rank curvature against exact scores: subspace iteration, one-pass Nystroem and robust Frequent Directions.

All three see the same rows, and the one-pass methods have the same memory, 2 r vectors; each answers with r eigenpairs
and the same tail. Agreement is the rank correlation with the scores of the exact Fisher matrix, damping relative:0.1,
averaged over queries; `order` is the same between two orders of the rows, which a sum over rows does not feel.
`python benchmarks/onepass.py [--rows DIR]`, DIR as written by lorif_rows.py.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import save
from lorif_rows import load
from scipy.stats import spearmanr
from torch import Tensor

from influent.curvature import fit
from influent.damping import DEFAULT
from influent.gram import BlockRows
from influent.lowrank import Spectrum, Woodbury, sketch, spectrum_by_iteration, spectrum_of, start
from influent.rowstore import Index
from influent.rowwriter import write_rows

RANKS = [32, 64, 128, 256, 512]
BLOCKS = 4  # of each real set of rows: every so many-th
LARGEST = 256  # the rank up to which Frequent Directions, the slow one, and a second order are run


def iteration(rows: BlockRows, rank: int) -> Spectrum:
    return spectrum_by_iteration(rows, rank)


def nystrom(rows: BlockRows, rank: int) -> Spectrum:
    basis = start(rows.key, rows.width, min(2 * rank, rows.width))
    return spectrum_of(sketch(rows, basis), basis)


def frequent_directions(rows: BlockRows, rank: int) -> Spectrum:
    """Robust Frequent Directions (Luo et al., 2019): half of what each shrinking took is given back to all."""
    size = min(2 * rank, rows.width)
    held, given, squares = torch.zeros(0, rows.width, dtype=torch.float64), 0.0, 0.0
    for _, _, chunk in rows.chunks():
        squares += float(chunk.square().sum())
        for part in chunk.split(size):
            held, lost = _shrink(torch.cat([held, part]), size)
            given += lost / 2
    _, s, v = torch.linalg.svd(held, full_matrices=False)
    return Spectrum(v.T.contiguous(), (s.square() + given) / rows.num_rows, squares / rows.num_rows, rows.num_rows)


def _shrink(held: Tensor, size: int) -> tuple[Tensor, float]:
    _, s, v = torch.linalg.svd(held, full_matrices=False)
    if len(s) <= size:
        return s[:, None] * v, 0.0
    lost = float(s[size]) ** 2
    return (s[:size].square() - lost).clamp(min=0).sqrt()[:, None] * v[:size], lost


METHODS: dict[str, Callable[[BlockRows, int], Spectrum]] = {
    "iteration": iteration, "nystrom": nystrom, "frequent directions": frequent_directions
}  # fmt: skip


def solved(index: Index, method: Callable[[BlockRows, int], Spectrum], rank: int, queries: dict[str, Tensor]):
    """Preconditioned queries, the seconds that the eigenvectors took, and the share of the trace that they hold."""
    out, seconds, captured = {}, 0.0, 0.0
    for key, q in queries.items():
        rows = BlockRows(index, key)
        most = min(rows.num_rows, rows.width)
        begin = time.perf_counter()
        found = method(rows, min(rank, most))
        seconds += time.perf_counter() - begin
        kept = min(rank, len(found.values))
        values = found.values[:kept]
        damping = DEFAULT.amount(found.trace, most)
        eye = torch.eye(kept, dtype=torch.float64)
        out[key] = Woodbury(found.vectors[:, :kept], eye, values, damping, found.tail(kept))(q.double())
        captured += float(values.sum()) / found.trace / len(queries)
    return out, seconds, captured


def total(rows: dict[str, Tensor], queries: dict[str, Tensor]) -> Tensor:
    return torch.stack([queries[key].double() @ rows[key].double().T for key in queries]).sum(0)


def agreement(one: Tensor, other: Tensor) -> float:
    pairs = zip(one.numpy(), other.numpy(), strict=True)
    return float(sum(spearmanr(a, b).statistic for a, b in pairs)) / len(one)


def compare(rows: dict[str, Tensor], queries: dict[str, Tensor]) -> list[dict[str, object]]:
    num_rows = len(next(iter(rows.values())))
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    turned = {key: x[order] for key, x in rows.items()}
    found: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        indexes = []
        for name, x in (("given", rows), ("turned", turned)):
            write_rows(f"{folder}/{name}", lambda lo, hi, x=x: {k: v[lo:hi] for k, v in x.items()}, num_rows=num_rows)
            indexes.append(Index.open(f"{folder}/{name}"))
        exact = fit(indexes[0], damping=DEFAULT)
        expected = total(rows, {key: exact.solver(key)(q.double()) for key, q in queries.items()})
        for rank in (rank for rank in RANKS if rank < min(num_rows, max(x.shape[1] for x in rows.values()))):
            for name, method in METHODS.items():
                if name == "frequent directions" and rank > LARGEST:
                    continue
                answers, seconds, captured = solved(indexes[0], method, rank, queries)
                scores = total(rows, answers)
                again = total(rows, solved(indexes[1], method, rank, queries)[0]) if rank <= LARGEST else scores
                found.append({
                    "rank": rank, "method": name, "agreement": round(agreement(scores, expected), 5),
                    "order": round(agreement(scores, again), 5), "captured": round(captured, 4),
                    "seconds": round(seconds, 2),
                })  # fmt: skip
                print(found[-1], flush=True)
    return found


def power_law(num_rows: int, width: int, exponent: float, *, blocks: int = 2, num_queries: int = 32):
    """Rows and queries whose covariance has eigenvalues j^-exponent."""
    rng = torch.Generator().manual_seed(0)
    scale = torch.arange(1, width + 1) ** (-exponent / 2)
    drawn = {f"block {i}": torch.randn(num_rows + num_queries, width, generator=rng) * scale for i in range(blocks)}
    return {k: x[:num_rows] for k, x in drawn.items()}, {k: x[num_rows:] for k, x in drawn.items()}


def real(folder: Path, compressor: str, *, num_queries: int = 32):
    parts = {}
    for part in ("train", "queries"):
        pieces = list(load(folder, part, compressor))
        keys = list(pieces[0])[3 :: len(pieces[0]) // BLOCKS]
        parts[part] = {key: torch.cat([piece[key] for piece in pieces]) for key in keys}
    return parts["train"], {key: q[:num_queries] for key, q in parts["queries"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path)
    arguments = parser.parse_args()
    sets = {f"power law {x}": (lambda x=x: power_law(1000, 600, x)) for x in (0.7, 1.0, 1.5)}
    sets["power law 1.0, N < K"] = lambda: power_law(300, 600, 1.0)
    if arguments.rows is not None:
        sets |= {f"SmolLM2-135M, rademacher:/{f}": (lambda f=f: real(arguments.rows, f"f{f}")) for f in (32, 16)}
    results = {}
    for name, make in sets.items():
        rows, queries = make()
        shapes = {key: list(x.shape) for key, x in rows.items()}
        print(name, shapes)
        results[name] = {"shapes": shapes, "results": compare(rows, queries)}
    save("onepass", {"what": __doc__.strip().splitlines()[0], "data": results})


if __name__ == "__main__":
    main()
