"""Programs are given where the rows of their blocks lie, in every kind of source; what they add is what rows score."""

import ctypes
from dataclasses import replace

import oracle
import pytest
import torch
from small_index import random_rows, write_index

from influent import asking, compiled, kernels, programs
from influent import score as score_module
from influent.asking import ask
from influent.codec import Codec, Form
from influent.coding import decode
from influent.errors import CorruptError, MismatchError, NumericsError
from influent.gradients import Flat
from influent.kernels import by_tiles
from influent.payload import encode
from influent.reduce import Full
from influent.rowstore import Index, Shard
from influent.score import Member, query_energy, score, score_members

WIDTHS = {"a": 63, "b": 17, "c": 40, "d": 64}
FACTORS = {"a": (9, 7), "c": (5, 8), "d": (4, 16)}
CODECS = ["bfloat16", "int8", "int4", "sign", "rank:1", "rank:2", "rank:2:int8", "rank:2:int4", "rank:1:sign"]


class Plain:
    """A program in Python: it reads the addresses that it is given."""

    def __init__(self, keys, queries, forms):
        self.keys, self.queries, self.forms, self.calls = tuple(keys), queries, forms, []

    def add(self, scores, places):
        assert len(places) == len(self.keys)
        n = scores.shape[1]
        self.calls.append(n)
        for key, q, form, addresses in zip(self.keys, self.queries, self.forms, places, strict=True):
            tensors, names = {}, form.tensors(key)
            for (name, (dtype, tail)), address in zip(names.items(), addresses.tolist(), strict=False):
                tensors[name] = read(address, dtype, (n, *tail))
            assert addresses[len(names) :].tolist() == ([] if form.packed else [0])
            codec = Codec(form.rank or None, form.bits)
            rows = decode(codec, tensors, key, form.width, form.factors).to(torch.float64).flat()
            scores += q.double() @ rows.T


def read(address: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    kind = getattr(torch, dtype)
    size = torch.Size(shape).numel() * kind.itemsize
    return torch.frombuffer(bytearray(ctypes.string_at(address, size)), dtype=kind).view(shape)


@pytest.fixture
def made(monkeypatch):
    """The programs that are made, of the test's own kind, for all blocks that one could be for."""
    found = []

    def program(bits, rank, keys, queries, forms):
        assert all((form.bits, form.rank) == (bits, rank) for form in forms)
        found.append(Plain(keys, queries, forms))
        return found[-1]

    monkeypatch.setattr(programs, "program_of", program)
    monkeypatch.setattr(asking, "by_tiles", lambda form, num_queries, query_rank: form.bits in kernels.TILED)
    return found


def asked(num_queries: int = 3, widths=WIDTHS) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    return {key: torch.randn(num_queries, width, generator=rng) for key, width in widths.items()}


def stored(index) -> dict[str, torch.Tensor]:
    parts = {key: [shard.grads(key).to(torch.float64).flat() for shard in index.shards] for key in index.widths}
    return {key: torch.cat(part) for key, part in parts.items()}


def written(path, codec: str, *, shard_rows: int = 5, seed: int = 0) -> Index:
    rows = random_rows(13, WIDTHS, seed=seed)
    factors = FACTORS if codec.startswith("rank") else None
    return write_index(path, rows, codec=codec, factors=factors, shard_rows=shard_rows)


def all_scores(index, queries, **options):
    return score(index, queries, {"all": Full()}, **options)["all"].double()


def near(got, expected):
    assert float((got - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


class Memory:
    """The shards of an index as a source of another kind: rows are handed out, not where they lie."""

    def __init__(self, index, tensors=lambda row: row):
        self.index, self.lo, self.tensors = index, 0, tensors
        self.n, self.widths, self.digest, self.store, self.history = index.n, index.widths, "", index.store, []
        self.shards = [Handed(shard, tensors) for shard in index.shards]


class Handed:
    def __init__(self, shard, tensors):
        self.lo, self.hi, self.name, self.ids = shard.lo, shard.hi, shard.name, shard.ids
        self.shard, self.tensors = shard, tensors

    def grads(self, key, lo=0, hi=None):
        return self.tensors(self.shard.grads(key, lo, hi))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("normalize", ["none", "cosine"])
def test_scores_are_those_of_the_rows_wherever_they_lie(tmp_path, monkeypatch, made, codec, normalize):
    index, queries = written(tmp_path / "index", codec), asked()
    rows = stored(index)
    expected = oracle.scores(rows, queries)
    if normalize == "cosine":
        expected = expected / (oracle.norms(queries)[:, None] * oracle.norms(rows))
    near(all_scores(index, queries, normalize=normalize), expected)
    kinds = {(form.bits, form.rank) for form in index.forms.values()}
    assert [call for program in made for call in program.calls] == [5, 5, 3] * len(kinds)
    assert sorted(key for program in made for key in program.keys) == sorted(WIDTHS)
    for window, fetch in ((12, 1 << 21), (9, 120)):  # of scores, for three queries
        monkeypatch.setattr(score_module, "WINDOW_SCORES", window)
        monkeypatch.setattr("influent.asking.FETCH_NUMBERS", fetch)
        monkeypatch.setattr("influent.programs.TOGETHER", 1)
        near(all_scores(index, queries, normalize=normalize), expected)
        near(all_scores(Memory(index), queries, normalize=normalize), expected)


def test_a_remote_index_is_scored_from_what_is_fetched(made):
    index, queries = written("memory://programs/remote", "rank:2:int4"), asked()
    assert not index.shards[0].is_mapped
    near(all_scores(index, queries), oracle.scores(stored(index), queries))
    assert made


def test_members_of_several_indexes(tmp_path, monkeypatch, made):
    monkeypatch.setattr(score_module, "WINDOW_SCORES", 12)
    queries, members, expected = asked(), [], 0
    for number, (codec, weight) in enumerate((("rank:1", 2.0), ("sign", -1.0), ("float32", 0.5))):
        index = written(tmp_path / str(number), codec, shard_rows=5 + number, seed=number)
        members.append(Member(index, queries, weight))
        expected = expected + weight * oracle.scores(stored(index), queries)
    near(score_members(members, {"all": Full()})["all"].double(), expected)


def test_no_row_is_decoded_to_learn_its_form_or_to_be_scored(tmp_path, monkeypatch, made):
    index, queries = written(tmp_path / "index", "rank:2:int8"), asked()
    expected, called = oracle.scores(stored(index), queries), []
    real = Shard.grads
    monkeypatch.setattr(Shard, "grads", lambda self, *given: called.append(given) or real(self, *given))
    near(all_scores(index, queries), expected)
    assert called == []


@pytest.mark.parametrize("name", ["a.v", "d.u", "c.scale", "b"])
def test_a_tensor_of_another_shape_is_found_before_its_address_is_used(tmp_path, made, name):
    index = written(tmp_path / "index", "rank:1:int8")
    record = index.artifact.records[1]
    tensors = {key: x.clone() for key, x in index.artifact.tensors(record.name).items()}
    odd = tensors[name]
    tensors[name] = odd[:-1] if name == "d.u" else odd.to(torch.float16 if name == "c.scale" else torch.int64)
    parts = encode(tensors)
    (tmp_path / "index" / record.payload).write_bytes(b"".join(parts))
    opened = Index.open(tmp_path / "index")
    opened.shards[1]._record = opened.artifact._by_name[record.name] = replace(record, bytes=sum(map(len, parts)))
    opened.artifact._sound = {record.name for record in opened.artifact.records}
    message = rf"{record.payload}: tensor '{name}': expected .*, got .*verify"
    with pytest.raises(CorruptError, match=message):
        all_scores(opened, asked())
    program = next(program for program in made if name.split(".")[0] in program.keys)
    assert program.calls == [5]  # of the sound shard before it


def test_rows_that_are_not_as_the_source_says_are_refused(tmp_path, made):
    index = written(tmp_path / "index", "rank:2")
    halved = Memory(index, lambda row: row[: len(row) // 2])
    with pytest.raises(MismatchError, match="shard 000000, block 'a': expected rows of"):
        all_scores(halved, asked())


def test_a_row_that_is_not_finite_is_blamed(tmp_path, made):
    index = written(tmp_path / "index", "rank:2")

    def poisoned(row):
        if not isinstance(row, Flat) or len(row) != 3:  # block b of the last shard
            return row
        return Flat(row.g.index_fill(0, torch.tensor([1]), float("nan")))

    with pytest.raises(NumericsError, match="shard 000002, block 'b', row 11"):
        all_scores(Memory(index, poisoned), asked())


def test_queries_are_cut_for_programs_as_for_blocks(tmp_path, made, monkeypatch):
    index, queries = written(tmp_path / "index", "rank:2"), asked()
    got, energy = all_scores(index, queries, query_rank=1), query_energy(index, queries, 1)
    monkeypatch.setattr(asking, "by_tiles", lambda form, num_queries, query_rank: False)
    torch.testing.assert_close(got, all_scores(index, queries, query_rank=1), rtol=1e-5, atol=1e-5)
    assert bool((energy < 1).all())


@pytest.mark.skipif(not compiled.tiles_usable(), reason="this machine has no matrix tiles")
@pytest.mark.parametrize("codec", CODECS)
def test_the_programs_of_this_machine_score_the_rows(tmp_path, monkeypatch, codec):
    index, queries = written(tmp_path / "index", codec), asked()
    assert ask(index, queries, None).programs
    expected = oracle.scores(stored(index), queries)
    near(all_scores(index, queries), expected)
    monkeypatch.setattr(score_module, "WINDOW_SCORES", 9)
    near(all_scores(index, queries), expected)
    near(all_scores(Memory(index), queries), expected)


def test_programs_take_few_queries_and_what_no_cut_makes_cheaper(monkeypatch):
    monkeypatch.setattr(compiled, "tiles_usable", lambda: True)
    dense, packed, pair = Form("bfloat16", 4096), Form("int4", 4096), Form("bfloat16", 4096, (64, 64), 1)
    pairs = Form("bfloat16", 4096, (64, 64), 8)
    assert [by_tiles(form, 1, None) for form in (dense, packed, pair, pairs)] == [True, True, True, True]
    assert [by_tiles(form, 300, None) for form in (dense, packed, pair, pairs)] == [False, True, True, False]
    assert not by_tiles(Form("float32", 4096), 1, None)
    assert [by_tiles(pair, 1, rank) for rank in (1, 31, 32)] == [False, True, True]
    monkeypatch.setattr(compiled, "tiles_usable", lambda: False)
    assert not by_tiles(pair, 1, None)


@pytest.mark.parametrize("bits", ["float32", "float16"])
def test_forms_that_no_program_reads_are_left_to_the_blocks(tmp_path, made, bits):
    all_scores(written(tmp_path / "dense", bits), asked())
    all_scores(written(tmp_path / "pairs", f"rank:1:{bits}"), asked())
    assert made == []


def test_a_form_says_what_a_row_holds():
    assert Form("int4", 17).numbers == 9
    assert Form("bfloat16", 63, (9, 7), 2).numbers == 32
