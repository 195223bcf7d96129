"""Wrong inputs that a new user types: the command, the exit code, and a part of the message. Run it to print a table.

python tests/wrong_inputs.py > table.md
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TOOL = {"name": "book", "description": "Book seats", "parameters": {"type": "object", "properties": {"n": {}}}}
SHORT = "--data demo=40 --max-steps 1 --tokens-per-step 1024 --no-eval"


@dataclass(frozen=True)
class WrongInput:
    command: str
    message: str
    exit_code: int = 1


def _train(options: str, message: str, exit_code: int = 1) -> WrongInput:
    return WrongInput(f"poe-train stage demo {options}", message, exit_code)


CASES = [
    # names
    WrongInput("poe pusk demo x", "Did you mean 'push'?", 2),
    WrongInput("poe-train stag", "Did you mean 'stage'?", 2),
    WrongInput("poe-train stage tol", "Did you mean 'tool'?"),
    WrongInput("poe recipes tol", "Did you mean 'tool'?"),
    # options
    _train("--num-layer 2", "--num-layers", 2),
    _train("--max_steps 2", "--max-steps", 2),
    _train("--learning-rate 1e-3", "matrix_lr", 2),
    _train("--lr 1e-3", "matrix_lr", 2),
    _train("--batch-size 8", "tokens_per_step", 2),
    _train("--num-train-epochs 3", "epochs", 2),
    _train("--lora-r 16", "rank", 2),
    _train("--gradient-checkpointing", "checkpoint_activations", 2),
    # values
    _train("--head lowrank", "Did you mean 'low_rank'?"),
    _train("--max-steps -3", "max_steps should be"),
    _train("--seq-len 0", "seq_len should be"),
    _train("--dtype fp17", "'auto' or 'bfloat16' or 'float32'"),
    _train("--validation-ratio 2", "validation_ratio should be a number"),
    # data
    _train("--data missing.jsonl", "No file or folder 'missing.jsonl' exists"),
    _train("--data empty.jsonl", "it has no rows"),
    _train("--data text.jsonl", "not JSON"),
    _train("--data keys.jsonl", "got the keys query, reply"),
    _train("--data rows.csv", "unknown format; expected json, jsonl"),
    _train("--data messages=empty", "has no data file"),
    _train("--data glaiv", "Did you mean 'glaive'?"),
    _train("--data rows.jsonl,,demo", "Empty item"),
    # bases and devices
    _train("--base empty", "has no config.json"),
    _train("--base model.gguf", "is a file: expected the folder"),
    _train("--base ./nowhere", "There is no folder ./nowhere"),
    _train(r"--base 'C:\models\mine'", "There is no folder C:"),
    _train("--device cuda:9", "There is no device cuda:9"),
    _train("--device gpu", "There is no device 'gpu'"),
    WrongInput("poe generate demo Hello --device cuda:9", "There is no device cuda:9"),
    # folders
    _train(f"{SHORT} --out file", "is a file: expected a folder"),
    _train(f"{SHORT} --out full", "is not empty"),
    _train(f"{SHORT} --out new --resume", "Nothing to resume: there is no checkpoint"),
    # tools and stages
    WrongInput("poe call demo Hello", "Missing option '--tools'", 2),
    WrongInput("poe call demo Hello --tools missing.json", "cannot be read: No such file"),
    WrongInput("poe call demo Hello --tools text.jsonl", "not JSON"),
    WrongInput("poe call demo Hello --tools nothing.json", "holds no tools"),
    WrongInput("poe export demo --native new", "demo is a base: expected a stage"),
    WrongInput("poe fold demo --out new", "demo is a base: expected a stage"),
    WrongInput("poe push empty me/x --dry-run", "has no config.json"),
    WrongInput("poe push demo 'bad name' --dry-run", "is not a repository name"),
    WrongInput("poe inspect rows.jsonl", "is a file: expected the folder"),
    WrongInput("poe data show demo=many", "expected demo or demo=NUMBER"),
    WrongInput("poe data stats rows.jsonl --out page.pdf", "ends in .html or .md"),
]


def make_files(folder: Path) -> None:
    """Write the files that the commands name."""
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    contents = {
        "rows.jsonl": json.dumps(row) + "\n",
        "keys.jsonl": '{"query": "Hi", "reply": "Hello"}\n',
        "empty.jsonl": "",
        "text.jsonl": "this is no JSON\n",
        "rows.csv": "question,answer\nHi,Hello\n",
        "nothing.json": "[]",
        "model.gguf": "GGUF",
        "file": "x",
        "full/notes.txt": "x",
        "empty/.keep": "",
    }
    for name, text in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def list_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def main() -> None:
    print("| command | message | exit code | seconds | left on disk |\n|---|---|---:|---:|---|")
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_files(folder)
            before, start = list_files(folder), time.monotonic()
            program, *arguments = shlex.split(case.command)
            module = "poe.commands.train" if program == "poe-train" else "poe"
            done = subprocess.run(
                [sys.executable, "-m", module, *arguments], cwd=folder, capture_output=True, text=True, check=False
            )
            seconds, left = time.monotonic() - start, sorted(list_files(folder) - before)
        text = " ".join(done.stderr.replace("│", " ").split()).replace(f"{name}/", "").replace(name, "FOLDER")
        message = text.partition("error: ")[2] or text.partition("─╮")[2].strip("╰─╯ ")
        message = message.replace("|", "\\|")
        command = case.command.replace("|", "\\|")
        print(f"| `{command}` | {message} | {done.returncode} | {seconds:.1f} | {', '.join(left) or 'nothing'} |")


if __name__ == "__main__":
    main()
