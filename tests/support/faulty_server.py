"""A web server of shards, with faults to order."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path


class Server:
    """Serves `files` on 127.0.0.1. `faults` holds what goes wrong with the next requests, each once; None for nothing.

    A status (404, 503); "refuse" closes before the answer, "close" after half of the bytes, "cut" too, but with a
    length that says so, "stall" sends nothing after half.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[int | str | None] = []
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.release = threading.Event()
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments: object) -> None:
                pass

            def do_GET(self) -> None:
                server.requests.append(self.path)
                server.headers.append(dict(self.headers))
                fault = server.faults.pop(0) if server.faults else None
                data = server.files.get(self.path)
                if fault == "refuse":
                    self.close_connection = True
                    return
                if isinstance(fault, int) or data is None:
                    self.send_error(fault if isinstance(fault, int) else 404)
                    return
                half = data[: len(data) // 2]
                self.send_response(200)
                self.send_header("Content-Length", str(len(half if fault == "cut" else data)))
                self.end_headers()
                self.wfile.write(data if fault is None else half)
                self.wfile.flush()
                if fault == "stall":
                    server.release.wait(300)
                self.close_connection = True

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def url(self, shard: Path) -> str:
        self.files[f"/{shard.name}"] = shard.read_bytes()
        return f"http://127.0.0.1:{self._server.server_address[1]}/{shard.name}"

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
