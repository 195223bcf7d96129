"""Let vLLM continue prompts, one model after the other in this process.

    python tests/engines/answer_vllm.py < TASKS

TASKS is JSON: a list of [model, adapters, prompts, how many tokens to add], with prompts as rows of token ids. With
adapters, all of them answer in one batch. Prints a line of JSON for each task: the continuations of the model, or those
of each adapter in turn, or the error as text.
"""

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main(tasks: list[Any]) -> None:
    """Print what each task gives."""
    from vllm.distributed import cleanup_dist_env_and_memory

    answers, sys.stdout = sys.stdout, sys.stderr
    for task in tasks:
        try:
            result = continue_prompts(*task)
        except Exception as error:  # of another package, for one of many models
            result = f"{type(error).__name__}: {error}"
        print(json.dumps(result), file=answers, flush=True)
        cleanup_dist_env_and_memory()


def continue_prompts(model: str, adapters: list[str], prompts: list[list[int]], count: int) -> list[list[int]]:
    """Continue each of the prompts greedily in fp32."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    loras = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 16} if adapters else {}
    engine = LLM(model, dtype="float32", enforce_eager=True, max_model_len=128, skip_tokenizer_init=True, **loras)
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    requests = None
    if adapters:
        requests = [LoRARequest(f"lora{i}", i, path) for i, path in enumerate(adapters, start=1) for _ in prompts]
    outputs = engine.generate(inputs * max(1, len(adapters)), sampling, lora_request=requests, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    main(json.load(sys.stdin))
