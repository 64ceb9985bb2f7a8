"""A loopback web server that misbehaves on command, and what the cache holds afterwards."""

import hashlib
import http.server
import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request

import pytest

import download as module
from download import DownloadError, cache_dir, cache_path, data_dir, download, reachable

BODY = bytes(range(256)) * 1200  # 307,200 bytes: several blocks
SHA = hashlib.sha256(BODY).hexdigest()
OTHER = BODY[::-1]
REPOSITORY = Path(module.__file__).parent


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each request as the first entry of `site.plan` says, and well when the plan is used up."""

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        site = self.server.site
        site.seen.append((self.command, self.path, dict(self.headers)))
        act = site.plan.pop(0) if site.plan else "well"
        if act.isdigit():
            return self.send_error(int(act))
        if act.startswith("to "):
            self.send_response(302)
            self.send_header("Location", act[3:])
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body, start, tag = site.body, 0, site.tag
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        current = self.headers.get("If-Range") in (tag, site.date)
        if asked and act != "ignore range" and (current or act == "ignore if-range"):
            start = int(asked[1])
            if start >= len(body):
                return self.send_error(416)
            start += 100 if act == "another range" else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if act != "no length":
            self.send_header("Content-Length", str(len(body) - start + (1000 if act == "lie" else 0)))
        for name, value in (("ETag", tag), ("Last-Modified", site.date)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        body = body[start:]
        if act in ("drop", "stall"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.wfile.flush()
        if act == "stall":
            site.over.wait(10)
        if act == "slow":
            time.sleep(0.1)


class Site:
    def __init__(self):
        self.plan, self.seen, self.body, self.tag, self.date = [], [], BODY, '"one"', None
        self.over = threading.Event()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.site, self.server.daemon_threads, self.server.block_on_close = self, True, False
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.url = f"{self.base}/files/model.bin"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def ranges(self):
        return [headers.get("Range") for _, _, headers in self.seen]

    def close(self):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def site():
    site = Site()
    yield site
    site.close()


@pytest.fixture(autouse=True)
def waits(monkeypatch, tmp_path):
    """No mirror, a cache of its own, a proxy that refuses (loopback must pass it by), and waits that are only noted."""
    for name in ("EMOBERT_MIRROR", "EMOBERT_DATA", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("EMOBERT_CACHE", str(tmp_path / "cache"))
    noted = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=noted.append))
    return noted


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "models" / "model.bin"


def left_beside(path):
    """Names beside `path` other than it and its lock."""
    return sorted(p.name for p in path.parent.iterdir() if p.name not in (path.name, path.name + ".lock"))


def failure(*args, **options) -> str:
    with pytest.raises(DownloadError) as caught:
        download(*args, timeout=0.3, **options)
    return str(caught.value)


# ---- the straight way

def test_downloads_once_and_leaves_nothing_else(site, path):
    assert download(site.url, path, SHA) == path
    assert path.read_bytes() == BODY and left_beside(path) == []
    assert download(site.url, str(path), SHA.upper()) == path and download(site.url, path) == path
    assert len(site.seen) == 1


def test_a_corrupted_cache_entry_is_fetched_anew(site, path):
    path.parent.mkdir(parents=True)
    path.write_bytes(BODY[:-1] + b"?")
    download(site.url, path, SHA)
    assert path.read_bytes() == BODY


def test_a_corrupted_entry_that_cannot_be_replaced_is_named(site, path):
    path.parent.mkdir(parents=True)
    path.write_bytes(b"an older file")
    site.plan = ["404"]
    assert "has the wrong sha256" in failure(site.url, path, SHA)
    assert path.read_bytes() == b"an older file"


def test_empty_files_and_files_of_unstated_length(site, path):
    site.plan = ["no length"]
    assert download(site.url, path, SHA).read_bytes() == BODY
    site.body = b""
    assert download(site.url, path.with_name("empty")).read_bytes() == b""


def test_a_progress_bar_in_bytes_only_on_a_terminal(site, path, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return self.terminal
    for terminal, progress, shown in ((True, True, True), (True, False, False), (False, True, False)):
        stream = Stream()
        stream.terminal = terminal
        monkeypatch.setattr(sys, "stderr", stream)
        path.unlink(missing_ok=True)
        download(site.url, path, progress=progress)
        assert ("model.bin" in stream.getvalue() and "307k" in stream.getvalue()) is shown
        assert shown or not stream.getvalue()
    monkeypatch.setattr(sys, "stderr", None)  # as in a windowed program
    download(site.url, path.with_name("other"))


# ---- servers that fail

@pytest.mark.parametrize("status", ["500", "503", "429"])
def test_a_passing_error_is_tried_again(site, path, status):
    site.plan = [status, status]
    assert download(site.url, path, SHA, retries=2).read_bytes() == BODY
    assert len(site.seen) == 3


def test_a_missing_file_is_not_tried_again_but_a_later_call_may_succeed(site, path):
    site.plan = ["404"]
    message = failure(site.url, path)
    assert site.url in message and "404" in message and str(path) in message and "EMOBERT_MIRROR" in message
    assert "\n" not in message and len(site.seen) == 1 and not path.exists()
    assert download(site.url, path).read_bytes() == BODY


def test_attempts_are_counted_and_the_waits_between_them_grow(site, path, waits):
    site.plan = ["500"] * 9
    assert "500" in failure(site.url, path, retries=2)
    assert len(site.seen) == 3 and not path.exists() and waits == [0.25, 0.5]


def test_a_dropped_connection_is_resumed(site, path):
    site.plan = ["drop"]
    assert download(site.url, path, SHA).read_bytes() == BODY
    half = len(BODY) // 2
    assert site.ranges() == [None, f"bytes={half}-"] and site.seen[1][2]["If-Range"] == '"one"'
    assert left_beside(path) == []


def test_a_stalled_connection_is_given_up_and_resumed(site, path):
    site.plan = ["stall"]
    began = time.monotonic()
    assert download(site.url, path, SHA, timeout=0.2).read_bytes() == BODY
    assert time.monotonic() - began < 1.5
    assert site.ranges()[1] == f"bytes={len(BODY) // 2}-"


def test_an_interrupted_download_is_resumed_by_a_later_call(site, path):
    site.plan = ["drop"]
    assert f"{len(BODY) // 2} of {len(BODY)} bytes" in failure(site.url, path, SHA, retries=0)
    assert not path.exists() and "model.bin.part" in left_beside(path)
    download(site.url, path)
    assert path.read_bytes() == BODY and site.ranges()[1] == f"bytes={len(BODY) // 2}-"


def test_a_date_will_do_when_there_is_no_strong_tag(site, path):
    site.tag, site.date, site.plan = 'W/"weak"', "Mon, 01 Jan 2024 00:00:00 GMT", ["drop"]
    download(site.url, path, SHA)
    assert site.ranges()[1] and site.seen[1][2]["If-Range"] == site.date


def test_without_a_tag_or_a_date_the_file_starts_anew(site, path):
    site.tag, site.plan = None, ["drop"]
    download(site.url, path, SHA)
    assert site.ranges() == [None, None] and path.read_bytes() == BODY


def test_a_server_that_ignores_range_is_read_from_the_start(site, path):
    site.plan = ["drop", "ignore range"]
    assert download(site.url, path, SHA).read_bytes() == BODY
    assert site.ranges()[1] is not None


@pytest.mark.parametrize("second", ["well", "ignore if-range"])
def test_halves_of_two_versions_are_never_joined(site, path, second):
    site.plan = ["drop"]
    failure(site.url, path, retries=0)
    site.body, site.tag, site.plan = OTHER, '"two"', [second]
    assert download(site.url, path).read_bytes() == OTHER


def test_a_range_that_was_not_asked_for_is_not_appended(site, path):
    site.plan = ["drop", "another range"]
    assert download(site.url, path, retries=1).read_bytes() == BODY
    assert len(site.seen) == 3


def test_a_file_that_has_become_shorter_starts_anew(site, path):
    site.plan = ["drop"]
    failure(site.url, path, retries=0)
    site.body, site.plan = BODY[:1000], ["ignore if-range"]  # answers 416
    assert download(site.url, path, retries=0).read_bytes() == BODY[:1000]


def test_a_part_of_another_address_is_not_continued(site, path):
    site.plan = ["drop"]
    failure(site.url, path, retries=0)
    download(site.base + "/files/another.bin", path, SHA)
    assert site.ranges() == [None, None]


@pytest.mark.parametrize("note", ["", '["http://127', "[]", "{}", '["a", "b"]'])
def test_a_damaged_note_means_a_fresh_start(site, path, note):
    path.parent.mkdir(parents=True)
    path.with_name("model.bin.part").write_bytes(b"garbage")
    path.with_name("model.bin.part.json").write_text(note, encoding="utf-8")
    assert download(site.url, path, SHA).read_bytes() == BODY


def test_a_part_that_is_complete_is_only_checked_and_renamed(site, path):
    path.parent.mkdir(parents=True)
    path.with_name("model.bin.part").write_bytes(BODY)
    note = json.dumps([site.url, '"one"', len(BODY)])
    path.with_name("model.bin.part.json").write_text(note, encoding="utf-8")
    assert download(site.url, path, SHA).read_bytes() == BODY
    assert site.seen == [] and left_beside(path) == []


def test_a_length_that_is_never_reached_is_an_error(site, path):
    site.plan = ["lie"] * 9
    assert "bytes" in failure(site.url, path, retries=1)
    assert not path.exists()


def test_a_wrong_hash_leaves_no_file(site, path):
    site.body = OTHER
    assert hashlib.sha256(OTHER).hexdigest() in failure(site.url, path, SHA)
    assert not path.exists() and left_beside(path) == [] and len(site.seen) == 1


def test_the_target_never_holds_less_than_the_whole(site, path):
    site.plan = ["stall"]
    seen = []
    worker = threading.Thread(target=lambda: seen.append(failure(site.url, path, retries=0)))
    worker.start()
    while worker.is_alive():
        seen += [path.exists()]
        time.sleep(0.01)
    worker.join()
    assert not any(entry is True for entry in seen) and isinstance(seen[-1], str)


def test_nobody_there(path):
    message = failure(f"http://127.0.0.1:{closed_port()}/x", path, retries=1)
    assert "could not fetch" in message and not path.exists()


def test_a_folder_that_cannot_be_made_is_a_download_error(site, tmp_path):
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    assert "could not fetch" in failure(site.url, tmp_path / "file" / "model.bin")


# ---- addresses that are refused

@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://example.com/x", "data:text/plain,x", "model.bin",
                                 "http:///x"])
def test_only_http_and_https_are_fetched(path, url, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="only http and https"):
        download(url, path)
    for mirror in (str(tmp_path), "http://127.0.0.1/mirror"):
        monkeypatch.setenv("EMOBERT_MIRROR", mirror)
        with pytest.raises(ValueError, match="only http and https"):
            download(url, path)


@pytest.mark.parametrize("target", ["file:///etc/hostname", "ftp://127.0.0.1/x", "data:text/plain,x"])
def test_a_redirect_to_another_scheme_is_refused(site, path, target):
    site.plan = [f"to {target}"]
    failure(site.url, path, retries=3)
    assert not path.exists() and len(site.seen) == 1


def test_a_redirect_within_http_is_followed_and_one_down_from_https_is_not(site, path):
    site.plan = ["to /files/moved.bin"]
    assert download(site.url, path, SHA).read_bytes() == BODY
    follow = module._Redirects().redirect_request
    assert follow(Request("http://a.example/x"), None, 302, "", {}, "https://a.example/y").full_url.endswith("/y")
    with pytest.raises(HTTPError, match="refused"):
        follow(Request("https://a.example/x"), None, 302, "", {}, "http://a.example/y")


# ---- folders

def test_where_things_are(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "cache" and data_dir() == tmp_path / "cache" / "data"
    monkeypatch.setenv("EMOBERT_DATA", str(tmp_path / "sets"))
    assert data_dir() == tmp_path / "sets" and data_dir(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.setenv("EMOBERT_CACHE", "~/elsewhere")
    assert cache_dir() == Path.home() / "elsewhere"
    monkeypatch.delenv("EMOBERT_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "emobert"


def test_cache_paths_stay_in_the_cache(tmp_path):
    root = tmp_path / "cache"
    assert cache_path("models", "a.bin") == cache_path("models/a.bin") == root / "models" / "a.bin"
    for parts in (("..", "x"), ("a/../../x",), ("/etc/passwd",), ("a", "/b"), ("C:\\x",), ("C:", "x"), ("..\\x",),
                  ("\\\\host\\x",), ("",), (".",), (), ("a\0b",), ("a//b",)):
        with pytest.raises(ValueError):
            cache_path(*parts)


def test_links_out_of_the_cache_are_refused(tmp_path):
    root = tmp_path / "cache"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    (root / "inside").mkdir()
    try:
        (root / "out").symlink_to(tmp_path / "outside", target_is_directory=True)
        (root / "in").symlink_to(root / "inside", target_is_directory=True)
    except OSError:
        pytest.skip("this system does not let us make symbolic links")
    assert cache_path("in", "x") == root / "in" / "x"
    with pytest.raises(ValueError, match="link out of the cache"):
        cache_path("out", "x")


# ---- mirrors

def test_a_mirror_folder(path, tmp_path, monkeypatch, site):
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path / "mirror"))
    file = tmp_path / "mirror" / "files.example" / "a b" / "model.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(BODY)
    url = "https://files.example:8443/a%20b/model.bin?download=true"
    assert download(url, path, SHA).read_bytes() == BODY and left_beside(path) == []
    assert file.exists()
    path.unlink()
    file.write_bytes(OTHER)
    assert "sha256" in failure(url, path, SHA) and not path.exists() and left_beside(path) == []
    message = failure(site.url, path)  # the mirror lacks it, and nobody else is asked
    assert "mirror" in message and site.seen == []


def test_half_a_copy_from_a_mirror_folder_is_not_continued_from_the_site(path, tmp_path, monkeypatch, site):
    site.plan = ["drop"]
    failure(site.url, path, retries=0)

    def copy_half(source, target):
        Path(target).write_bytes(OTHER[:1000])
        raise OSError("no space left")
    with monkeypatch.context() as patch:
        patch.setenv("EMOBERT_MIRROR", str(tmp_path))
        patch.setattr(module.shutil, "copyfile", copy_half)
        assert "no space left" in failure(site.url, path)
    assert download(site.url, path).read_bytes() == BODY


def test_an_address_cannot_lead_out_of_a_mirror_folder(path, tmp_path, monkeypatch):
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path / "mirror"))
    (tmp_path / "secret").write_bytes(b"secret")
    for tail in ("../../secret", "%2e%2e/%2e%2e/secret", "..%5c..%5csecret", "a/%2e%2e/%2e%2e/%2e%2e/secret"):
        with pytest.raises(ValueError, match="unsafe"):
            download("http://files.example/" + tail, path)


def test_a_mirror_site(path, site, monkeypatch):
    monkeypatch.setenv("EMOBERT_MIRROR", site.base + "/mirror/")
    site.plan = ["drop"]
    assert download("https://files.example/a%20b/model.bin?x=1", path, SHA).read_bytes() == BODY
    assert {where for _, where, _ in site.seen} == {"/mirror/files.example/a%20b/model.bin"}
    assert site.ranges()[1]
    path.unlink()
    site.plan = ["404"]
    assert site.base in failure("https://files.example/a.bin", path)
    monkeypatch.setenv("EMOBERT_MIRROR", "ftp://files.example")
    with pytest.raises(ValueError, match="only http and https"):
        download("https://files.example/a.bin", path)


# ---- two at once

def test_two_threads_fetch_once(site, path):
    site.plan = ["slow", "slow"]
    results = []
    workers = [threading.Thread(target=lambda: results.append(download(site.url, path, SHA))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == [path] * 4 and path.read_bytes() == BODY and len(site.seen) == 1


def process(url, path):
    code = "import sys, download; download.download(sys.argv[1], sys.argv[2], timeout=20)"
    return subprocess.Popen([sys.executable, "-c", code, url, str(path)], cwd=REPOSITORY,
                            env={**os.environ, "PYTHONPATH": str(REPOSITORY)})


def test_two_processes_fetch_once(site, path):
    site.plan = ["slow", "slow"]
    workers = [process(site.url, path) for _ in range(2)]
    assert [worker.wait(10) for worker in workers] == [0, 0]
    assert path.read_bytes() == BODY and len(site.seen) == 1


def test_what_a_killed_process_left_is_resumed(site, path):
    site.plan = ["stall"]
    worker = process(site.url, path)
    part, deadline = path.with_name("model.bin.part"), time.monotonic() + 10
    while not (part.exists() and part.stat().st_size > 65536) and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.kill()
    worker.wait(10)
    began = time.monotonic()
    assert download(site.url, path, SHA, timeout=0.5).read_bytes() == BODY
    assert time.monotonic() - began < 1
    assert int(site.ranges()[1][len("bytes="):-1]) > 65536


# ---- is anybody there?

def test_reachable_means_any_answer_in_time(site, monkeypatch, tmp_path):
    assert reachable(site.url, timeout=1)
    site.plan = ["404", "500", "504"]
    assert reachable(site.url, timeout=1) and reachable(site.url, timeout=1)
    assert not reachable(site.url, timeout=1)  # a gateway that got no answer
    assert {method for method, _, _ in site.seen} == {"HEAD"}
    assert not reachable(f"http://127.0.0.1:{closed_port()}/", timeout=1)
    assert not reachable("file:///etc/hostname", timeout=1) and not reachable("http://[broken", timeout=1)
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path))
    assert reachable("https://files.example/x", timeout=1)
    monkeypatch.setenv("EMOBERT_MIRROR", str(tmp_path / "none"))
    assert not reachable("https://files.example/x", timeout=1)
    monkeypatch.setenv("EMOBERT_MIRROR", site.base)
    assert reachable("https://files.example/x", timeout=1)


def test_silence_and_a_name_server_that_hangs_are_given_up_in_time(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        began = time.monotonic()
        assert not reachable(f"http://127.0.0.1:{silent.getsockname()[1]}/", timeout=0.3)
        assert time.monotonic() - began < 0.8
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: over.wait(5) and [])
    began = time.monotonic()
    assert not reachable("http://localhost/", timeout=0.3)
    assert time.monotonic() - began < 0.8
    over.set()


def test_other_hosts_are_asked_through_the_proxy(site, path, monkeypatch):
    monkeypatch.setenv("http_proxy", site.base)
    assert download("http://files.example/model.bin", path, SHA).read_bytes() == BODY
    assert reachable("http://files.example/", timeout=1)
    assert [where for _, where, _ in site.seen] == ["http://files.example/model.bin", "http://files.example/"]
