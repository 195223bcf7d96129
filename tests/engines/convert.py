"""Convert checkpoints with llama.cpp's own converter, in one process, by the transformers that is imported.

    python tests/engines/convert.py LLAMA_CPP FOLDER SUFFIX BASE NAME ...

FOLDER/NAME becomes FOLDER/NAME-SUFFIX.gguf in fp32. BASE is the base of those that are LoRA adapters. Prints a line of
JSON: the version of transformers, and the error of each name, null if it was converted.
"""

import contextlib
import io
import json
import logging
import runpy
import sys
from pathlib import Path


def main(llama_cpp: Path, folder: Path, suffix: str, base: str, names: list[str]) -> None:
    """Convert each of the checkpoints and adapters."""
    sys.path.insert(0, str(llama_cpp))
    import transformers

    errors: dict[str, str | None] = {}
    for name in names:
        out, is_lora = folder / f"{name}-{suffix}.gguf", (folder / name / "adapter_config.json").exists()
        program = llama_cpp / ("convert_lora_to_gguf.py" if is_lora else "convert_hf_to_gguf.py")
        options = ["--base", base] if is_lora else []
        sys.argv = [program.name, str(folder / name), "--outfile", str(out), "--outtype", "f32", *options]
        try:
            with contextlib.redirect_stderr(io.StringIO()) as log:
                runpy.run_path(str(program), run_name="__main__")
            errors[name] = None if out.exists() else "it wrote no file"
        except SystemExit:
            errors[name] = (log.getvalue().strip().splitlines() or ["it gave no reason"])[-1][:300]
        except Exception as error:
            errors[name] = f"{type(error).__name__}: {error}"[:300]
        logging.getLogger().handlers.clear()
    print(json.dumps({"transformers": transformers.__version__, "errors": errors}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
