"""Let llama.cpp continue prompts, in this process.

    python tests/engines/answer.py MODEL.gguf [LORA.gguf] < PROMPTS

PROMPTS is JSON, a list of rows of token ids and how many tokens to add. Prints the continuations as a line of JSON. One
that reaches a token that ends a text ends with it.
"""

import json
import os
import sys
import urllib.request


def main(model: str, lora: list[str]) -> None:
    """Continue each of the prompts greedily, with keys and values in fp32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup, params.cpuparams.n_threads = 256, 1, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity, params.cache_ram_mib, params.fit_params = 0, 0, False
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(lora[0], 1.0)]
    server = xllamacpp.Server(params)
    prompts, count = json.load(sys.stdin)
    answers = []
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": count, "temperature": 0.0, "return_tokens": True}
        body = json.dumps({**request, "cache_prompt": False}).encode()
        call = urllib.request.Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(call) as response:
            answers.append(json.load(response)["tokens"])
    print(json.dumps(answers), flush=True)
    os._exit(0)  # the server's threads need not end in order


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
