"""The hub check against a server of our own: no network."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from influent.errors import DataError, SpecError
from influent.hub import expect


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        known = {"/api/models/owner/real": 200, "/api/datasets/owner/real": 200, "/api/models/owner/down": 503}
        self.send_response(known.get(self.path, 404 if "gone" in self.path else 401))
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the cache, with a server at the endpoint."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_TOKEN_PATH", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    yield tmp_path
    server.shutdown()
    server.server_close()


def test_what_the_hub_answers_decides(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expect("owner/real", "models")
    expect("owner/real:config:train", "datasets")
    expect("owner/down", "models")  # not for us to say: the loader has retries and words for it
    with pytest.raises(SpecError, match="gone: no such file or folder, and no such model on .* answers 404"):
        expect("gone", "models")
    with pytest.raises(DataError, match="no such data set on .* answers 401"):
        expect("owner/private", "datasets")
    monkeypatch.setenv("HF_TOKEN", "x")
    expect("owner/private", "datasets")


def test_the_cache_answers_without_a_network(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hub / "hub" / "models--owner--mine").mkdir(parents=True)
    (hub / "datasets" / "owner___mine").mkdir(parents=True)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the discard port: nobody listens
    expect("owner/mine", "models")
    expect("owner/mine", "datasets")
    with pytest.raises(SpecError, match="cannot be reached"):
        expect("owner/real", "models")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="HF_HUB_OFFLINE is set and it is not in the cache"):
        expect("owner/real", "datasets")
