import fcntl
import hashlib
import json
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from datamodules import download as module
from datamodules.download import command, download, verify
from lit_wm.errors import DataError

BODY = b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 4000
SIZE = len(BODY)


class Server:
    """A web server with one file and the faults it is told to have."""

    def __init__(self):
        server = self
        self.body, self.ranges, self.cut, self.status, self.type = (
            BODY,
            True,
            [],
            200,
            "application/octet-stream",
        )
        self.tag, self.asked, self.lie = '"one"', [], False

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/data.hdf5"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request):
        given = request.headers.get("Range")
        self.asked.append(given)
        start, size = 0, len(self.body)
        if self.status != 200:
            request.send_error(self.status)
            return
        matches = request.headers.get("If-Range") in (None, self.tag)
        if given and self.ranges and matches:
            start = int(re.fullmatch(r"bytes=(\d+)-", given)[1]) + self.lie
            if start >= size:
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{size}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(size - start))
        request.send_header("Content-Type", self.type)
        request.send_header("ETag", self.tag)
        request.end_headers()
        stop = self.cut.pop(0) if self.cut else size
        request.wfile.write(self.body[start:stop])
        request.wfile.flush()
        if stop < size:
            request.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "_WAIT", 0.0)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def files(path):
    return sorted(p.name for p in path.parent.iterdir())


def test_a_file_arrives_with_its_checksum(server, tmp_path):
    path = tmp_path / "new" / "data.hdf5"
    assert download(server.url, path, magic=BODY[:8]) == path
    assert path.read_bytes() == BODY
    assert files(path) == ["data.hdf5", "data.hdf5.sha256"]
    assert (
        tmp_path / "new/data.hdf5.sha256"
    ).read_text() == f"{hashlib.sha256(BODY).hexdigest()}  data.hdf5\n"
    download(server.url, path)  # there already
    assert server.asked == [None]


def test_an_interrupted_transfer_goes_on(server, tmp_path):
    server.cut = [300_000, 700_000]
    path = download(server.url, tmp_path / "data.hdf5")
    assert path.read_bytes() == BODY
    assert server.asked[0] is None
    assert len(server.asked) == 3
    assert all(re.fullmatch(r"bytes=[1-9]\d*-", asked) for asked in server.asked[1:])


def test_a_later_call_goes_on(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TRIES", 1)
    path = tmp_path / "data.hdf5"
    server.cut = [400_000] + [0] * 9
    with pytest.raises(DataError, match=r"cannot be fetched after 400,000 bytes, which are kept"):
        download(server.url, path)
    assert files(path) == ["data.hdf5.part", "data.hdf5.part.json"]
    server.cut, server.asked = [], []
    assert download(server.url, path).read_bytes() == BODY
    assert server.asked == ["bytes=400000-"]
    assert files(path) == ["data.hdf5", "data.hdf5.sha256"]


def test_a_part_that_is_whole_already(server, tmp_path):
    path = tmp_path / "data.hdf5"
    part(path, BODY, server.url)
    assert download(server.url, path).read_bytes() == BODY


def part(path, content, url, tag='"one"', size=SIZE):
    path.with_name("data.hdf5.part").write_bytes(content)
    note = {"url": url, "tag": tag, "size": size}
    path.with_name("data.hdf5.part.json").write_text(json.dumps(note))


@pytest.mark.parametrize(
    "fault", ["no ranges", "other file", "other size", "no note", "other url", "too long"]
)
def test_what_does_not_fit_is_fetched_anew(server, tmp_path, fault):
    path = tmp_path / "data.hdf5"
    tag = '"two"' if fault == "other file" else '"one"'
    size = 99 if fault == "other size" else len(BODY)
    part(path, b"x" * (2_000_000 if fault == "too long" else 1000), server.url, tag, size)
    server.ranges = fault != "no ranges"
    if fault == "no note":
        path.with_name("data.hdf5.part.json").unlink()
    if fault == "other url":
        part(path, b"x" * 1000, "http://elsewhere/data.hdf5")
    assert download(server.url, path).read_bytes() == BODY
    assert files(path) == ["data.hdf5", "data.hdf5.sha256"]


def test_a_server_that_sends_another_part(server, tmp_path):
    path = tmp_path / "data.hdf5"
    part(path, BODY[:1000], server.url)
    server.lie = True
    assert download(server.url, path).read_bytes() == BODY


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    path = tmp_path / "data.hdf5"
    found = hashlib.sha256(BODY).hexdigest()
    with pytest.raises(DataError, match=f"checksum is {found}, expected 0{{64}}; .*deleted"):
        download(server.url, path, sha256="0" * 64)
    assert files(path) == []
    download(server.url, path, sha256=found.upper())
    path.write_bytes(BODY[:-1])
    with pytest.raises(DataError, match="damaged or was changed"):
        verify(path)
    with pytest.raises(DataError, match="damaged or was changed"):
        download(server.url, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"body": b"  <!DOCTYPE html><p>moved"}, "sent something else: b'  <!DOCTYPE"),
        ({"type": "text/html; charset=utf-8"}, r"sent a web page \(text/html\) instead of the data"),
        ({"body": b"PK\x03\x04" * 99}, "sent something else: b'PK"),
        ({"status": 404}, "the server answers 404 Not Found"),
        ({"status": 503}, r"cannot be fetched \(503"),
    ],
)
def test_other_answers_are_refused(server, tmp_path, change, message):
    vars(server).update(change)
    with pytest.raises(DataError, match=message):
        download(server.url, tmp_path / "data.hdf5", magic=BODY[:8])
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_command_for_another_machine_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(module, "_WAIT", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/a.hdf5"
    path = tmp_path / "a.hdf5"
    with pytest.raises(DataError, match="Connection refused") as error:
        download(url, path)
    assert command(url, path) == f"curl -fL -C - --create-dirs -o {path} {url}"
    assert command(url, path) in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match=r"expected http:// or https://"):
        download(f"file://{__file__}", path)


def test_two_processes_do_not_write_the_same_part(server, tmp_path):
    path = tmp_path / "data.hdf5"
    with open(tmp_path / "data.hdf5.part", "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is fetching"):
            download(server.url, path)
    assert download(server.url, path).read_bytes() == BODY


def test_a_full_disk_is_said_before_it_is_full(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match=r"needs 1,024,008 bytes, .* has 10 free"):
        download(server.url, tmp_path / "data.hdf5")
    assert list(tmp_path.iterdir()) == []
