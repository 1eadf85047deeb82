"""Commitments to scores: what a provider hands over before anybody knows which of its rows will be looked at.

A table of every row's name, score and salted hash, and the Merkle root over it. Salted, because otherwise a row that
is never revealed could be guessed and compared. A leaf is position (8 bytes, little-endian), score (float32), the hash
of the name and the row's hash. Not here: the tree (merkle.py), revealing and checking (auditing.py).
"""

import io
import json
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from influent import merkle
from influent.artifact import Artifact
from influent.catalog import Catalog
from influent.digests import canonical_json
from influent.errors import CorruptError, SpecError
from influent.offers import KIND, read_scores
from influent.providers import BY, UNNAMED
from influent.rng import Stream
from influent.storage import Store

PUBLIC, TABLE, SECRET = "commitment.json", "commitment.parquet", "commitment.secret"


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """What a provider hands over of every row: a name to group it by, target tokens, score and salted hash."""

    names: list[str]
    tokens: np.ndarray
    scores: np.ndarray  # [N] float32
    hashes: list[str]

    def leaves(self) -> list[bytes]:
        """The leaf of each row."""
        return [
            merkle.leaf(item(place, float(score), name, row_hash))
            for place, (score, name, row_hash) in enumerate(zip(self.scores, self.names, self.hashes, strict=True))
        ]


def commit(scores: str | Store, *, by: str = "provider") -> dict[str, Any]:
    """Commit to the scores that `appraise` left in a directory; the public statement, also when it was made before.

    Writes `commitment.json` and `commitment.parquet`, to hand over, and `commitment.secret`, to keep.
    """
    if by not in BY:
        raise SpecError(f"by is {by!r}, expected {' or '.join(BY)}")
    store = Store.at(scores)
    artifact = Artifact.open(store, KIND)
    if store.exists(PUBLIC) and store.exists(SECRET) and store.exists(TABLE):
        return read_statement(store.get(PUBLIC), f"{store}/{PUBLIC}")
    values, tokens = read_scores(artifact)
    listed = Catalog.open(store)
    secret = secrets.token_bytes(32)  # must not be foreseeable, so it is not drawn from a keyed stream
    hashes = [
        salted(bytes.fromhex(row["hash"] or ""), salt(secret, place)).hex()
        for place, row in enumerate(listed.fields("hash"))
    ]
    names = [row[by] or UNNAMED for row in listed.fields("provider", "source")]
    table = Table(names, tokens, values, hashes)
    statement: dict[str, Any] = {
        "format": [1, 0], "kind": "commitment", "by": by, "rows": len(hashes),
        "root": merkle.root(table.leaves()).hex(), "student": artifact.spec["student"],
    }  # fmt: skip
    store.put(SECRET, secret.hex().encode())
    store.put(TABLE, _parquet(table))
    store.put(PUBLIC, canonical_json(statement))
    return statement


def positions(root: str, rows: int, count: int, seed: str) -> list[int]:
    """The rows to reveal: `count` of `rows`, which nobody could foresee before both root and seed were fixed."""
    if not 1 <= count <= rows:
        raise SpecError(f"{count} rows of {rows} cannot be audited; expected 1 to {rows}")
    return Stream(0, root, "audit", seed).subset(rows, count).tolist()


def item(place: int, score: float, name: str, row_hash: str) -> bytes:
    named = blake2b(name.encode(), digest_size=16).digest()
    return place.to_bytes(8, "little") + np.float32(score).astype("<f4").tobytes() + named + bytes.fromhex(row_hash)


def salt(secret: bytes, place: int) -> bytes:
    return blake2b(place.to_bytes(8, "little"), key=secret, digest_size=16).digest()


def salted(content: bytes, salt: bytes) -> bytes:
    return blake2b(content, key=salt, digest_size=32).digest()


def read_statement(data: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(data)
        if found["kind"] != "commitment" or found["format"][0] != 1:
            raise ValueError("not a commitment of format 1")
        bytes.fromhex(found["root"])
        return {**found, "rows": int(found["rows"]), "student": str(found["student"])}
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptError(f"{where}: not a commitment ({e}); ask for it again") from e


def _parquet(table: Table) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    columns = {
        "name": table.names, "tokens": table.tokens.astype(np.int64), "score": table.scores.astype(np.float32),
        "hash": table.hashes,
    }  # fmt: skip
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def read_table(data: bytes, where: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = pq.read_table(io.BytesIO(data))
        scores, tokens = found["score"].to_numpy(), found["tokens"].to_numpy()
        hashes = found["hash"].to_pylist()
        if any(len(bytes.fromhex(h)) != 32 for h in hashes) or not np.isfinite(scores).all():
            raise ValueError("a hash or score in it is malformed")
        return Table(found["name"].to_pylist(), tokens, scores.astype(np.float32), hashes)
    except (pa.ArrowException, KeyError, ValueError, TypeError, OSError) as e:
        raise CorruptError(f"{where}: not a table of scores ({e}); ask for it again") from e
