"""Whether the Hugging Face hub may have a name, asked in a few milliseconds instead of after importing its client.

Does: refuse a misspelt name, or any uncached name when there is no network, before anything heavy is imported. Does
not: download, or decide for private names: where a token is set up, the loader has the last word.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from influent.errors import DataError, SpecError

SECONDS = 10.0
TRUE = ("1", "on", "yes", "true")


def expect(name: str, kind: Literal["models", "datasets"]) -> None:
    """Return when the hub, or its cache on this machine, may have `name`.

    Raises SpecError for a model, DataError for a data set, that is in neither.
    """
    name = name.split(":", 1)[0]
    if _cached(name, kind):
        return
    reason = _refusal(name, kind)
    if reason is not None:
        error, what = (SpecError, "model") if kind == "models" else (DataError, "data set")
        raise error(f"{name}: no such file or folder, and no such {what} on the Hugging Face hub ({reason})")


def _cached(name: str, kind: str) -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    prepared = Path(os.environ.get("HF_DATASETS_CACHE", home / "datasets")).expanduser()
    if (hub / f"{kind}--{name.replace('/', '--')}").is_dir():
        return True
    return kind == "datasets" and (prepared / name.replace("/", "___")).is_dir()


def _refusal(name: str, kind: str) -> str | None:
    """Why there is no such name, or None when there may be."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        return "HF_HUB_OFFLINE is set and it is not in the cache"
    import urllib.error  # a sixth of what `influent --help` takes, were it imported with this module
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    request = urllib.request.Request(f"{endpoint}/api/{kind}/{name}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=SECONDS):
            return None
    except urllib.error.HTTPError as e:
        # the hub answers 401 for a private name and for one that does not exist
        unknown = e.code == 404 or (e.code == 401 and not _has_token())
        return f"it answers {e.code}" if unknown else None
    except (OSError, ValueError) as e:
        return f"{endpoint} cannot be reached: {getattr(e, 'reason', e)}"


def _has_token() -> bool:
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    path = Path(os.environ.get("HF_TOKEN_PATH", home / "token")).expanduser()
    return bool(os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")) or path.is_file()
