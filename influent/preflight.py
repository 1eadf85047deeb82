"""What can be refused before torch is imported: wrong paths, options, directories, and models that do not fit.

Does: answer a mistake on the command line in well under a second. Does not: replace the checks of the modules that do
the work; whatever needs the loaded model is left to them. Every function returns what it checked, or raises.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from influent import hub, kronname
from influent.codec import Codec
from influent.compress import Compress
from influent.damping import PUBLISHED, Damping
from influent.ensemble import Ensemble, is_ensemble
from influent.ensemble import place as member_place
from influent.errors import DataError, FormatError, LayerError, MismatchError, SpecError
from influent.records import files_of, is_hub_name, read_examples
from influent.rowstore import Index
from influent.selection import parse_size, resolve
from influent.storage import UNFINISHED, Store

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
MAKES = {
    "index": "index MODEL DATA --out {}",
    "student": "distill INDEX --target FILE --student MODEL --out {}",
    "folder of scores": "appraise STUDENT DATA --out {} --commit",
    "commitment": "appraise STUDENT DATA --out DIR --commit",
}  # what a verb is given -> the command that makes it
_LATER_PART = re.compile(r"catalog-\d{6}\.(json|parquet)")  # of rows that were appended
# A checkpoint whose names begin so carries the full names of the modules; others lack a prefix that only loading adds.
FULL_NAMES = ("model.", "transformer.", "gpt_neox.", "language_model.")


def choice(option: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of `allowed`; SpecError otherwise."""
    if value not in allowed:
        raise SpecError(f"{option}: expected {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    return value


def rows(text: str | None) -> str | None:
    """The canonical text of a row codec; SpecError when it does not parse."""
    return None if text is None else str(Codec.parse(text))


def size(text: str | None) -> int | None:
    """Bytes: a number with B, KB, MB, GB (powers of 1,000), KiB, MiB or GiB (of 1,024), or none of them."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(i?)B?", text.strip(), flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise SpecError(f"--row-bytes: expected a size such as 65536, 64KiB or 0.5MB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2].upper() or " "))


def compressor(text: str | None) -> str | None:
    """The canonical text of a compressor; SpecError when it does not parse."""
    return None if text is None else str(Compress.parse(text))


def stored_compressor(text: str | None) -> str | None:
    """The text as an index holds it: of a learned mask, its size. FormatError when there is no mask in its folder."""
    return None if text is None else str(resolve(Compress.parse(text))[0])


def mask_size(text: str, scope: str) -> str:
    """The size of a mask; SpecError unless it is K or, for a mask of each layer, AxB."""
    if len(parse_size(text)) == 2 and scope == "all":
        raise SpecError(f"--size {text}: a mask over all layers together is flat; give one number")
    return text


def damping(text: str | None) -> str | None:
    """A damping's text; SpecError unless it is `relative:NUMBER` or `absolute:NUMBER` with a number of 0 or more."""
    if text is not None:
        Damping.parse(text)
    return text


def parity(rule: str | None) -> str | None:
    """The name of a published damping rule; SpecError for another one."""
    return None if rule is None else choice("--parity", rule, PUBLISHED)


def curvature(name: str | None) -> str | None:
    """A curvature's name as far as it can be judged without an index; SpecError for an unknown kind."""
    kinds = ("fim", "lowrank", "sketch", "datainf", "identity")
    if name is not None and kronname.parse(name) is None and name.partition(":")[0] not in kinds:
        raise SpecError(
            f"--curvature: expected fim, lowrank:R, sketch:R, datainf, kfac, ekfac or identity, got {name!r}"
        )
    return name


def pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    """A compiled regular expression; SpecError saying where it breaks."""
    try:
        return None if text is None else re.compile(text)
    except re.error as e:
        raise SpecError(f"{option}: {text!r} is not a regular expression: {e}") from e


def data(path: str) -> str:
    """DATA, when it exists here or may exist on the hub; DataError otherwise."""
    if is_hub_name(path):
        hub.expect(path, "datasets")
    else:
        files_of(path)
    return path


def queries(option: str, path: str | None) -> str | None:
    """A file of queries, read through once; DataError names the file and line."""
    if path is None:
        return None
    data(path)
    if is_hub_name(path):
        return path
    skips = [example for example in read_examples(path) if example.skip is not None]
    if skips:
        raise DataError(
            f"{skips[0].where}: {option}: expected a text or a completion to ask about, got {skips[0].skip}"
        )
    return path


def output(option: str, path: str | None, suffixes: Sequence[str]) -> str | None:
    """A file to write: its folder must exist and its name end in one of `suffixes`; SpecError otherwise."""
    if path is None or "://" in path:
        return path
    if not path.endswith(tuple(suffixes)):
        raise SpecError(f"{option}: expected a file name ending in {' or '.join(suffixes)}, got {path!r}")
    if not Path(path).expanduser().absolute().parent.is_dir():
        raise SpecError(f"{option}: the folder of {path!r} does not exist; make it first")
    return path


def model(path: str) -> str:
    """MODEL: a whole Hugging Face folder, a GGUF file, or a name that the hub may have; SpecError otherwise."""
    folder = Path(path).expanduser()
    if folder.is_file():
        if folder.suffix.lower() != ".gguf":
            raise SpecError(
                f"{path}: expected a Hugging Face model folder, a GGUF file or a hub name, got another file"
            )
        return path
    if not folder.is_dir():
        if is_hub_name(path):
            hub.expect(path, "models")
            return path
        raise SpecError(f"{path}: no such model; expected a Hugging Face model folder, a GGUF file or a hub name")
    _config(folder)
    missing = [name for name in _weights(folder) if not (folder / name).is_file()]
    if missing:
        raise SpecError(f"{path}: {missing[0]} is missing; copy the whole model folder")
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise SpecError(f"{path}: the tokenizer is missing; expected one of {', '.join(TOKENIZERS)} in the folder")
    return path


def context(model_path: str, max_length: int) -> None:
    """SpecError when the model's configuration says that it reads fewer tokens than `--max-length`."""
    folder = Path(model_path).expanduser()
    config = _config(folder) if folder.is_dir() else {}
    longest = config.get("max_position_embeddings", config.get("n_positions"))
    if isinstance(longest, int) and max_length > longest:
        raise SpecError(
            f"--max-length is {max_length}, but {model_path} reads at most {longest} tokens; give at most that"
        )


def layers(model_path: str, include: str | None, exclude: str | None) -> None:
    """LayerError when the patterns surely match no layer, going by the names in the checkpoint; else says nothing."""
    keep, drop = pattern("--layers", include), pattern("--exclude", exclude)
    folder = Path(model_path).expanduser()
    if keep is None or not folder.is_dir():
        return
    names = sorted({name.rpartition(".")[0] for file in _weights(folder) for name in _tensor_names(folder / file)})
    if not any(name.startswith(FULL_NAMES) for name in names) or any("expert" in name for name in names):
        return  # loading renames these: no sure judgement
    # a tied head has no tensor of its own
    matched = [name for name in (*names, "lm_head") if keep.search(name) and not (drop and drop.search(name))]
    if not matched:
        shown = ", ".join(names[1:4])
        without = f" without --exclude {exclude!r}" if exclude else ""
        raise LayerError(f"--layers {include!r}{without} matches no layer of {model_path}; its layers are {shown}, …")


def place(path: str, wanted: dict[str, Any], num_members: int = 1) -> str:
    """Where an index shall go: absent, empty, or begun by the same options, which `wanted` has as fields of the spec;
    or an ensemble of `num_members` of them.

    Raises FormatError for a directory of other things, MismatchError naming the first option that differs.
    """
    store = Store(path)
    there = is_ensemble(store)
    if there and num_members == 1:
        raise FormatError(f"{path}: holds an ensemble of checkpoints, not one index; give another --out")
    if not there and num_members > 1 and store.exists("spec.json"):
        raise FormatError(f"{path}: holds one index, not an ensemble of checkpoints; give another --out")
    if num_members > 1:
        for number in range(num_members):
            place(str(store.child(member_place(number))), wanted)
        if not there and "://" not in path and Path(path).expanduser().is_dir():
            _refuse_foreign(path)
        return path
    if "://" not in path and Path(path).expanduser().is_file():
        raise FormatError(f"{path}: is a file; --out needs a directory")
    if not store.exists("spec.json"):
        if "://" not in path and Path(path).expanduser().is_dir():
            _refuse_foreign(path)
        return path
    try:
        head = json.loads(store.get("spec.json"))
        kind, spec = head["kind"], head["spec"]
    except (ValueError, KeyError, TypeError) as e:
        mend = "delete spec.json and manifest.json there, then run the same command again to restore it"
        raise FormatError(f"{path}/spec.json: not readable as a spec; {mend}, or give another --out") from e
    if kind != "index":
        raise FormatError(f"{path}: holds {kind!r}, not an index; give another --out")
    for field, value in _flat(wanted):
        stored = _get(spec, field)
        if stored != value:
            raise MismatchError(
                f"{path}: {field}: expected {stored!r} as the index there has, got {value!r}; give another --out"
            )
    return path


def index(path: str) -> Index:
    """A finished index; FormatError says whether the directory is absent, another thing, or unfinished."""
    return Index.open(directory(path))


def ensemble(path: str) -> Ensemble:
    """A finished ensemble, or index as the only member of one; FormatError as for `index`."""
    return Ensemble.open(directory(path))


def directory(path: str, kind: str = "index") -> str:
    """A directory of this kind that is there; FormatError otherwise. Damage in it is for `verify` to find."""
    if "://" not in path and not Path(path).expanduser().is_dir():
        raise FormatError(f"{path}: no such {kind}; make it with `influent {MAKES[kind].format(path)}`")
    return path


def same_model(opened: Index, path: str | None) -> str:
    """The model to load for queries: `path`, or the one noted in the index.

    Raises MismatchError when its config.json has other sizes than the model that the index was built with.
    """
    noted = opened.notes.get("model")
    if path is None and not isinstance(noted, str):
        raise SpecError(f"{opened.path}: the index does not say where its model is; give --model")
    try:
        found = model(path or str(noted))
    except SpecError as e:
        hint = "" if path else f"; {opened.path} was built with it: give --model"
        raise SpecError(f"{e}{hint}") from e
    folder = Path(found).expanduser()
    if folder.is_dir():
        config = _config(folder)
        for name, value in (opened.notes.get("model_config") or {}).items():
            if name in config and config[name] != value:
                raise MismatchError(
                    f"{found}: {name}: the index {opened.path} was built with {value}, this model has {config[name]}"
                )
    return found


def same_models(opened: Ensemble, paths: Sequence[str] | None) -> list[str]:
    """The model to load for each member; SpecError for another number of them, else as `same_model`."""
    given = list(paths or [None] * len(opened.members))
    if len(given) != len(opened.members):
        raise SpecError(
            f"{opened.path}: expected --model {len(opened.members)} times, once a checkpoint, got {len(given)}"
        )
    return [same_model(member, path) for member, path in zip(opened.members, given, strict=True)]


def asked(prompt: str | None, completion: str | None, file: str | None) -> None:
    """SpecError unless the query is given in exactly one way."""
    if file is not None and (prompt is not None or completion is not None):
        raise SpecError("give --prompt and --completion, or --queries, not both")
    if file is None and (prompt is None or completion is None):
        raise SpecError("give --prompt and --completion, or --queries FILE")
    if file is None and not (completion or "").strip():
        raise SpecError("--completion: expected the text whose cause is asked for, got an empty one")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise SpecError(f"{folder}: config.json is missing; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise SpecError(f"{path}: not JSON ({e}); copy the model folder again") from e
    if not isinstance(config, dict):
        raise SpecError(f"{path}: expected a JSON object; copy the model folder again")
    return config


def _weights(folder: Path) -> list[str]:
    listing = folder / "model.safetensors.index.json"
    if listing.is_file():
        try:
            return sorted(set(json.loads(listing.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise SpecError(f"{listing}: not a list of weights ({e}); copy the model folder again") from e
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        pickled = any(folder.glob("*.bin"))
        why = "only pickled weights (.bin), which are never loaded; convert them" if pickled else "no weights"
        raise SpecError(f"{folder}: has {why}; expected model.safetensors")
    return found


def _tensor_names(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        try:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, 1 << 27)))
        except (struct.error, ValueError) as e:
            raise SpecError(f"{path}: not a safetensors file; copy the model folder again") from e
    return (name for name in header if name != "__metadata__")


def _refuse_foreign(path: str) -> None:
    # an index killed before its spec was written, or whose damaged spec and manifest were deleted as verify says
    ours = ("catalog.parquet", "catalog.json", "bases", "shards", "curvature")
    folder = Path(path).expanduser()
    begun = any((folder / name).is_file() for name in ours) or any(folder.glob("shards/*.safetensors"))
    kept = ours if begun else ()  # a folder that is only called shards is anyone's
    others = sorted(p.name for p in folder.iterdir() if p.name not in kept)
    others = [name for name in others if not (name.endswith(UNFINISHED) or (begun and _LATER_PART.fullmatch(name)))]
    if others:
        raise FormatError(f"{path}: not an index, and not empty: it holds {others[0]}; give another --out")


def _flat(wanted: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in wanted.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None:
            yield prefix + name, value


def _get(spec: Any, field: str) -> Any:
    for name in field.split("."):
        spec = spec.get(name) if isinstance(spec, dict) else None
    return spec
