"""The command line of bfcl-eval for the answers of one model. A process of its own runs this file, without `poe`.

    python -I -S -B bfcl_command.py PACKAGES MODEL questions CATEGORY ...   one JSON object per line
    python -I -S -B bfcl_command.py PACKAGES MODEL evaluate ...             `bfcl evaluate ...`

PACKAGES is the folder of bfcl-eval and of what it needs to score (`bfcl_packages`). bfcl-eval has a module that lists
the models, and one that asks them; both import the client of every vendor, 1.9 GB of packages. Here the first one lists
MODEL alone, and the second one is empty. Everything else is the package's own: its questions, its checker, its files.
"""

import json
import sys
from types import ModuleType, SimpleNamespace
from typing import Any


def list_one_model(name: str) -> None:
    """Make MODEL the only one that bfcl-eval lists. Its calls are decoded as those of OpenAI's API."""
    from bfcl_eval.model_handler.base_handler import BaseHandler

    class AnswersHandler(BaseHandler):
        def decode_ast(self, result: Any, language: Any, has_tool_call_tag: bool) -> list[dict[str, Any]]:
            return [{name: json.loads(arguments)} for call in result for name, arguments in call.items()]

    models, asking = (
        ModuleType(f"bfcl_eval.{name}") for name in ("constants.model_config", "_llm_response_generation")
    )
    about = dict.fromkeys(("display_name", "model_name"), name) | dict.fromkeys(("url", "org", "license"), "")
    prices = dict.fromkeys(("input_price", "output_price"))
    flags = {"is_fc_model": True, "underscore_to_dot": False}
    listed = {name: SimpleNamespace(model_handler=AnswersHandler, **about, **prices, **flags)}
    models.MODEL_CONFIG_MAPPING = listed  # type: ignore[attr-defined]
    asking.main = None  # type: ignore[attr-defined]
    sys.modules |= {models.__name__: models, asking.__name__: asking}


def print_questions(categories: list[str]) -> None:
    """Print the rows of categories with their functions as models get them, and with their acceptable answers."""
    from bfcl_eval.utils import is_relevance_or_irrelevance, load_dataset_entry, load_ground_truth_entry

    for category in categories:
        rows = load_dataset_entry(category)
        answers = [None] * len(rows)
        if not is_relevance_or_irrelevance(category):
            answers = [row["ground_truth"] for row in load_ground_truth_entry(category)]
        for row, answer in zip(rows, answers, strict=True):
            question = {"id": row["id"], "messages": row["question"][0], "functions": row["function"]}
            print(json.dumps({"category": category, **question, "acceptable": answer}))


def main(packages: str, model: str, command: str, *arguments: str) -> None:
    """Run one command."""
    sys.path.insert(0, packages)
    if command == "questions":
        print_questions(list(arguments))
        return
    list_one_model(model)
    from bfcl_eval.__main__ import cli

    sys.argv = ["bfcl", command, *arguments]
    cli()


if __name__ == "__main__":
    main(*sys.argv[1:])
