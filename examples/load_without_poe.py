"""Load a stage with transformers alone, and answer a question with a function call.

    python examples/load_without_poe.py runs/demo ["a question"]

The script first makes `import poe` fail: the stage's folder holds everything that is needed. It ends with exit code 1
if the reply has no call that fits the tools.
"""

import json
import sys
from pathlib import Path
from typing import Any

sys.modules["poe"] = None  # type: ignore[assignment]  # `import poe` now raises ImportError

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

QUESTION = "Please book a gondola for Marla for 37 people."  # no training row has a gondola, or these values
TOOLS = json.loads((Path(__file__).parent / "tools.json").read_text(encoding="utf-8"))


def main(folder: str, question: str = QUESTION) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    reply = generate_reply(model, tokenizer, question)
    print(f"question: {question}")
    print(f"reply:    {reply}")
    try:
        name, arguments = read_call(reply)
    except ValueError as error:
        print(error)
        return 1
    print(f"call:     {name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})")
    return 0


def generate_reply(model: Any, tokenizer: Any, question: str) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tools=TOOLS,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)


def read_call(reply: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of the call in `<tool_call>...</tool_call>`, checked against the tools."""
    try:
        call = json.loads(reply.partition("<tool_call>")[2].partition("</tool_call>")[0])
    except ValueError:
        raise ValueError("The reply has no call that can be read.") from None
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    schema = parameters.get(call["name"])
    if schema is None or not set(schema.get("required", [])) <= set(call["arguments"]) <= set(schema["properties"]):
        raise ValueError("The call does not fit the tools.")
    return call["name"], call["arguments"]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
