"""A server of shards that can misbehave."""

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class Server(ThreadingHTTPServer):
    """Serves a folder, as well or as badly as `manner` says."""

    daemon_threads = True
    manner = "honest"
    ranges = True
    pause = 0.01  # seconds between two kB of a slow answer
    faults = 10**9  # answers that misbehave before the rest are honest

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def fetched(self, name) -> int:
        return sum(path.endswith(name) for path in self.asked)

    def handle_error(self, request, client_address):
        """Clients that hang up are expected."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.asked.append(self.path)
        file = server.folder / unquote(self.path.strip("/").partition("?")[0])
        if not file.is_file():
            return self.send_error(404)
        data, manner = file.read_bytes(), server.manner
        if not file.name.endswith(".tar") or len(server.asked) > server.faults:
            manner = "honest"
        if manner == "busy":
            return self.send_error(503)
        if manner == "page":
            data = b"<html>please sign in</html>"
        start = 0
        if server.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        rest = data[start:]
        length = {"longer": len(rest) + 99, "shorter": len(rest) - 1024}.get(manner, len(rest))
        if manner not in ("unsaid", "cut"):
            self.send_header("Content-Length", str(length))
        self.end_headers()
        if manner == "slow":
            for i in range(0, len(rest), 1024):
                self.wfile.write(rest[i : i + 1024])
                time.sleep(server.pause)
        elif manner == "stall":
            self.wfile.write(rest[:100])
            self.wfile.flush()
            server.released.wait(20)
        elif manner in ("drop", "cut"):
            self.wfile.write(rest[: 4096 if manner == "drop" else len(rest) // 2])
        elif manner == "flip":
            self.wfile.write(rest[:5000] + bytes([rest[5000] ^ 1]) + rest[5001:])
        else:
            self.wfile.write(rest)
        return None

    def log_message(self, *_):
        """Says nothing."""
