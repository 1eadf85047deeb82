"""What all curvatures share: the solver of one block, and artifacts under `curvature/` with a payload per block.

Not here: any particular curvature (curvature.py, truncated.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from .artifact import Artifact, ArtifactWriter, digest
from .errors import MismatchError, NumericsError
from .gram import CPU, MEMORY, BlockRows, Inverse, RowSource, check_bytes
from .progress import Progress
from .storage import Store

Health = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Solver:
    """One block's curvature, inverted: q [Q, K] -> (F + lambda I)^-1 q, computed in float64 on the device of `rows`, in
    the dtype of q and on the CPU.

    Raises NumericsError, naming the block, when q, the rows or the answer is not finite.
    """

    rows: BlockRows
    inverse: Inverse

    def __call__(self, q: Float[Tensor, "Q K"]) -> Float[Tensor, "Q K"]:
        block, width = self.rows.key, self.rows.width
        if q.shape[1] != width:
            raise MismatchError(f"block {block!r}: expected queries of width {width}, got {q.shape[1]}")
        if not bool(q.isfinite().all()):
            raise NumericsError(f"block {block!r}: a query's gradient is not finite: look at the query's loss")
        exact = self.inverse(q.detach().to(self.rows.device).double()).cpu()
        if not bool(exact.isfinite().all()):  # in float64, in which finite rows and queries do not overflow
            raise NumericsError(f"block {block!r}: the index's rows are not finite: run `influent verify` on the index")
        answer = exact.to(q.dtype)
        if not bool(answer.isfinite().all()):
            raise NumericsError(f"block {block!r}: the preconditioned query is not finite: raise the damping")
        return answer

    def self_influence(self) -> Float[Tensor, " N"]:
        """g_i (F + lambda I)^-1 g_i of every row of the block, float64."""
        return self.inverse.self_influence(self.rows).cpu()


@runtime_checkable
class Curvature(Protocol):
    """A fitted curvature: cheap to ask many times. `name` is how a command picks it; `digest` is its identity."""

    name: str
    digest: str

    def solver(self, key: str) -> Solver: ...
    def health(self) -> Health: ...


@runtime_checkable
class FullCurvature(Protocol):
    """A fitted curvature of uncompressed gradients: it acts before the compressor, on all blocks of some queries."""

    name: str
    digest: str

    def precondition(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]: ...
    def health(self) -> Health: ...
    def facts(self) -> dict[str, Any]:
        """What a result says of how it was solved, beside the health."""
        ...


AnyCurvature = Curvature | FullCurvature
Compute = Callable[[str], tuple[Mapping[str, Tensor], dict[str, Any]]]


def write_blocks(
    index: RowSource,
    kind: str,
    spec: dict[str, Any],
    compute: Compute,
    *,
    first: int = 0,
    progress: Progress | None = None,
) -> Artifact:
    """One artifact under `curvature/` with a payload (tensors, facts) per block; blocks already there are kept.

    `first` is the first row that `compute` reads.

    Raises CorruptError, naming the shard, before it computes anything from rows that are not the committed ones:
    what is kept here would outlive the damage.
    """
    writer = ArtifactWriter.open(place(index, digest(spec)), kind, spec)
    if not writer.committed:
        if kind != "cholesky":  # which is computed from the Gram matrix alone
            for shard in index.shards:
                if shard.hi > first:
                    check_bytes(shard)
        for done, key in enumerate(index.widths, start=1):
            if key not in writer.records:
                writer.put(key, *compute(key))
            if progress is not None:
                progress(kind, done, len(index.widths))
        writer.commit({"blocks": len(index.widths), "rows": index.n})
    return Artifact.open(writer.store, kind)


def block_rows(index: RowSource, key: str, memory: int = MEMORY, device: torch.device = CPU) -> BlockRows:
    """The rows of a block; MismatchError when the index has no such block."""
    if key not in index.widths:
        raise MismatchError(f"block {key!r}: not in this index, whose blocks are {', '.join(index.widths)}")
    return BlockRows(index, key, memory, device=device)


def place(index: RowSource, identity: str) -> Store:
    """The folder of the artifact with this digest."""
    return index.store.child(f"curvature/{identity.partition(':')[2][:16]}")
