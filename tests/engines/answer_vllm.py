"""Let vLLM continue prompts, in this process.

    python tests/engines/answer_vllm.py MODEL [LORA ...] < PROMPTS

PROMPTS is JSON, a list of rows of token ids and how many tokens to add. With adapters all of them answer in one batch.
Prints a line of JSON: the continuations of the model, or those of each adapter.
"""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main(model: str, adapters: list[str]) -> None:
    """Continue each of the prompts greedily in fp32."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompts, count = json.load(sys.stdin)
    loras = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 16} if adapters else {}
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=256, skip_tokenizer_init=True, **loras)
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    if not adapters:
        outputs = engine.generate(inputs, sampling, use_tqdm=False)
    else:
        requests = [LoRARequest(f"lora{i}", i, path) for i, path in enumerate(adapters, start=1) for _ in inputs]
        outputs = engine.generate(inputs * len(adapters), sampling, lora_request=requests, use_tqdm=False)
    print(json.dumps([list(output.outputs[0].token_ids) for output in outputs]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
