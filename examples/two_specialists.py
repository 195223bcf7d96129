"""Two specialists on one base: load both, ask each, combine them, switch them off.

    python examples/two_specialists.py runs/boats runs/weather

Both stages stand on the same base, which is in memory once. A stage that has the name of another gets a new one.
"""

import argparse

from poe import Cascade

QUESTION = "Please rent a kayak for Zoe for 41 days."
TOOL = {
    "type": "function",
    "function": {
        "name": "rent_boat",
        "description": "Rent a boat",
        "parameters": {
            "type": "object",
            "properties": {"person": {"type": "string"}, "days": {"type": "integer"}, "kind": {"type": "string"}},
            "required": ["person", "days"],
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", help="the folder or repository of a stage")
    parser.add_argument("second", help="another stage on the same base")
    parser.add_argument("--weight", type=float, default=0.7, help="the share of the first stage in the product")
    arguments = parser.parse_args()

    cascade = Cascade.from_pretrained(arguments.first)
    first = cascade.active
    second = f"{first}-2"
    cascade.load_stage(arguments.second, name=second)
    print(cascade)

    for label, stage in ((first, first), (second, second), ("base", None)):
        answer = cascade.call(QUESTION, [TOOL], stage=stage)
        print(f"{label:10} {answer.calls or answer.text!r}")

    product = cascade.compose({first: arguments.weight, second: 1 - arguments.weight})
    inputs = cascade.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        tools=[TOOL],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = product.generate(**inputs, max_new_tokens=80, do_sample=False)
    print(f"{'product':10} {cascade.tokenizer.decode(output[0, inputs['input_ids'].shape[1] :])}")


if __name__ == "__main__":
    main()
