import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from toco_core.config import ModelConfig
from toco_core.errors import ToCoError
from toco_core.machine import hub
from toco_core.model import ToCo
from toco_core.runs.hub import from_pretrained


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def host():
    """A host that answers HEAD with a status, or only after a while."""

    class Handler(BaseHTTPRequestHandler):
        status, after = 200, 0.0

        def do_HEAD(self):  # noqa: N802
            time.sleep(self.after)
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Handler
    server.shutdown()
    server.server_close()


def test_whoever_answers_is_there(host, monkeypatch):
    address, handler = host
    for status, there in ((200, True), (404, True), (401, True), (503, False), (502, False)):
        handler.status = status
        assert hub.answers(address) == there, status
    monkeypatch.setattr(hub, "SECONDS", 0.2)
    handler.status, handler.after = 200, 0.6
    assert not hub.answers(address)
    assert not hub.answers("http://127.0.0.1:9")


def test_the_setting_of_before_comes_back(host, monkeypatch):
    address, _ = host
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    with hub.quick_hub():
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(KeyError), hub.quick_hub():
        assert constants.HF_HUB_OFFLINE
        raise KeyError
    assert not constants.HF_HUB_OFFLINE


def test_without_a_network_it_is_told_in_seconds(monkeypatch, tmp_path):
    """It took 72 s."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(
        ToCoError,
        match="fetched .the Hugging Face Hub cannot be reached, and its cache .* copy the file to this machine",
    ) as told:
        ToCo(ModelConfig(backbone="vit_tiny_patch16_224"), 2)
    with pytest.raises(ToCoError, match="'some/model' is no folder, and no repository of the Hub"):
        from_pretrained("some/model")
    assert time.monotonic() - began < 30 and "\n" not in str(told.value)
