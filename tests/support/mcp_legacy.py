"""An MCP server as they were before 2026, by hand: the initialize handshake, ping, answers whose id comes last.

Its one tool, `grow`, adds another and announces it with a notification. With `--http` it serves a free port, which it
prints, and knows its clients by sessions. It forgets them all when the tool is called with `forget`, as if it had been
restarted. It knows nothing of the project, nor of the SDK.
"""

import json
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOOLS: list[dict[str, Any]] = [{"name": "grow", "inputSchema": {"type": "object"}}]


def send(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def answer(method: str, params: dict[str, Any]) -> dict[str, Any]:
    match method:
        case "initialize":
            capabilities = {"tools": {"listChanged": True}}
            info = {"name": "legacy", "version": "1"}
            return {"protocolVersion": "2025-03-26", "capabilities": capabilities, "serverInfo": info}
        case "ping":
            return {}
        case "tools/list":
            at = int(params.get("cursor", 0))
            page: dict[str, Any] = {"tools": TOOLS[at : at + 1]}
            return page | ({"nextCursor": str(at + 1)} if at + 1 < len(TOOLS) else {})
        case "tools/call":
            TOOLS.append({"name": f"grown_{len(TOOLS)}", "description": "New.", "inputSchema": {"type": "object"}})
            send({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
            return {"content": [{"type": "text", "text": params["name"] + "!" * params["arguments"].get("loud", 0)}]}
        case _:
            raise NotImplementedError


def reply(message: dict[str, Any]) -> dict[str, Any]:
    try:
        result = {"result": answer(message["method"], message.get("params", {}))}
    except NotImplementedError:
        result = {"error": {"code": -32601, "message": "Method not found"}}
    return {**result, "jsonrpc": "2.0", "id": message["id"]}


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" in message:
            send(reply(message))


SESSIONS: set[str] = set()


class OverHttp(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        session = self.headers.get("Mcp-Session-Id", "")
        if message["method"] == "initialize":
            session = uuid.uuid4().hex
            SESSIONS.add(session)
        if session not in SESSIONS:
            error = {"code": -32001, "message": "Session not found"}
            self._send(404, {"jsonrpc": "2.0", "id": message.get("id"), "error": error})
        elif "id" not in message:
            self._send(202)
        else:
            self._send(200, reply(message), session)
            if message.get("params", {}).get("arguments", {}).get("forget"):
                SESSIONS.clear()

    def do_GET(self) -> None:
        self._send(405)

    def do_DELETE(self) -> None:
        self._send(200)

    def _send(self, status: int, document: dict[str, Any] | None = None, session: str = "") -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if session:
            self.send_header("Mcp-Session-Id", session)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def serve_http() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), OverHttp)
    sys.stdout = sys.stderr  # over HTTP, other output on stdout is no answer
    print(server.server_address[1], file=sys.__stdout__, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve_http() if "--http" in sys.argv else main()
