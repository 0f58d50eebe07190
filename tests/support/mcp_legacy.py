"""An MCP server as they were before 2026, by hand: the initialize handshake, ping, answers whose id comes last.

Its one tool, `grow`, adds another and tells of it with a notification. It knows nothing of the project, nor of the SDK.
"""

import json
import sys
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


def main() -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        try:
            result = {"result": answer(message["method"], message.get("params", {}))}
        except NotImplementedError:
            result = {"error": {"code": -32601, "message": "Method not found"}}
        send({**result, "jsonrpc": "2.0", "id": message["id"]})


if __name__ == "__main__":
    main()
