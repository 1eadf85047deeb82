"""Ground truth on disk: what training on a set of rows did to each query, one retraining a payload.

A directory remembers every retraining by what it was: its rows and its seed. Whatever asks for the same one again
reads it, so an interrupted run goes on where it was, more subsets add to those there are, and experiments share what
they have in common. The artifact's kind is `truth`. Not here: training (finetune.py), which rows (rerun.py).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from influent.artifact import Artifact, ArtifactWriter
from influent.digests import hash_bytes
from influent.errors import CorruptError, DataError, FormatError, MismatchError, NumericsError
from influent.payload import Payload
from influent.shardrecord import Record
from influent.storage import Store

KIND = "truth"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What one training led to: the loss of each query, [Q] float64; and what the model says to each, [Q] int64, in
    any numbering in which equal means unchanged, if the trainer tells."""

    loss: np.ndarray
    said: np.ndarray | None = None

    @staticmethod
    def of(returned: Any, num_queries: int, what: str) -> "Outcome":
        """A trainer's return value, checked: losses, or (losses, answers).

        Raises:
            DataError: it is neither, or not one number a query.
            NumericsError: a loss is not finite.
        """
        pair = isinstance(returned, tuple) and len(returned) == 2 and np.ndim(returned[0]) > 0
        loss, said = returned if pair else (returned, None)  # a tuple of two numbers is the losses of two queries
        loss = _numbers(loss, "loss", num_queries, what)
        if not np.isfinite(loss).all():
            query = int((~np.isfinite(loss)).argmax())
            raise NumericsError(f"{what}: the loss of query {query} is {loss[query]}: lower the learning rate")
        return Outcome(loss, None if said is None else _numbers(said, "answer", num_queries, what).astype(np.int64))


def _numbers(given: Any, name: str, num_queries: int, what: str) -> np.ndarray:
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu().numpy()
    try:
        array = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        array = np.empty(())
    if array.shape != (num_queries,):
        got = f"{type(given).__name__} of shape {list(np.shape(array))}"
        raise DataError(f"{what}: expected one {name} for each of the {num_queries} queries, got {got}")
    return array


@dataclass(frozen=True, slots=True, eq=False)
class Retraining:
    """One stored training: `role` and `number` say what it was made for, `rows` [N] which rows it saw."""

    role: str
    number: int
    seed: int
    rows: np.ndarray
    outcome: Outcome


class Truth:
    """A directory of retrainings of one data set, one set of queries and one trainer."""

    def __init__(self, writer: ArtifactWriter):
        self.writer, self.store = writer, writer.store
        self.num_rows: int = writer.spec["rows"]
        self.num_queries: int = writer.spec["queries"]

    @classmethod
    def open(cls, path: str, known: Mapping[str, Any]) -> "Truth":
        """Begin a ground truth, or go on with the one that is there.

        `known` are the fields of its spec (`rows` and `queries`, how many; `data` and `asked`, their digests;
        `trainer`) as far as the caller knows them; None, on either side, is anything.
        Raises MismatchError, naming the field, for the truth of something else; FormatError where there is none and
        no trainer to make one; CorruptError for damage.
        """
        store = Store(path)
        if not store.exists("spec.json"):
            if known.get("trainer") is None:
                raise FormatError(f"{path}: no ground truth there: give --train or --base, and it is made")
            return cls(ArtifactWriter.open(store, KIND, {"statistic": "retraining", **known}))
        try:
            stored = dict(json.loads(store.get("spec.json"))["spec"])
        except (ValueError, KeyError, TypeError) as e:
            raise CorruptError(f"{path}/spec.json: not readable as a spec; restore it, or give another --truth") from e
        given = {name: value for name, value in known.items() if value is not None and stored.get(name) is not None}
        for name in ("rows", "queries"):  # in words: the commonest mistake
            if stored.get(name) != given.get(name, stored.get(name)):
                raise MismatchError(
                    f"{path}: the ground truth is of {stored.get(name)} {name}, but here are {given[name]}; "
                    "give what it was made with, or another --truth"
                )
        truth = cls(ArtifactWriter.open(store, KIND, stored | given))
        truth._check()
        return truth

    def find(self, rows: np.ndarray, seed: int) -> Outcome | None:
        """What training on these rows [N] (booleans) with this seed led to, if it has been done."""
        record = self.writer.records.get(_name(rows, seed))
        return None if record is None else _outcome(self._payload(record))

    def add(self, role: str, number: int, rows: np.ndarray, seed: int, outcome: Outcome, *, seconds: float) -> None:
        """Keep one retraining; from here on it survives."""
        if self.writer.committed:
            # The manifest says what is there; with a payload more it would not. Until the next commit the payloads
            # are found by their own records, as those of any unfinished artifact.
            self.store.delete("manifest.json")
            self.writer.committed = False
        tensors = {
            "rows": torch.from_numpy(np.packbits(rows, bitorder="little")),
            "seed": torch.tensor([seed]),
            "loss": torch.from_numpy(outcome.loss),
        }
        if outcome.said is not None:
            tensors["said"] = torch.from_numpy(outcome.said)
        meta = {"role": role, "number": number, "size": int(rows.sum()), "seconds": round(seconds, 3)}
        self.writer.put(_name(rows, seed), tensors, meta)

    def close(self) -> None:
        """Commit what there is."""
        if not self.writer.committed:
            self.writer.commit({"trainings": len(self.writer.records)})

    def of_role(self, role: str) -> list[Retraining]:
        """Every stored retraining that was made for `role`, by number and seed."""
        found = []
        for record in self.writer.records.values():
            if record.meta.get("role") == role:
                payload = self._payload(record)
                bits = np.unpackbits(payload["rows"].numpy(), count=self.num_rows, bitorder="little").astype(bool)
                found.append(Retraining(role, record.meta["number"], int(payload["seed"][0]), bits, _outcome(payload)))
        return sorted(found, key=lambda each: (each.number, each.seed))

    def _payload(self, record: Record) -> Payload:
        return Payload(self.store, record.payload, record.bytes)

    def _check(self) -> None:
        """Unfinished ones were checked while they were found; committed ones are here."""
        if self.writer.committed:
            finished = Artifact.open(self.store, KIND)
            for record in finished.records:
                finished.check(record.name)


def _name(rows: np.ndarray, seed: int) -> str:
    """What a retraining is known by: the hash of its rows, and its seed."""
    packed = np.packbits(rows, bitorder="little").tobytes()
    return f"{hash_bytes([packed]).rpartition(':')[2][:24]}-{seed}"


def _outcome(payload: Payload) -> Outcome:
    said = payload["said"].numpy().copy() if "said" in payload else None
    return Outcome(payload["loss"].numpy().astype(np.float64), said)
