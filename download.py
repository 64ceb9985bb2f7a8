"""One file from a public address into the cache, whole or not at all.

A download can be cut off, stall, join the halves of two versions, or run twice at once. So the bytes go to `NAME.part`
beside the target, under a lock, with a note of the version they belong to; an attempt that breaks is resumed where it
broke, but only if the server still has that version. Then come the length, the SHA-256, an fsync, and only then the
rename, which is atomic: a file in the cache is a whole one. EMOBERT_CACHE moves the cache, EMOBERT_DATA the data sets;
EMOBERT_MIRROR is a folder or a site that stands in for every public address, as `<mirror>/<host>/<path>`.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import threading
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from tqdm import tqdm

BLOCK = 1 << 16  # bytes a read
PASSING = {408, 425, 429, 500, 502, 503, 504}  # statuses worth another attempt; 404 and its like are not


class DownloadError(OSError):
    """The file could not be had. The message says why, and what the user can do."""


def cache_dir() -> Path:
    """$EMOBERT_CACHE, else ~/.cache/emobert; not created here."""
    return Path(os.environ.get("EMOBERT_CACHE") or "~/.cache/emobert").expanduser()


def data_dir(explicit=None) -> Path:
    """Where the data sets are: `explicit` (a --data-dir), else $EMOBERT_DATA, else a folder in the cache."""
    return Path(explicit or os.environ.get("EMOBERT_DATA") or cache_dir() / "data").expanduser()


def _names(*parts: str) -> list[str]:
    """The single names in `parts`. ValueError for one that could lead elsewhere, be it only on Windows ('C:', '\\')."""
    names = [name for part in parts for name in re.split(r"[/\\]", str(part))]
    if not names or any(name in ("", ".", "..") or re.search(r"[:\0]", name) for name in names):
        raise ValueError(f"unsafe path {'/'.join(map(str, parts))!r}: use plain names, below the folder")
    return names


def cache_path(*parts: str) -> Path:
    """The path of `parts` ('models/x.bin', or 'models', 'x.bin') in the cache; the file need not be there.

    Raises ValueError for '..', absolute paths, drive letters, and symbolic links that lead out of the cache.
    """
    root = cache_dir()
    path = root.joinpath(*_names(*parts))
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{path} is a link out of the cache: remove it, or move the cache with EMOBERT_CACHE")
    return path


class _Proxies(urllib.request.ProxyHandler):
    """The proxies of the environment, except for this very machine, which a proxy elsewhere cannot reach."""

    def proxy_open(self, request, proxy, type):
        if re.fullmatch(r"localhost|127(\.\d+){3}|::1", urlsplit(request.full_url).hostname or ""):
            return None
        return super().proxy_open(request, proxy, type)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https down to http."""

    def redirect_request(self, request, response, code, message, headers, newurl):
        if urlsplit(newurl).scheme not in ("https", request.type):
            raise HTTPError(newurl, code, f"redirect to {newurl} refused", headers, response)
        return super().redirect_request(request, response, code, message, headers, newurl)


def _open(url: str, timeout: float, method: str = "GET", **headers: str):
    """The HTTP response, by an opener that knows no file:, ftp: or data:. `timeout` bounds each wait on the socket."""
    opener = urllib.request.OpenerDirector()
    for handler in (_Proxies, _Redirects, urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
                    urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "emobert", **headers}, method=method)
    return opener.open(request, timeout=timeout)


def _source(url: str) -> str | Path:
    """Where to ask for `url`: the address itself, or its place in the mirror, which knows no ports and no queries."""
    mirror, parts = os.environ.get("EMOBERT_MIRROR", ""), urlsplit(url)
    address = f"{mirror.rstrip('/')}/{parts.hostname}{parts.path}" if "://" in mirror else url
    if not parts.hostname or not {parts.scheme, urlsplit(address).scheme} <= {"http", "https"}:
        raise ValueError(f"cannot download from {address!r}: only http and https addresses are fetched")
    if mirror and "://" not in mirror:
        return Path(mirror).expanduser().joinpath(*_names(parts.hostname, unquote(parts.path).lstrip("/")))
    return address


def reachable(url: str, timeout: float = 4.0) -> bool:
    """Whether the host of `url`, or the mirror in its stead, answers within `timeout` seconds. Never raises.

    Any answer counts, a 404 too, but not a gateway's word that it got none. A name look-up can hang for minutes and
    cannot be cancelled, so a daemon thread asks, and is left behind when time is up.
    """
    answered = threading.Event()

    def ask():
        try:
            source = _source(url)
            if isinstance(source, str):
                _open(source, timeout, "HEAD").close()
            elif not Path(os.environ["EMOBERT_MIRROR"]).expanduser().is_dir():
                return
        except (OSError, http.client.HTTPException, ValueError) as error:
            if getattr(error, "code", 504) in (407, 502, 503, 504):
                return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


@contextlib.contextmanager
def _locked(path: Path):
    """Waits until no other thread or process holds the lock file `path`, then holds it.

    The operating system lets the lock go when its holder dies, so it is never stale, and the next holder resumes what
    the dead one left. The empty file stays: were it deleted, two could each lock a file of that name.
    """
    with open(path, "ab") as handle:
        if sys.platform == "win32":
            import msvcrt
            while True:
                with contextlib.suppress(PermissionError):  # somebody else holds it
                    msvcrt.locking(handle.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                time.sleep(0.1)
        else:
            import fcntl
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _version(response) -> str | None:
    """What tells this file from a later one at the same address: a strong ETag, else a date, else nothing."""
    tag = response.headers.get("ETag", "")
    return tag if tag.startswith('"') else response.headers.get("Last-Modified")


def _fetch(url: str, part: Path, note: Path, timeout: float, progress: bool) -> None:
    """One attempt to fill `part`, or to go on where the last one broke; raises, and keeps what came, if it breaks too.

    `note` says what `part` is the beginning of: address, version, length. Where one is unknown or has changed, the file
    starts anew.
    """
    try:
        address, version, length = json.loads(note.read_text(encoding="utf-8"))
        offset = part.stat().st_size if address == url and version and length else 0
    except (FileNotFoundError, ValueError):  # nothing was kept, or the note was cut off
        offset = 0
    if offset and offset == length:
        return  # all of it had come when the program ended
    try:
        response = _open(url, timeout, **({"Range": f"bytes={offset}-", "If-Range": version} if offset else {}))
    except HTTPError as error:
        if error.code != 416 or not offset:
            raise
        response = error  # the file is shorter now than what came of it
    # A server may know Range but not If-Range, so a partial answer has to prove that it continues the same file.
    resumed = (offset and response.status == 206 and _version(response) == version
               and response.headers.get("Content-Range") == f"bytes {offset}-{length - 1}/{length}")
    if not resumed and response.status != 200:
        response.close()
        response = _open(url, timeout)
    with response, open(part, "ab" if resumed else "wb") as file:
        if not resumed:
            offset, length = 0, response.length  # None if the server does not say
            note.write_text(json.dumps([url, _version(response), length]), encoding="utf-8")
        with tqdm(total=length, initial=offset, unit="B", unit_scale=True, desc=part.stem,
                  disable=not (progress and sys.stderr and sys.stderr.isatty())) as bar:
            while block := response.read1(BLOCK if length is None else min(BLOCK, length - offset)):
                offset += file.write(block)
                bar.update(len(block))
    if length is not None and offset < length:
        raise ConnectionError(f"the connection ended after {offset} of {length} bytes")


def download(url: str, path, sha256: str | None = None, progress: bool = True, timeout: float = 10.0,
             retries: int = 3) -> Path:
    """Brings `url` to `path` and returns that; at once if the file is there and has the SHA-256 (if one is given).

    `timeout` is in seconds, for connecting and for every wait for more bytes; `retries` counts attempts after the
    first, made for what can pass (no connection, a stall, too few bytes, 429, 5xx). A download with a wrong SHA-256 is
    deleted. Raises DownloadError, leaving `path` as it was, and ValueError for an address that is not http or https.
    """
    source, path = _source(url), Path(path)
    part, note, lock = (path.with_name(path.name + ending) for ending in (".part", ".part.json", ".lock"))

    def is_there():
        return path.is_file() and (sha256 is None or _sha256(path) == sha256.lower())

    if is_there():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(lock):
            if is_there():  # somebody else brought it while we waited
                return path
            if isinstance(source, Path):
                note.unlink(missing_ok=True)  # it would be about another part
                shutil.copyfile(source, part)
            for attempt in range(retries + 1 if isinstance(source, str) else 0):
                try:
                    _fetch(source, part, note, timeout, progress)
                    break
                except (OSError, http.client.HTTPException) as error:
                    if attempt == retries or getattr(error, "code", 500) not in PASSING:
                        raise
                    time.sleep(0.25 * 2**attempt)
            if sha256 is not None and (found := _sha256(part)) != sha256.lower():
                part.unlink()
                note.unlink(missing_ok=True)
                raise OSError(f"its sha256 is {found}, not {sha256}")
            with open(part, "rb+") as file:
                os.fsync(file.fileno())  # or a power cut soon after the rename could leave a file of zeros
            os.replace(part, path)
            note.unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        asked = "" if source == url else f" from the mirror ({source})"
        wrong = " (the one there now has the wrong sha256)" if path.is_file() else ""
        raise DownloadError(f"could not fetch {url}{asked}: {str(error) or type(error).__name__}; "
                            f"put the file at {path} yourself{wrong} or set EMOBERT_MIRROR") from error
    return path
