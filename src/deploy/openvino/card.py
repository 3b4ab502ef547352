"""What lies beside the exporter's files in a bundle: run.py, which answers a prompt on the device, and README.md."""

from pathlib import Path

from src.settings.targets import Openvino
from src.sizing.shape import ModelShape

RUN = '''"""python run.py "your prompt" [{device}]: the answer, token by token. On an NPU the first start compiles the model into .cache."""

import sys
from pathlib import Path

import openvino_genai

here, (prompt, device) = Path(__file__).parent, (sys.argv[1:] + ["{device}"])[:2]
options = {{"MAX_PROMPT_LEN": {prompt_len}, "MIN_RESPONSE_LEN": {answer_len}, "CACHE_DIR": str(here / ".cache")}} if device == "NPU" else {{}}
pipe = openvino_genai.LLMPipeline(str(here), device, **options)
pipe.generate(prompt, max_new_tokens={answer_len}, streamer=lambda text: print(text, end="", flush=True))
print()
'''

README = """# A language model for OpenVINO

{family}, {params:,} parameters, weights as {weights}. Made for {device}; the same folder loads on Intel NPUs and GPUs, and on any CPU OpenVINO runs on.

Copy this folder to the machine, then there:

    pip install "openvino-genai>=2026.4"
    python run.py "Tell me a story."{other}

Prompts of at most {prompt_len} tokens, {context_len} with the answer. In your own program:

    import openvino_genai
    pipe = openvino_genai.LLMPipeline("THIS_FOLDER", "{device}"{options})
    print(pipe.generate("Tell me a story.", max_new_tokens=100))

{note}`generate` puts the prompt through the model's own chat template, which is in openvino_tokenizer.xml.

| file | what it is |
|---|---|
| openvino_model.xml, .bin | the graph and its weights |
| openvino_tokenizer.xml, .bin, openvino_detokenizer.xml, .bin | text to token ids and back |
| config.json, generation_config.json, tokenizer*.json | the model's own, for tools that ask for them |
| contract.json | conversations and their token ids, equal in training, template and openvino_tokenizer.xml |
| export.json, export.log | what was run to make this, with which versions, and what it said |
| manifest.json | where it came from, and every file's hash |
"""
NPU_NOTE = """An NPU needs Intel's driver and is compiled for these two lengths; a longer prompt is refused. The Linux packages of OpenVINO on PyPI bring no
NPU compiler of their own: the driver's is used.

"""


def write(out: Path, shape: ModelShape, target: Openvino, weights: str) -> None:
    """run.py and README.md for a bundle in the folder `out`."""
    answer_len = target.context_len - target.prompt_len
    lengths = {"prompt_len": target.prompt_len, "context_len": target.context_len, "answer_len": answer_len, "device": target.device}
    npu = target.device == "NPU"
    (out / "run.py").write_text(RUN.format(**lengths), "utf-8")
    (out / "README.md").write_text(
        README.format(
            **lengths,
            family=shape.model_type,
            params=shape.params,
            weights=weights,
            other=' CPU    # without the second word: on "NPU"' if npu else "",
            options=f", MAX_PROMPT_LEN={target.prompt_len}, MIN_RESPONSE_LEN={answer_len}" if npu else "",
            note=NPU_NOTE if npu else "",
        ),
        "utf-8",
    )
