"""Load a stage with transformers alone, as a stranger does, and answer a question with a call.

    python examples/load_without_poe.py runs/demo

`poe` is made impossible to import first: everything that is needed lies in the stage's folder.
"""

import json
import sys
from pathlib import Path

sys.modules["poe"] = None  # any `import poe` now raises ImportError

import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

# No training row has a gondola, or these values.
QUESTION = "Please book a gondola for Marla for 37 people."
TOOLS = json.loads((Path(__file__).parent / "tools.json").read_text())


def main(folder: str, question: str = QUESTION) -> int:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        tools=TOOLS,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=160, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    print(f"question: {question}")
    print(f"reply:    {text}")
    body = text.partition("<tool_call>")[2].partition("</tool_call>")[0]
    try:
        call = json.loads(body)
    except ValueError:
        print("the reply holds no call that can be read")
        return 1
    schema = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}.get(call["name"])
    if schema is None or not set(schema.get("required", [])) <= set(call["arguments"]) <= set(schema["properties"]):
        print("the call does not fit the tools")
        return 1
    print(f"call:     {call['name']}({', '.join(f'{k}={v!r}' for k, v in call['arguments'].items())})")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
