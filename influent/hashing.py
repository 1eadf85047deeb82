"""The hash behind the sparse Johnson-Lindenstrauss map: p coordinates, each with one of k buckets and a sign.

Not here: how several hashes make one map (maps.py).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from influent.rng import Stream


@dataclass(frozen=True, eq=False)
class Hash:
    """One non-zero per coordinate: its bucket and sign, and the coordinates laid out level by level.

    Level r lists the r-th coordinate of every bucket that has more than r, buckets ordered by falling count, so that
    the sum over buckets is one gather and a few whole-vector additions: no atomics, the same on every device.
    """

    bucket: Int[Tensor, " p"]
    sign: Float[Tensor, " p"]
    order: Int[Tensor, " m"]  # coordinates, level after level
    order_sign: Float[Tensor, " m"]  # 0 where a level was padded to full width
    levels: tuple[int, ...]  # the width of each level, never increasing
    place: Int[Tensor, " k"] | None  # where bucket j stands in a level; None: at j

    @property
    def k(self) -> int:
        return self.levels[0] if self.place is None else len(self.place)

    def to(self, device: torch.device) -> "Hash":
        place = None if self.place is None else self.place.to(device)
        bucket, sign, order, order_sign = (t.to(device) for t in (self.bucket, self.sign, self.order, self.order_sign))
        return Hash(bucket, sign, order, order_sign, self.levels, place)

    def sum(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n k"]:
        """Bucket sums of the signed entries of each row."""
        gathered = x.index_select(1, self.order).mul_(self.order_sign.to(x.dtype))
        if self.place is None:
            return gathered.view(len(x), len(self.levels), self.levels[0]).sum(1)
        parts = gathered.split(self.levels, dim=1)
        out = parts[0].clone()
        for part in parts[1:]:
            out[:, : part.shape[1]] += part
        return torch.nn.functional.pad(out, (0, self.k - out.shape[1])).index_select(1, self.place)


def draw_hash(p: int, k: int, stream: Stream, law: str, copy: int) -> Hash:
    """Hash number `copy` of p coordinates into k buckets, under the law `balanced` or `iid`."""
    keyed = Stream(stream.seed, stream.block, f"sjlt-{law}", f"{stream.side}/{copy}")
    sign = torch.from_numpy(Stream(stream.seed, stream.block, "sjlt-signs", keyed.side).signs(p)).float()
    if law == "balanced":
        order = torch.from_numpy(keyed.permutation(p))
        levels = -(-p // k)
        bucket = torch.empty(p, dtype=torch.int64)
        bucket[order] = torch.arange(p) % k
        padding = order.new_zeros(levels * k - p)
        order_sign = torch.cat([sign[order], torch.zeros(len(padding))])
        return Hash(bucket, sign, torch.cat([order, padding]), order_sign, (k,) * levels, None)
    bucket = torch.from_numpy(keyed.buckets(p, k))
    counts = torch.bincount(bucket, minlength=k)
    falling = torch.argsort(counts, descending=True, stable=True)
    place = torch.empty(k, dtype=torch.int64)
    place[falling] = torch.arange(k)
    by_bucket = torch.argsort(bucket, stable=True)
    starts = (counts.cumsum(0) - counts)[bucket[by_bucket]]
    level = torch.arange(p) - starts
    order = by_bucket[torch.argsort(level * k + place[bucket[by_bucket]], stable=True)]
    return Hash(bucket, sign, order, sign[order], tuple(torch.bincount(level).tolist()), place)
