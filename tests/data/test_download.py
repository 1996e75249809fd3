"""Downloads from a server on this machine: whole, broken off, changed meanwhile, gone, damaged."""

import hashlib
import io
import json
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from megatron.data.corpora.download import ATTEMPTS, DownloadSource, fetch, read_sums
from megatron.errors import RunError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """What the server does. break_after: bytes of an answer after which it drops the connection, one for each answer,
    None for none. codes: answers that are refused first. ranges: whether it knows ranges. tag: the ETag.
    """

    def __init__(self):
        self.content, self.tag, self.ranges, self.length = CONTENT, '"1"', True, True
        self.break_after, self.codes, self.asked = [], [], []


@contextmanager
def serving():
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.asked.append((self.path, self.headers.get("Range")))
            if server.codes:
                self.send_error(server.codes.pop(0))
                return
            start, complete = 0, len(server.content)
            expected = self.headers.get("Range")
            if expected and server.ranges and self.headers.get("If-Range") == server.tag:
                start = int(expected.removeprefix("bytes=").removesuffix("-"))
                if start >= complete:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{complete}")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{complete - 1}/{complete}")
            else:
                self.send_response(200)
            if server.length:
                self.send_header("Content-Length", str(complete - start))
            else:
                self.send_header("Connection", "close")
            if server.tag:
                self.send_header("ETag", server.tag)
            self.end_headers()
            stop = server.break_after.pop(0) if server.break_after else None
            self.wfile.write(server.content[start : complete if stop is None else start + stop])
            self.close_connection = stop is not None or not server.length

        def log_message(self, *_):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{made.server_port}"
    try:
        yield server
    finally:
        made.shutdown()
        made.server_close()


@pytest.fixture
def server():
    with serving() as made:
        yield made


def bring(server, folder, *, sha256=None, urls=None, **settings):
    source = DownloadSource("file.bin", urls or (f"{server.url}/file.bin",), sha256)
    return fetch(source, folder, first_wait=0.001, **settings)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_full_file(server, tmp_path):
    seen = []
    assert bring(server, tmp_path / "new", sha256=DIGEST, report=seen.append) == DIGEST
    assert (tmp_path / "new/file.bin").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["SHA256SUMS", "file.bin"]
    assert (tmp_path / "new/SHA256SUMS").read_text() == f"{DIGEST}  file.bin\n"
    assert (seen[-1].done, seen[-1].total) == (len(CONTENT), len(CONTENT))


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    bring(server, tmp_path)
    assert bring(server, tmp_path) == DIGEST
    assert len(server.asked) == 1
    bring(server, tmp_path, again=True)
    assert len(server.asked) == 2


def test_a_transfer_goes_on_where_it_broke_off(server, tmp_path):
    server.break_after = [1_000_000, 2_000_000]
    assert bring(server, tmp_path, sha256=DIGEST) == DIGEST
    assert [expected for _, expected in server.asked] == [None, "bytes=1000000-", "bytes=3000000-"]


def test_a_later_run_goes_on(server, tmp_path):
    server.break_after = [1_000_000] + [0] * ATTEMPTS
    with pytest.raises(RunError, match="ended after 1,000,000 of 5,120,000 bytes"):
        bring(server, tmp_path)
    assert names(tmp_path) == ["file.bin.part", "file.bin.part.json"]
    assert bring(server, tmp_path) == DIGEST
    assert server.asked[-1][1] == "bytes=1000000-"


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server, tmp_path):
    server.break_after = [1_000_000] + [0] * ATTEMPTS
    with pytest.raises(RunError):
        bring(server, tmp_path)
    server.content, server.tag = CONTENT[::-1], '"2"'
    assert bring(server, tmp_path) == hashlib.sha256(CONTENT[::-1]).hexdigest()


@pytest.mark.parametrize("change", [{"ranges": False}, {"tag": None}, {"tag": 'W/"weak"'}])
def test_servers_that_cannot_go_on(server, tmp_path, change):
    vars(server).update(change)
    server.break_after = [1_000_000]
    assert bring(server, tmp_path) == DIGEST
    assert (tmp_path / "file.bin").read_bytes() == CONTENT


def test_a_part_that_was_complete_already(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    (tmp_path / "file.bin.part.json").write_text(json.dumps({"url": f"{server.url}/file.bin", "validator": '"1"'}))
    assert bring(server, tmp_path) == DIGEST


def test_a_server_that_does_not_say_the_length(server, tmp_path):
    server.length = False
    assert bring(server, tmp_path, sha256=DIGEST) == DIGEST


def test_a_busy_server_is_asked_again(server, tmp_path):
    server.codes = [503, 429]
    assert bring(server, tmp_path) == DIGEST


def test_a_source_that_is_gone_says_what_to_do(server, tmp_path):
    server.codes = [404, 410]
    urls = (f"{server.url}/a", f"{server.url}/b")
    with pytest.raises(RunError) as caught:
        bring(server, tmp_path, sha256=DIGEST, urls=urls)
    reported = str(caught.value)
    assert f"{urls[0]}: HTTP 404 Not Found; {urls[1]}: HTTP 410 Gone" in reported
    assert "gone for good" in reported
    assert "--mirror" in reported
    assert DIGEST in reported
    assert len(server.asked) == 2, "what is gone is not asked for again"


def test_the_next_source_is_tried(server, tmp_path):
    server.codes = [403]
    assert bring(server, tmp_path, urls=(f"{server.url}/a", f"{server.url}/b")) == DIGEST
    assert [path for path, _ in server.asked] == ["/a", "/b"]


def test_no_server_at_all(tmp_path):
    with serving() as server:
        url = f"{server.url}/file.bin"
    with pytest.raises(RunError, match="refused"):
        bring(None, tmp_path, urls=(url,))


def test_a_folder_instead_of_a_server(server, tmp_path):
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "file.bin").write_bytes(CONTENT)
    there = (tmp_path / "mirror" / "file.bin").as_uri()
    assert bring(server, tmp_path / "a", urls=(there, f"{server.url}/x")) == DIGEST
    missing = (tmp_path / "nowhere" / "file.bin").as_uri()
    assert bring(server, tmp_path / "b", urls=(missing, f"{server.url}/x")) == DIGEST
    assert len(server.asked) == 1


def test_a_wrong_checksum_keeps_nothing(server, tmp_path):
    with pytest.raises(RunError, match=f"its SHA-256 is {DIGEST}, not the {'0' * 64}"):
        bring(server, tmp_path, sha256="0" * 64)
    assert not (tmp_path / "file.bin").exists()
    assert not (tmp_path / "file.bin.part").exists()


def test_the_sums_of_a_folder_pin_its_files(server, tmp_path):
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64} *file.bin\n")
    with pytest.raises(RunError, match="SHA256SUMS gives"):
        bring(server, tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{DIGEST} *file.bin\n{'1' * 64}  other\n")
    bring(server, tmp_path)
    assert read_sums(tmp_path) == {"file.bin": DIGEST, "other": "1" * 64}


def test_a_file_that_a_user_put_there_is_checked(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"something else")
    with pytest.raises(RunError, match="fetch it again with -f"):
        bring(server, tmp_path, sha256=DIGEST)
    (tmp_path / "file.bin").write_bytes(CONTENT)
    assert bring(server, tmp_path, sha256=DIGEST) == DIGEST
    assert server.asked == []


def test_a_published_sum_of_a_zip_member(server, tmp_path):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("inside", b"words")
    server.content = packed.getvalue()
    good = hashlib.sha1(b"words").hexdigest()
    source = DownloadSource("x.zip", (f"{server.url}/x.zip",), member_sha1=("inside", good))
    fetch(source, tmp_path / "a", first_wait=0.001)
    for member in (("inside", "0" * 40), ("other", good)):
        with pytest.raises(RunError, match=r"published|no whole zip file"):
            fetch(DownloadSource("x.zip", source.urls, member_sha1=member), tmp_path / "b", first_wait=0.001)
    assert not (tmp_path / "b/x.zip").exists()


def test_a_full_disk_is_reported(server, tmp_path, monkeypatch):
    from megatron.data.corpora import download

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left.*goes on from here"):
        bring(server, tmp_path)
