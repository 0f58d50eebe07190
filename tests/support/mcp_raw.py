"""An MCP server that answers with bytes given to it, right or wrong. Run as a process, over stdio or HTTP.

    python tests/support/mcp_raw.py FILE [--http | --sse]

FILE is JSON: `tools` is what `tools/list` lists, `replies` maps the name of a tool to what is sent when it is called,
as text of which each character is a byte, `$ID` standing for the id of the request; `results` maps a method to its
result. A tool without a reply gives its arguments as JSON text, `received` what the client has answered to requests;
with `forget` it no longer knows `tools/list`. With `--http` or `--sse` it prints its port and answers with a JSON body
or with a stream of events: a reply of several lines is several events. With `--gzip` the body is compressed, whatever
the client accepts. It knows nothing of the project, nor of the SDK.
"""

import gzip
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SCRIPT: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
STREAMS = "--sse" in sys.argv
HANDSHAKE = {
    "protocolVersion": "2025-06-18",
    "capabilities": {"tools": {"listChanged": True}},
    "serverInfo": {"name": "raw", "version": "1"},
}
RESULTS = {"initialize": HANDSHAKE, "ping": {}, "tools/list": {"tools": SCRIPT["tools"]}, **SCRIPT.get("results", {})}

RECEIVED: list[dict[str, Any]] = []


def answer(message: dict[str, Any]) -> bytes:
    """What is sent for a request, without the end of the line."""
    method, params = message["method"], message.get("params", {})
    reply: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
    if method == "tools/call":
        if params["name"] == "forget":
            RESULTS.pop("tools/list")
        if (raw := SCRIPT["replies"].get(params["name"])) is not None:
            return str(raw).replace("$ID", json.dumps(message["id"])).encode("latin-1")
        given = RECEIVED if params["name"] == "received" else params.get("arguments", {})
        reply["result"] = {"content": [{"type": "text", "text": json.dumps(given, sort_keys=True)}]}
    elif method in RESULTS:
        reply["result"] = RESULTS[method]
    else:
        reply["error"] = {"code": -32601, "message": "Method not found"}
    return json.dumps(reply).encode()


def serve_stdio() -> None:
    for line in sys.stdin.buffer:
        message = json.loads(line)
        if "method" not in message:
            RECEIVED.append(message)
        elif "id" in message:
            sys.stdout.buffer.write(answer(message) + b"\n")
            sys.stdout.buffer.flush()


class OverHttp(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "method" not in message:
            RECEIVED.append(message)
        if "id" not in message or "method" not in message:
            self._send(202, "application/json", b"")
        elif STREAMS and message["method"] == "tools/call":
            events = b"".join(b"event: message\ndata: " + line + b"\n\n" for line in answer(message).split(b"\n"))
            self._send(200, "text/event-stream", events)
        else:
            self._send(200, "application/json", answer(message))

    def do_GET(self) -> None:
        self._send(405, "text/plain", b"")

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        if "--gzip" in sys.argv:
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256


def serve_http() -> None:
    server = Server(("127.0.0.1", 0), OverHttp)
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    serve_http() if "--http" in sys.argv or STREAMS else serve_stdio()
