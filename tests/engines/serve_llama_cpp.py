"""Serve a model with llama.cpp's server until this process ends.

    python tests/engines/serve_llama_cpp.py MODEL.gguf

Prints the address when it is ready. Chat templates and tools are on, keys and values are in fp32.
"""

import sys
import threading


def main(model: str) -> None:
    """Start the server, print its address, and wait for a signal."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 1024, 1, False, True
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity, params.cache_ram_mib, params.fit_params = 0, 0, False
    server = xllamacpp.Server(params)  # it ends with this object
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
