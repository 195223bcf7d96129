"""Measure vLLM on a CPU with several LoRA adapters on one prompt; `shared_prompt.py --vllm` runs it.

    PYTHON benchmarks/vllm_adapters.py DTYPE ROUNDS BASE ADAPTER ... < PROMPT

PYTHON is an interpreter that has vLLM, and PROMPT a JSON list of token ids. Prints a line of JSON for each round.
"""

import json
import os
import sys
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def main(dtype: str, rounds: int, base: str, adapters: list[str]) -> None:
    """Let each adapter generate a token, one after the other; the cache of the prompt begins empty in each round."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    prompt = json.load(sys.stdin)
    engine = LLM(
        base,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=len(prompt) + 32,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=len(adapters),
        max_lora_rank=16,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    requests = [LoRARequest(f"lora{i}", i, path) for i, path in enumerate(adapters, start=1)]
    cache = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    block_bytes = sum(part.size for part in cache.kv_cache_config.kv_cache_tensors) // cache.kv_cache_config.num_blocks
    for _ in range(rounds):
        engine.reset_prefix_cache()
        started, used, times = time.perf_counter(), time.process_time(), []
        for request in requests:
            engine.generate({"prompt_token_ids": prompt}, sampling, lora_request=request, use_tqdm=False)
            times.append(time.perf_counter() - started)
        cpu = time.process_time() - used
        cached = sum(block.block_hash is not None for block in cache.block_pool.blocks) * block_bytes
        print(json.dumps({"first_tokens_s": times, "cpu_s": cpu, "cache_bytes": cached}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:])
