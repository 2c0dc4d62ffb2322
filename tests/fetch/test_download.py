"""Downloads that break off, servers that misbehave, disks that are full."""

from __future__ import annotations

import argparse
import email.utils
import errno
import io
import os
import random
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runner import ROOT
from file_server import QUICK, Behaviour, Request, Server, etag, redirect, serve, stall, status, truncate

from mdistiller.fetch import download as module
from mdistiller.fetch.download import DownloadError, download
from mdistiller.files import file_sha256, writing
from mdistiller.registry import InputError

CONTENT = random.Random(0).randbytes(300_000)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.bin"


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_download(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    digest = download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT
    assert digest == file_sha256(target)
    assert leftovers(target) == []
    download(f"{server.url}/file", target, digest.upper())  # replaces, and compares


@pytest.mark.parametrize("breaking", [truncate(100_000), stall(100_000)], ids=["truncated", "stalled"])
def test_only_the_rest_is_transferred_again(server: Server, target: Path, breaking: Behaviour) -> None:
    server.files["/file"] = CONTENT
    server.script = [breaking, status(503), truncate(50_000)]
    download(f"{server.url}/file", target, **{**QUICK, "timeout": 0.3})
    assert target.read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-"]


def test_a_later_call_goes_on_where_an_earlier_one_stopped(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(200_000)]
    with pytest.raises(DownloadError, match=r"ended after 200000 of 300000 bytes, 1 times .* 0\.2 MB are kept"):
        download(f"{server.url}/file", target, attempts=1)
    assert leftovers(target) == ["file.bin.part", "file.bin.part.json"]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges[-1] == "bytes=200000-"
    assert target.read_bytes() == CONTENT
    assert leftovers(target) == []


def test_complete_but_not_yet_renamed(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/file"] = CONTENT
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download(f"{server.url}/file", target)
    download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT
    assert len(server.ranges) == 1


def changed_but_glued(request: Request, content: bytes) -> None:
    """A server that knows Range but not If-Range."""
    start = int(request.headers["Range"].removeprefix("bytes=").removesuffix("-"))
    span = f"bytes {start}-{len(content) - 1}/{len(content)}"
    request.begin(206, len(content) - start, ETag=etag(content), Content_Range=span)
    request.wfile.write(content[start:])


@pytest.mark.parametrize("answer", [serve, changed_but_glued], ids=["If-Range", "no If-Range"])
def test_a_changed_file_is_fetched_anew(server: Server, target: Path, answer: Behaviour) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", target, attempts=1)
    server.files["/file"] = changed = CONTENT[::-1]
    server.script = [answer]
    download(f"{server.url}/file", target, **QUICK)
    assert target.read_bytes() == changed


def test_another_address_is_another_file(server: Server, target: Path) -> None:
    server.files = {"/file": CONTENT, "/other": CONTENT}
    server.script = [truncate(100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", target, attempts=1)
    download(f"{server.url}/other", target)
    assert server.ranges == [None, None]


def test_a_server_that_ignores_range(server: Server, target: Path) -> None:
    def whole(request: Request, content: bytes) -> None:
        request.begin(200, len(content), ETag=etag(content))
        request.wfile.write(content)

    server.files["/file"] = CONTENT
    server.script = [truncate(100_000), whole]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges == [None, "bytes=100000-"]
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_without_a_validator_nothing_is_glued(server: Server, target: Path, tag: str | None) -> None:
    def unsure(request: Request, content: bytes) -> None:
        request.begin(200, len(content), **({"ETag": tag} if tag else {}))
        request.wfile.write(content[:1000])

    server.files["/file"] = CONTENT
    server.script = [unsure]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges == [None, None]
    assert target.read_bytes() == CONTENT


def test_a_date_is_a_validator(server: Server, target: Path) -> None:
    date = email.utils.formatdate(0, usegmt=True)
    seen = []

    def dated(request: Request, content: bytes) -> None:
        seen.append(request.headers.get("If-Range"))
        start = 1000 if seen[-1] else 0
        headers = {"Content_Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        request.begin(206 if start else 200, len(content) - start, Last_Modified=date, **headers)
        request.wfile.write(content[start:] if start else content[:1000])

    server.files["/file"] = CONTENT
    server.script = [dated, dated]
    download(f"{server.url}/file", target, **QUICK)
    assert seen == [None, date]
    assert target.read_bytes() == CONTENT


def test_chunked_transfer_without_length(server: Server, target: Path) -> None:
    def chunked(request: Request, content: bytes) -> None:
        request.protocol_version = "HTTP/1.1"
        request.begin(200, None, Transfer_Encoding="chunked")
        request.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(content), content))

    def broken(request: Request, content: bytes) -> None:
        request.protocol_version = "HTTP/1.1"
        request.begin(200, None, Transfer_Encoding="chunked", Connection="close")
        request.wfile.write(b"%x\r\n%s" % (len(content), content[:1000]))
        request.close_connection = True

    server.files["/file"] = CONTENT
    server.script = [broken, chunked]
    download(f"{server.url}/file", target, **QUICK)
    assert target.read_bytes() == CONTENT


def test_redirects_keep_the_range(server: Server, target: Path) -> None:
    server.files["/far"] = CONTENT
    server.script = [redirect(f"{server.url}/far"), truncate(100_000), redirect(f"{server.url}/far")]
    download(f"{server.url}/file", target, **QUICK)
    assert server.paths == ["/file", "/far", "/file", "/far"]
    assert server.ranges[-1] == "bytes=100000-"
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("to", "message"),
    [("/file", "infinite loop"), ("file:///etc/passwd", "refused|not allowed"), ("ftp://127.0.0.1/x", "refused")],
)
def test_redirects_that_are_not_followed(server: Server, target: Path, to: str, message: str) -> None:
    server.script = [redirect(to)] * 20
    with pytest.raises(DownloadError, match=message):
        download(f"{server.url}/file", target, **QUICK)
    assert leftovers(target) == []


def test_no_redirect_from_https_to_http() -> None:
    handler = module._Redirects()
    request = urllib.request.Request("https://example.org/file")
    with pytest.raises(urllib.error.HTTPError, match="refused"):
        handler.redirect_request(request, io.BytesIO(), 302, "Found", {}, "http://example.org/file")


@pytest.mark.parametrize("code", [403, 404, 410])
def test_refusals_are_final(server: Server, target: Path, code: int) -> None:
    server.script = [status(code)] * 2
    with pytest.raises(DownloadError, match=f"HTTP status {code}"):
        download(f"{server.url}/file", target, **QUICK)
    assert len(server.paths) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_passing_failures_are_tried_again(server: Server, target: Path, code: int) -> None:
    server.files["/file"] = CONTENT
    server.script = [status(code)] * 2
    download(f"{server.url}/file", target, **QUICK)
    server.script = [status(code)] * 9
    with pytest.raises(DownloadError, match=f"HTTP status {code} .*, 4 times in a row$"):
        download(f"{server.url}/file", target, **QUICK)


def test_a_range_that_the_server_does_not_have(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(100_000), status(416)]
    download(f"{server.url}/file", target, **QUICK)
    assert server.ranges == [None, "bytes=100000-", None]
    assert target.read_bytes() == CONTENT


def test_a_web_page_instead_of_the_file(server: Server, target: Path) -> None:
    def page(request: Request, content: bytes) -> None:
        request.begin(200, 5, Content_Type="text/html; charset=utf-8")
        request.wfile.write(b"<html")

    server.script = [page]
    with pytest.raises(DownloadError, match="web page instead of the file"):
        download(f"{server.url}/file", target, **QUICK)
    assert leftovers(target) == []


def test_wrong_bytes(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    with pytest.raises(DownloadError, match="not the expected file: its SHA-256 is"):
        download(f"{server.url}/file", target, "0" * 64)
    assert not target.exists()
    assert leftovers(target) == []


@pytest.mark.parametrize("announced", [True, False])
def test_too_large(server: Server, target: Path, announced: bool) -> None:
    def large(request: Request, content: bytes) -> None:
        request.begin(200, len(content) if announced else None)
        request.wfile.write(content)

    server.files["/file"] = CONTENT
    server.script = [large]
    with pytest.raises(DownloadError, match=r"MB that are accepted|at most 0 MB are accepted"):
        download(f"{server.url}/file", target, max_bytes=200_000)


def test_nobody_there_is_said_at_once(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as closed:
        url = closed.url
    with pytest.raises(DownloadError, match="cannot reach http://127"):
        download(f"{url}/file", target)
    assert leftovers(target) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "nonsense", "http://127.0.0.1/a b"])
def test_addresses_that_are_none(target: Path, url: str) -> None:
    with pytest.raises(DownloadError, match="cannot download"):
        download(url, target, **QUICK)


def test_full_disk_is_seen_before_the_transfer(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files["/file"] = CONTENT
    monkeypatch.setattr(shutil, "disk_usage", lambda _: argparse.Namespace(free=100_000))
    with pytest.raises(InputError, match=r"write .*file\.bin: 0\.3 MB needed, 0\.1 MB free, 0\.2 MB are missing"):
        download(f"{server.url}/file", target)
    assert leftovers(target) == []


def test_full_disk_during_the_transfer_keeps_what_came(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/file"] = CONTENT
    server.script = [truncate(100_000)]
    with pytest.raises(DownloadError):
        download(f"{server.url}/file", target, attempts=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module._Part, "append", lambda part, chunk: _raise_through(part, full))
        with pytest.raises(InputError, match="no space left to write"):
            download(f"{server.url}/file", target)
    download(f"{server.url}/file", target)
    assert server.ranges[-1] == "bytes=100000-"
    assert target.read_bytes() == CONTENT


def _raise_through(part: module._Part, fail: Callable[[], None]) -> None:
    with writing(part.path):
        fail()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot write"):
        download("http://127.0.0.1/x", tmp_path / "file" / "x")


def test_two_downloads_of_one_file(server: Server, target: Path) -> None:
    server.files["/file"] = CONTENT
    server.script = [stall(1000)]
    first = threading.Thread(target=download, args=(f"{server.url}/file", target), kwargs={**QUICK, "timeout": 0.5})
    first.start()
    while not server.paths:
        pass
    with pytest.raises(DownloadError, match=r"another process is downloading .* already"):
        download(f"{server.url}/file", target)
    first.join()
    assert target.read_bytes() == CONTENT


def test_without_locks(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    server.files["/file"] = CONTENT
    download(f"{server.url}/file", target)
    assert target.read_bytes() == CONTENT
    code = "import sys; sys.modules['fcntl'] = None; import mdistiller.hub"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_windows_moves_no_file_that_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, replace = [], os.replace
    with module._Part.locked(tmp_path / "file") as part:
        part.append(b"content")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", "win32")
            patch.setattr(os, "replace", lambda *paths: (closed.append(part._file.closed), replace(*paths)))
            part.finish("http://127.0.0.1/file", None)
    assert closed == [True]
    assert (tmp_path / "file").read_bytes() == b"content"
