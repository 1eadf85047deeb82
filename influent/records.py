"""Reading data: files, folders, hub data sets and iterables become checked examples, one at a time.

Does: JSONL, CSV, Parquet, Arrow, plain text; every refusal names the file and line. Does not: tokenise, keep anything,
or guess. A record is exactly one of `{"text"}`, `{"prompt", "completion"}`, `{"messages"}`, plus an optional `id`,
`source` and `provider`; other fields are ignored. Blank lines of a JSONL file are no records.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from influent.errors import DataError

TYPE_NAMES = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
BOM = b"\xef\xbb\xbf"
FIELDS = ("text", "prompt", "completion", "messages", "id", "source", "provider")
EXPECTED = '"text", "prompt" and "completion", or "messages"'
BATCH_ROWS = 1024  # rows of a columnar file held at once


@dataclass(frozen=True, slots=True)
class Record:
    """One raw record and where it stands: `line` counts from 1 (lines of text, rows of a columnar file)."""

    file: str
    line: int
    fields: Mapping[str, Any]
    source: str  # what `source` defaults to: the file's name, or its path inside the folder given
    ref: str | None  # "absolute path:byte offset" where the record can be read again, else None

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Example:
    """A checked record. `content` has the keys of one kind only; `skip` says why it cannot be a row, if it cannot."""

    where: str
    content: dict[str, Any]
    id: str | None
    source: str
    provider: str | None
    ref: str | None
    skip: str | None


def read_examples(data: object, *, limit: int | None = None) -> Iterator[Example]:
    """Checked examples of `data` in order, those to be skipped included; at most `limit` that are not skipped.

    `data`: a path, a folder, a hub name (`NAME[:CONFIG[:SPLIT]]`), a `datasets.Dataset`, or an iterable of dicts.
    Raises DataError with file and line.
    """
    kept = 0
    for record in read_records(data):
        if limit is not None and kept >= limit:
            return
        example = check(record)
        kept += example.skip is None
        yield example


def read_records(data: object) -> Iterator[Record]:
    """Raw records of `data` in order; see `read_examples`."""
    if isinstance(data, str | os.PathLike):
        name = os.fspath(data)
        if is_hub_name(name):
            yield from _hub(name)
            return
        for path, source in files_of(name):
            yield from _file(path, source)
    elif isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise DataError(f"data: expected a path, a data set or an iterable of dicts, got {type(data).__name__}")
    else:
        for number, fields in enumerate(data, 1):
            if not isinstance(fields, Mapping):
                raise DataError(f"record {number}: expected a mapping with {EXPECTED}, got {type(fields).__name__}")
            yield Record("record", number, fields, "memory", None)


def read_ref(ref: str) -> dict[str, Any]:
    """The content at a `Record.ref`. Raises DataError when the file no longer holds a record there."""
    path, _, offset = ref.rpartition(":")
    with _open(path) as stream:
        stream.seek(int(offset))
        try:
            for line, fields, _ in _LINE_READERS[Path(path).suffix.lower()](stream, path):
                return check(Record(path, line, fields, path, ref)).content
        except DataError as e:
            raise DataError(f"{ref}: no record starts here; the file has changed since it was indexed") from e
    raise DataError(f"{ref}: nothing is left at this offset; the file has changed since it was indexed")


def content_hash(content: dict[str, Any]) -> str:
    """blake2b-128, in hex, of an example's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def display_text(content: dict[str, Any]) -> str:
    """An example as one readable string: what is shown to people and what BM25 reads."""
    if "text" in content:
        return content["text"]
    if "messages" in content:
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in content["messages"])
    prompt, completion = content["prompt"], content["completion"]
    return prompt + ("" if prompt[-1:].isspace() or completion[:1].isspace() else " ") + completion


def is_hub_name(name: str) -> bool:
    """Whether `name` can only be a hub name: `name` or `owner/name`, and nothing about it looks like a path."""
    head = name.split(":", 1)[0]
    path = Path(head).expanduser()
    looks_like_path = (
        "://" in name
        or head[:1] in ("", ".", "/", "~")
        or head.count("/") > 1
        or path.suffix.lower() in (*READERS, ".gguf")
        or ("/" in head and path.parent.is_dir())  # docs/dta with an existing docs/ is a slip of the pen
    )
    return not looks_like_path and not Path(name).exists()


def files_of(name: str) -> list[tuple[str, str]]:
    """(path, source) of every data file that `name` stands for, in a fixed order. Raises DataError if there is none."""
    if "://" in name:
        return [(name, name.rsplit("/", 1)[-1])]
    root = Path(name).expanduser()
    if not root.exists():
        raise DataError(
            f"{name}: no such file or folder; expected a data file ({', '.join(READERS)}) or a folder of them"
        )
    if root.is_file():
        return [(str(root), root.name)]
    if (root / "dataset_dict.json").is_file():
        raise DataError(f"{name}: a saved data set with several splits; give the folder of one split")
    suffixes = {".arrow"} if (root / "dataset_info.json").is_file() else set(READERS)
    files = (path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in suffixes)
    found = sorted(p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts))
    if not found:
        raise DataError(f"{name}: the folder holds no data file; expected one of {', '.join(READERS)}")
    return [(str(path), path.relative_to(root).as_posix()) for path in found]


def check(record: Record) -> Example:
    """Validate one record. Raises DataError naming its file and line, what was expected and what it holds."""
    fields = {name: value for name, value in record.fields.items() if value is not None}
    kinds = [kind for kind in (("text",), ("prompt", "completion"), ("messages",)) if all(k in fields for k in kind)]
    if not kinds:
        got = ", ".join(f'"{k}"' + (" (null)" if v is None else "") for k, v in record.fields.items()) or "no field"
        raise DataError(f"{record.where}: expected {EXPECTED}, got {got}")
    if len(kinds) > 1:
        both = " and ".join("/".join(kind) for kind in kinds)
        raise DataError(
            f"{record.where}: expected one of {EXPECTED}, got both {both}; keep the one the model trained on"
        )
    content = {name: fields[name] for name in kinds[0]}
    skip = _messages(record, content) if "messages" in content else _strings(record, content)
    return Example(
        where=record.where,
        content=content,
        id=_label(record, fields, "id"),
        source=_label(record, fields, "source") or record.source,
        provider=_label(record, fields, "provider"),
        ref=record.ref,
        skip=skip,
    )


def _strings(record: Record, content: dict[str, Any]) -> str | None:
    for name, value in content.items():
        if not isinstance(value, str):
            raise DataError(f'{record.where}: expected a string in "{name}", got {_kind(value)}')
        _unicode(record, name, value)
    target = content["completion"] if "completion" in content else content["text"]
    return None if target.strip() else "empty"


def _messages(record: Record, content: dict[str, Any]) -> str | None:
    turns = content["messages"]
    if not isinstance(turns, list):
        raise DataError(f'{record.where}: expected a list in "messages", got {_kind(turns)}')
    for number, turn in enumerate(turns, 1):
        for name in ("role", "content"):
            value = turn.get(name) if isinstance(turn, Mapping) else turn
            if not isinstance(turn, Mapping) or not isinstance(value, str):
                what = f'"{name}"' if isinstance(turn, Mapping) else 'an object with "role" and "content"'
                raise DataError(f"{record.where}: message {number}: expected {what} as a string, got {_kind(value)}")
            _unicode(record, "messages", value)
    content["messages"] = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    if all(not turn["content"].strip() for turn in turns):
        return "empty"
    targets = [turn for turn in turns if turn["role"] == "assistant" and turn["content"].strip()]
    return None if targets else "no assistant message"


def _label(record: Record, fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f'{record.where}: expected a string or an integer in "{name}", got {_kind(value)}')
    _unicode(record, name, str(value))
    return str(value)


def _unicode(record: Record, name: str, value: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as e:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        raise DataError(
            f'{record.where}: "{name}" holds half a surrogate pair at character {e.start}; remove it'
        ) from e


def _kind(value: object) -> str:
    return "null" if value is None else TYPE_NAMES.get(type(value), type(value).__name__)


def _open(path: str) -> BinaryIO:
    try:
        if "://" in path:
            import fsspec

            return fsspec.open(path, "rb").open()  # pyright: ignore[reportReturnType, reportAttributeAccessIssue]
        return Path(path).open("rb")
    except (OSError, ValueError, ImportError) as e:
        raise DataError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e})") from e


def _file(path: str, source: str) -> Iterator[Record]:
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{path}: unknown kind of data file; expected one of {', '.join(READERS)}, got {suffix or 'none'}"
        )
    absolute = path if "://" in path else str(Path(path).resolve())
    with _open(path) as stream:
        for line, fields, offset in READERS[suffix](stream, path):
            yield Record(path, line, fields, source, None if offset is None else f"{absolute}:{offset}")


Row = tuple[int, Mapping[str, Any], int | None]  # line, fields, byte offset


def _decode(raw: bytes, path: str, line: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        got = f"byte 0x{raw[e.start]:02x} at column {e.start + 1}"
        raise DataError(f"{path}:{line}: not UTF-8: got {got}; convert the file to UTF-8") from e


def _lines(stream: BinaryIO, path: str) -> Iterator[tuple[int, str, int]]:
    offset = stream.tell()
    for line, raw in enumerate(stream, 1):
        yield line, _decode(raw.removeprefix(BOM) if offset == 0 else raw, path, line), offset
        offset += len(raw)


def _jsonl(stream: BinaryIO, path: str) -> Iterator[Row]:
    for line, text, offset in _lines(stream, path):
        if not text.strip():
            continue
        try:
            fields = json.loads(text.rstrip("\r\n"))  # so that an error at its end is not one at column 0
        except (ValueError, RecursionError) as e:
            why = f"{e.msg} at column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
            raise DataError(f"{path}:{line}: not JSON ({why}); expected one JSON object per line") from e
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{line}: expected a JSON object per line, got {_kind(fields)}")
        yield line, fields, offset


def _paragraphs(stream: BinaryIO, path: str) -> Iterator[Row]:
    part: list[str] = []
    start, start_offset = 0, 0
    for line, text, offset in _lines(stream, path):
        if not text.strip():
            if part:
                yield start, {"text": "".join(part).rstrip()}, start_offset
            part = []
        else:
            if not part:
                start, start_offset = line, offset
            part.append(text)
    if part:
        yield start, {"text": "".join(part).rstrip()}, start_offset


def _csv(stream: BinaryIO, path: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a document is often longer than csv's 128 KiB
    rows = csv.reader((text for _, text, _ in _lines(stream, path)), strict=True)
    try:
        header = next(rows, [])
        first = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise DataError(f"{path}:{first}: expected {len(header)} columns as in the header, got {len(row)}")
            if row:
                yield first, dict(zip(header, row, strict=True)), None
            first = rows.line_num + 1
    except csv.Error as e:
        raise DataError(f"{path}:{rows.line_num}: not CSV ({e})") from e


def _parquet(stream: BinaryIO, path: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        columns = _columns(file.schema_arrow.names, path)
        yield from _batches(file.iter_batches(batch_size=BATCH_ROWS, columns=columns), path)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable Parquet file ({str(e).splitlines()[0]})") from e


def _arrow(stream: BinaryIO, path: str) -> Iterator[Row]:
    import pyarrow as pa

    try:
        magic = stream.read(6)
        stream.seek(0)
        if magic == b"ARROW1":
            file = pa.ipc.open_file(stream)
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
            names = file.schema.names
        else:  # the stream format, which `datasets` writes
            batches = pa.ipc.open_stream(stream)
            names = batches.schema.names
        columns = _columns(names, path)
        small = (b.slice(i, BATCH_ROWS) for b in batches for i in range(0, b.num_rows, BATCH_ROWS))
        yield from _batches((b.select(columns) for b in small), path)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path}: not a readable Arrow file ({str(e).splitlines()[0]})") from e


def _columns(names: list[str], path: str) -> list[str]:
    columns = [name for name in names if name in FIELDS]
    if not columns:
        raise DataError(f"{path}: expected columns {EXPECTED}, got {', '.join(names) or 'none'}")
    return columns


def _batches(batches: Iterable[Any], path: str) -> Iterator[Row]:
    row = 0
    for batch in batches:
        for i in range(batch.num_rows):
            row += 1
            try:
                (fields,) = batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as e:
                raise DataError(f"{path}:{row}: not UTF-8; convert the column to UTF-8 strings") from e
            yield row, fields, None


def _hub(name: str) -> Iterator[Record]:
    from datasets import load_dataset

    head, config, split = (*name.split(":"), "", "")[:3]
    try:
        rows = load_dataset(head, config or None, split=split or "train", streaming=True)
        for number, fields in enumerate(rows, 1):
            yield Record(name, number, fields, head, None)
    except (OSError, ValueError, RuntimeError) as e:
        why = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise DataError(f"{name}: neither a file nor a data set that the hub could give ({why})") from e


READERS: dict[str, Callable[[BinaryIO, str], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".json": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".txt": _paragraphs,
}
_LINE_READERS = {suffix: READERS[suffix] for suffix in (".jsonl", ".json", ".txt")}
