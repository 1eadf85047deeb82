"""A mask is learned from a model's own gradients, saved, and used by an index that then needs its folder no more."""

import json
import shutil

import pytest
import torch
from oracle_gradients import weight_gradients
from test_extract import build, losses_of
from tiny_model import FACTS, make_model
from torch import nn

import influent
from influent import masking, selection
from influent.artifact import Artifact
from influent.cli import run
from influent.compress import Compress
from influent.errors import CorruptError, FormatError, LayerError, MismatchError, NumericsError, SpecError
from influent.extract import frozen
from influent.indexing import catalogue
from influent.layers import plan
from influent.rowstore import Index
from influent.storage import Store
from influent.task import Classification


def net(seed=0, width=12):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


def examples(count=64, seed=1):
    rng = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=rng) * torch.tensor([3.0, 3, 3, 0.1, 0.1, 0.1, 0.1, 0.1])
    return [(x, int(x[:3].argmax())) for x in inputs]


QUICK = {"task": Classification(), "steps": 20, "sample": 48, "rate": 3e-3}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Masks of both forms and of all blocks together, of one model."""
    folder = tmp_path_factory.mktemp("masks")
    documents = {
        "sides": influent.mask(net(), examples(), str(folder / "sides"), size="4x3", **QUICK),
        "flat": influent.mask(net(), examples(), str(folder / "flat"), size="20", **QUICK),
        "all": influent.mask(net(), examples(), str(folder / "all"), size="40", scope="all", **QUICK),
    }
    return folder, documents


def kept_of(folder) -> dict[str, dict[str, torch.Tensor]]:
    found = Artifact.open(Store(str(folder)), "mask")
    return {record.name: {s: t.clone() for s, t in found.tensors(record.name).items()} for record in found.records}


def rows_of(path, block):
    index = Index.open(str(path))
    return torch.cat([shard.grads(block).flat() for shard in index.shards])


def test_what_a_mask_says_of_itself(learned):
    _, documents = learned
    for name, document in documents.items():
        assert [block["block"] for block in document["blocks"]] == ["0", "2"]
        assert all(block["held"] > block["random"] for block in document["blocks"]), name
        assert document["rows"] == 48
    assert [block["kept"] for block in documents["sides"]["blocks"]] == [{"in": 4, "out": 3}, {"in": 4, "out": 3}]
    assert [block["kept"] for block in documents["flat"]["blocks"]] == [{"flat": 20}, {"flat": 20}]
    assert sum(block["kept"]["flat"] for block in documents["all"]["blocks"]) == 40


@pytest.mark.parametrize("name", ["sides", "flat", "all"])
def test_rows_are_the_kept_entries_of_the_whole_gradients(learned, name, tmp_path):
    folder, _ = learned
    influent.index(net(), examples(), str(tmp_path / "whole"), compress="id", task=Classification())
    influent.index(net(), examples(), str(tmp_path / "kept"), compress=f"select:{folder / name}", task=Classification())
    for block, sides in kept_of(folder / name).items():
        whole, rows = rows_of(tmp_path / "whole", block), rows_of(tmp_path / "kept", block)
        if name == "sides":
            out = 12 if block == "0" else 4
            expected = whole.view(len(whole), -1, out)[:, sides["in"]][:, :, sides["out"]].flatten(1)
        else:
            expected = whole[:, sides["flat"]]
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["linear-sequence", "conv2d-grouped", "tied-bias", "called-twice", "layernorm"])
@pytest.mark.parametrize("sizes", [(2, 2), (5,)])
def test_sampled_products_are_those_of_whole_gradients(name, sizes, tmp_path, monkeypatch):
    """Whatever the layer: sides or formed, one at a time or all, candidates first and queries after them."""
    model, x = build(name)

    class Plain:
        def loss(self, model, batch):
            return losses_of(model, batch)

        def measure(self, model, batch):
            return 2 * losses_of(model, batch)

    tracked = plan(model, "")
    exact = weight_gradients(model, tracked, lambda i: losses_of(model, x[i : i + 1])[0] if i < len(x) else None)
    setting = masking.Setting(compress="id", layers="")
    with masking.attach(model, Plain(), setting, masking.Run(token_budget=2)) as attached, frozen(model):
        listed = catalogue(list(x), Store(str(tmp_path)), task=Plain(), limit=None, keep="text", progress=None)
        how = masking.Search(sizes=sizes)
        learning = masking._Learning.of(attached, list(x), listed, list(x[:2]), how, "block", len(x), 2**30)
        positions = learning.positions()
        for block in learning.blocks:
            for cheap in (True, False):
                always = cheap or len(sizes) == 1 or block.is_vector
                monkeypatch.setattr(masking._Learning, "_is_formed", lambda self, block, t, formed=always: formed)
                held = learning.gather([block], positions)[block.name]
                order = [item.row for item in learning.candidates]
                g = exact[block.name].double()
                g = torch.cat([g[order], 2 * g[[item.row for item in learning.queries]]])
                ones = tuple(torch.ones(width, dtype=held.dtype) for width in held.widths)
                got = held.products(ones, torch.arange(len(g)), slice(0, len(g)))
                torch.testing.assert_close(got.double(), g @ g.T, rtol=1e-4, atol=1e-6)


def test_an_index_keeps_its_mask_and_its_digest_does_not_know_where_it_was(learned, tmp_path):
    folder, _ = learned
    moved = tmp_path / "elsewhere" / "mask"
    shutil.copytree(folder / "sides", moved)
    made = {}
    for name, mask in (("one", folder / "sides"), ("two", moved)):
        text = f"select:{mask} | sjlt:6"
        made[name] = influent.index(net(), examples(), str(tmp_path / name), compress=text, task=Classification())
    assert made["one"]["digest"] == made["two"]["digest"]
    assert made["two"]["compress"] == "select:4x3 | sjlt:6"
    shutil.rmtree(moved)
    asked = {"queries": examples(3, seed=5), "model": net(), "task": Classification()}
    scores = influent.query(str(tmp_path / "two"), **asked)["queries"][0]["top"][0]["score"]
    assert scores == influent.query(str(tmp_path / "one"), **asked)["queries"][0]["top"][0]["score"]
    assert influent.verify(str(tmp_path / "two"))["ok"]
    record = next((tmp_path / "two" / "bases" / "shards").glob("*.safetensors"))
    record.write_bytes(record.read_bytes()[:-1] + b"\7")
    assert not influent.verify(str(tmp_path / "two"))["ok"]
    with pytest.raises(CorruptError, match="copy the mask"):
        influent.query(str(tmp_path / "two"), **asked)


def test_a_mask_that_does_not_fit_is_refused(learned, tmp_path):
    folder, _ = learned
    made = {"task": Classification(), "compress": f"select:{folder / 'sides'}"}
    with pytest.raises(MismatchError, match=r"layer 0: the mask was learned for 9 inputs and 12 outputs"):
        influent.index(net(width=10), examples(), str(tmp_path / "a"), **made)
    deeper = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4), nn.Linear(4, 4))
    with pytest.raises(MismatchError, match="the mask has no layer 3"):
        influent.index(deeper, examples(), str(tmp_path / "b"), **made)
    influent.index(net(), examples(), str(tmp_path / "c"), exclude="2", **made)  # fewer layers are no difficulty
    together = {**made, "compress": f"select:{folder / 'all'}"}
    with pytest.raises(MismatchError, match="give the same --layers"):
        influent.index(net(), examples(), str(tmp_path / "d"), exclude="2", **together)
    influent.index(net(), examples(), str(tmp_path / "e"), **made)
    (tmp_path / "e" / "manifest.json").unlink()
    other = tmp_path / "other"
    influent.mask(net(), examples(), str(other), size="4x3", seed=7, **QUICK)
    with pytest.raises(MismatchError, match="holds the mask"):
        influent.index(net(), examples(), str(tmp_path / "e"), task=Classification(), compress=f"select:{other}")
    with pytest.raises(SpecError, match="name one that was learned"):
        influent.index(net(), examples(), str(tmp_path / "f"), task=Classification(), compress="select:4x3")
    with pytest.raises(FormatError, match="not an influent mask"):
        influent.index(net(), examples(), str(tmp_path / "g"), task=Classification(), compress="select:nowhere")
    flat = {**made, "compress": f"select:{folder / 'flat'} | gauss:2x2"}
    with pytest.raises(SpecError, match="factorised but follows a flat stage"):
        influent.index(net(), examples(), str(tmp_path / "h"), **flat)


def test_the_grammar_of_a_mask():
    assert str(Compress.parse("select:./a folder/m.mask|sjlt:64")) == "select:./a folder/m.mask | sjlt:64"
    assert str(Compress.parse("select:128x64 | rotate")) == "select:128x64 | rotate"
    assert str(Compress.parse("select:a").sized(4, None)) == "select:4"
    with pytest.raises(SpecError, match="must be the first"):
        Compress.parse("gauss:4x4 | select:file")
    for text in ("select:", "select"):
        with pytest.raises(SpecError, match="is not known"):
            Compress.parse(text)


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    searched, plain = [], masking.search

    def stops(*args, block, **options):
        searched.append(block)
        if len(searched) == 2:
            raise KeyboardInterrupt
        return plain(*args, block=block, **options)

    monkeypatch.setattr(masking, "search", stops)
    with pytest.raises(KeyboardInterrupt):
        influent.mask(net(), examples(), str(tmp_path / "m"), size="4x3", **QUICK)
    with pytest.raises(FormatError, match="not finished"):
        selection.open_mask(Store(str(tmp_path / "m")))
    document = influent.mask(net(), examples(), str(tmp_path / "m"), size="4x3", **QUICK)
    assert searched == ["0", "2", "2"]
    whole = influent.mask(net(), examples(), str(tmp_path / "whole"), size="4x3", **QUICK)
    assert whole["digest"] == document["digest"]
    again = influent.mask(net(), examples(), str(tmp_path / "whole"), size="4x3", **QUICK)
    assert again == whole and searched == ["0", "2", "2", "0", "2"]
    with pytest.raises(MismatchError, match="size"):
        influent.mask(net(), examples(), str(tmp_path / "m"), size="4x2", **QUICK)


def test_a_mask_over_all_layers_serves_rows_that_are_keyed_by_all(tmp_path):
    """TRAK: learned from gradients of the margin, kept entries of the concatenation, end to end."""
    mask, made = str(tmp_path / "m"), {"task": Classification(), "method": "trak"}
    influent.mask(net(), examples(), mask, size="40", scope="all", target="margin", **QUICK)
    assert Artifact.open(Store(mask), "mask").spec["target"] == "margin"
    influent.index(net(), examples(), str(tmp_path / "kept"), compress=f"select:{mask}", **made)
    influent.index(net(), examples(), str(tmp_path / "whole"), compress="id", **made)
    kept, first, entries = kept_of(mask), 0, []
    for block, width in (("0", 9 * 12), ("2", 13 * 4)):
        entries.append(kept[block]["flat"] + first)
        first += width
    whole, rows = rows_of(tmp_path / "whole", "all"), rows_of(tmp_path / "kept", "all")
    torch.testing.assert_close(rows, whole[:, torch.cat(entries)], rtol=1e-5, atol=1e-7)
    with pytest.raises(SpecError, match="target is 'loss2'"):
        influent.mask(net(), examples(), str(tmp_path / "n"), size="40", target="loss2", **QUICK)


def test_neither_memory_nor_batches_change_a_mask(learned, tmp_path, monkeypatch):
    _, documents = learned
    monkeypatch.setattr(masking, "in_groups", lambda blocks, size, most: iter([[block] for block in blocks]))
    found = influent.mask(net(), examples(), str(tmp_path / "m"), size="4x3", token_budget=5, memory=1, **QUICK)
    assert found["digest"] == documents["sides"]["digest"]


def test_queries_of_their_own(tmp_path):
    found = influent.mask(net(), examples(), str(tmp_path / "m"), size="4x3", queries=examples(24, seed=9), **QUICK)
    assert all(block["held"] > block["random"] for block in found["blocks"])
    with pytest.raises(MismatchError, match="queries"):
        influent.mask(net(), examples(), str(tmp_path / "m"), size="4x3", queries=examples(24, seed=8), **QUICK)


def test_mistakes_are_told_before_anything_is_written(tmp_path):
    for options, error, message in (
        ({"size": "4y3"}, SpecError, "--size '4y3': expected K"),
        ({"size": "4x3", "scope": "all"}, SpecError, "is flat; give one number"),
        ({"scope": "each"}, SpecError, "scope is 'each'"),
        ({"size": "4x3", "layers": "nothing"}, LayerError, "matches no layer"),
    ):
        with pytest.raises(error, match=message):
            influent.mask(net(), examples(), str(tmp_path / "m"), **QUICK, **options)
    assert not (tmp_path / "m").exists()
    bad = examples()
    bad[7] = (bad[7][0] * float("nan"), 0)
    with pytest.raises(NumericsError, match=r"row 7 .*is not finite"):
        influent.mask(net(), bad, str(tmp_path / "n"), size="4x3", **{**QUICK, "sample": 64})
    with pytest.raises(SpecError, match=r"sampled gradients take .* lower --sample"):
        influent.mask(nn.Sequential(nn.Linear(8, 4000), nn.Linear(4000, 4)), examples(), str(tmp_path / "o"), size="9",
                      memory=1, **QUICK)  # fmt: skip


def test_the_command_learns_a_mask_of_a_language_model(tmp_path, capsys):
    model, data = make_model(tmp_path / "model"), tmp_path / "data.jsonl"
    ends = (".", ", as all know.", "; or not?") * 2
    texts = [f"{prompt} {answer}{end}" for _, prompt, answer in FACTS for end in ends]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    out = tmp_path / "mask"
    arguments = ["mask", str(model), str(data), "-o", str(out), "--size", "8x8", "--steps", "10", "--layers", "0.mlp.d"]
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["blocks"]) == 1 and document["rows"] == 48
    assert run(arguments) == 0
    assert "inner products agree at" in capsys.readouterr().out
    use = ["index", str(model), str(data), "-o", str(tmp_path / "i"), "--compress", f"select:{out} | sjlt:16"]
    for _ in range(2):  # the second finds it finished, under the mask's size
        assert run([*use, "--layers", "0.mlp.d", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["compress"] == "select:8x8 | sjlt:16"
    assert run([*use[:-1], "select:nowhere"]) == 2
    assert "not an influent mask" in capsys.readouterr().err


def test_a_mask_over_all_layers_keeps_an_entry_of_each():
    energy = torch.tensor([5.0, 4.0, 3.0, 1.0, 2.0, 0.5, 0.1])
    parts = masking.divided(torch.tensor([0, 1, 2]), [3, 2, 2], energy)
    assert [part.tolist() for part in parts] == [[0], [1], [0]]  # entries 2 and 1 gave way, the strongest stayed
    untouched = masking.divided(torch.tensor([1, 4, 6]), [3, 2, 2], energy)
    assert [part.tolist() for part in untouched] == [[1], [1], [1]]
    with pytest.raises(SpecError, match="2 entries over 3 layers"):
        masking.divided(torch.tensor([0, 1]), [3, 2, 2], energy)
