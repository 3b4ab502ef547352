"""A stand-in for the Python of an environment with OpenVINO's exporter: `make(folder)` writes an environment whose bin/python is this file.

It knows the two ways in which it is called: `-I -m optimum.commands.optimum_cli export openvino ...` writes files of the exporter's names, and
`-I inside.py QUESTION ANSWER` answers from the model folder by transformers. Nothing is converted. The exporter's words below were printed by
optimum-intel 2.2.0 with nncf 3.4.0.

STAND_IN: a JSON object: fault (see below), log (file that gets each argv).
"""

import json
import os
import shutil
import sys
from pathlib import Path

VERSIONS = {
    "openvino": "2026.4.1",
    "openvino_genai": "2026.4.1.0",
    "openvino_tokenizers": "2026.4.1.0",
    "optimum_intel": "2.2.0",
    "nncf": "3.4.0",
    "transformers": "5.5.4",
    "torch": "2.13.0+cpu",
}
TABLE = """INFO:nncf:Statistics of the bitwidth distribution:
┍━━━━━━━━━━━━━━━━━━━━━━━━━━━┯━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┯━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┑
│ Weight compression mode   │ % all parameters (layers)   │ % ratio-defining parameters (layers)   │
┝━━━━━━━━━━━━━━━━━━━━━━━━━━━┿━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┿━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┥
│ float                     │ 0% (1 / 37)                 │ 0% (0 / 35)                            │
├───────────────────────────┼─────────────────────────────┼────────────────────────────────────────┤
│ int8_asym, per-channel    │ 13% (1 / 37)                │ 0% (0 / 35)                            │
├───────────────────────────┼─────────────────────────────┼────────────────────────────────────────┤
│ int4_sym, group size 128  │ 87% (35 / 37)               │ 100% (35 / 35)                         │
┕━━━━━━━━━━━━━━━━━━━━━━━━━━━┷━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┷━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━┙
"""
DYING = {
    "killed": ("Loading weights:  40%", 137),
    "torchvision": ("RuntimeError: operator torchvision::nms does not exist", 1),
    "family": ("ValueError: The checkpoint you are trying to load has model type `ministral9` but Transformers does not recognize this", 1),
    "group": ('\t"__module.model.layers.0.mlp.down_proj/aten::linear/MatMul" (channel size: 172)\n\t"q_proj" (channel size: 64)', 1),
    "disk": ("OSError: [Errno 28] No space left on device", 1),
    "broken": ("ModuleNotFoundError: No module named 'optimum'", 1),
    "other": ("ValueError: something nobody has seen before", 1),
}
FILES = ("openvino_model.xml", "openvino_model.bin", "openvino_detokenizer.xml", "openvino_detokenizer.bin", "openvino_tokenizer.bin")


def make(folder: Path, without: str = "") -> Path:
    """The environment, but for one package; returns its folder."""
    site = folder / "lib" / "python3.11" / "site-packages"
    for name, version in VERSIONS.items():
        if name != without:
            (site / f"{name}-{version}.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    python.chmod(0o755)
    return folder


def export(argv: list[str], fault: str | None) -> int:
    model, out = Path(argv[argv.index("--model") + 1]), Path(argv[-1])
    assert os.environ["HF_HUB_OFFLINE"] == "1" and Path(os.environ["TMPDIR"]) == Path.cwd()
    if fault in DYING:
        words, code = DYING[fault]
        print(words)
        return code
    print("Loading weights: 100%\r\nTracerWarning: Converting a tensor\n" + TABLE, flush=True)
    out.mkdir()
    for name in FILES:
        (out / name).write_text("x")
    (out / "openvino_tokenizer.xml").write_text(str(model))
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out)
    (out / "openvino_config.json").write_text(json.dumps({"quantization_config": {"tokenizer": str(model), "bits": 4}}))
    if fault == "no_tokenizer":
        print("OpenVINO Tokenizer export for FunnyTokenizer is not supported.")
        (out / "openvino_tokenizer.xml").unlink()
    if fault == "empty":
        (out / "openvino_model.bin").write_text("")
    return 0


def inside(question: dict, fault: str | None) -> dict:
    if fault == "crash":
        sys.exit("RuntimeError: Exception from src/core/src/model.cpp")
    model = Path(question["bundle"], "openvino_tokenizer.xml").read_text()
    if question["do"] == "encode":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in question["texts"]]
        if fault == "ids":
            ids[3][5] += 1
        return {"ids": ids}
    if question["do"] == "render":
        return {"texts": [_render(talk, fault) for talk in question["conversations"]]}
    if question["do"] == "observe":
        return {"rows": _observed(model, question["rows"])}
    return {"ids": _answers(model, question, fault), "tokens_per_second": 100.0, "first_token_ms": 5.0, "load_seconds": 0.5}


def _render(talk: dict, fault: str | None) -> str | None:
    """assets/tiny-chat's template, by hand."""
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk["messages"]) + "<|im_start|>assistant\n"
    if talk["tools"] and fault == "tools":
        return f"<|im_start|>system\n{talk['tools']}<|im_end|>\n{text}"
    return text.replace("system", "System") if fault == "template" else text


def _answers(model: str, question: dict, fault: str | None) -> list[list[int]]:
    if fault == "garbage":
        return [[(7 * i) % 900 + 3 for i in range(question["tokens"])] for _ in question["prompts"]]
    if fault == "short":
        return [[17, 18] for _ in question["prompts"]]
    import torch
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {
        "do_sample": False,
        "max_new_tokens": question["tokens"],
        "max_length": None,
        "eos_token_id": net.generation_config.eos_token_id,
    }
    made = []
    for row in question["prompts"]:
        given = torch.tensor([row])
        made.append(net.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **options)[0, len(row) :].tolist())
    return made


def _observed(model: str, rows: list[dict]) -> list[dict]:
    import torch
    from transformers import AutoModelForCausalLM

    net, found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), []
    for row in rows:
        with torch.no_grad():
            log_probs = net(torch.tensor([row["ids"]])).logits[0, row["keep"]].log_softmax(-1)
        losses, known = -log_probs[range(len(log_probs)), row["targets"]], log_probs.gather(1, torch.tensor(row["top_k_ids"]))
        found.append({"losses": losses.tolist(), "log_probs": known.tolist(), "likeliest": log_probs.argmax(-1).tolist()})
    return found


if __name__ == "__main__":
    settings = json.loads(os.environ.get("STAND_IN", "{}"))
    if settings.get("log"):
        with open(settings["log"], "a") as log:
            log.write(json.dumps(sys.argv[1:]) + "\n")
    if "optimum.commands.optimum_cli" in sys.argv:
        sys.exit(export(sys.argv[1:], settings.get("fault")))
    asked = json.loads(Path(sys.argv[-2]).read_text())
    Path(sys.argv[-1]).write_text(json.dumps(inside(asked, settings.get("fault"))))
