"""Let the agent work on the MCP servers of tau2 (retail and airline), from packages on PyPI: `make test-engines`.

    python tests/engines/mcp_servers.py [EVERY]

A scripted policy calls the reference actions of each task (of every EVERY-th; default: all), one a turn, over standard
input and output, as the suite `tau2` of `poe eval` does with a model. The server's database must then equal the one
that the package's own functions make from the same actions, in a process without this package. Packages are kept in
~/.cache/poe-tests. Where no package index can be reached, one line says so.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]
from llama_cpp import install  # noqa: E402

from poe.calls.conversation import Call  # noqa: E402
from poe.chat import Answer  # noqa: E402
from poe.evaluation.tau2 import DOMAINS, Domain, attempt, hash_reference, read_tasks  # noqa: E402
from poe.tools.agent import Agent  # noqa: E402


def main(every: int) -> int:
    """Install the packages, run both domains side by side, print a table; return the exit status."""
    try:
        sys.path += [str(install([domain.package])) for domain in DOMAINS.values()]
    except subprocess.CalledProcessError as error:
        print(f"skipped: the package index has no {error.cmd[-1]}, or it cannot be reached")
        return 0
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda domain: run_domain(domain, every), DOMAINS.values()))
    print("| domain | tasks | actions | refused by the tools | databases equal | changed | seconds |")
    print("|---|---|---|---|---|---|---|")
    for line in lines:
        print("| " + " | ".join(map(str, line)) + " |")
    return 0 if all(line[1] == line[4] for line in lines) else 1


def run_domain(domain: Domain, every: int = 1) -> tuple[str, int, int, int, int, int, float]:
    """Replay the tasks of a domain; return the numbers of a line of the table."""
    start = time.monotonic()
    tasks = read_tasks(domain)[::every]
    expected = hash_reference(domain, [task.actions for task in tasks])
    equal = refused = 0
    for task, wanted in zip(tasks, expected, strict=True):
        done = attempt(task, lambda tools, task=task: Agent(replay(task.actions), tools, max_turns=99))
        assert done["reason"] == "answer", done["reason"]
        statuses = [call["status"] for call in done["calls"]]
        assert set(statuses) <= {"done", "failed"}, statuses
        refused += statuses.count("failed")
        equal += done["database"] == wanted
    changed = sum(wanted != domain.untouched for wanted in expected)
    count = sum(len(task.actions) for task in tasks)
    return domain.name, len(tasks), count, refused, equal, changed, round(time.monotonic() - start, 1)


def replay(actions: list[dict[str, Any]]) -> Any:
    """Return a policy that calls these actions, one a turn, and then answers."""
    left = iter(actions)

    def policy(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Answer:
        action = next(left, None)
        if action is None:
            return Answer("done", [], [], "stop", "done", [])
        return Answer("", [Call(action["name"], action["arguments"])], [], "tool_calls", "", [])

    return policy


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
