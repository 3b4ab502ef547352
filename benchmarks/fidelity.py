"""What each station of the road loses: python benchmarks/fidelity.py FOLDER [MODEL] [key=value ...]

Walks MODEL (by default the real chat model that scripts/real_model.py makes) through LoRA, Q-LoRA and full fine-tuning on the project's own
conversations, and each result through merging, quantizing and the bundles that run here, in FOLDER, which keeps what is finished. Beside each station
stand what rounding to the nearest makes of the same weights, peft's merge_and_unload and transformers' save_pretrained. Every loss is that of the
validation split, by `python -m src.evaluate` of the folder as it was saved, or by the bundle's own proof. key=value pairs go to finetune, such as
train.max_steps=25; data.path=FILE to data; plot=FILE.png draws the weights that are saved in 16 bits. On two CPU cores about 40 minutes.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STEPS = {"lora": "train.epochs=1", "qlora": "train.epochs=1", "full": "train.max_steps=25"}
GROUP = "quantizer.group_size=64"  # SmolLM2's widths are multiples of 64


def by_peft(base: Path, adapter: Path, out: Path) -> None:
    """As peft's documents have it: the base in its dtype, the adapter on it, merge_and_unload."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", local_files_only=True)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(adapter).save_pretrained(out)


def by_transformers(exact: Path, out: Path) -> None:
    """As trainers save a model in bf16 that they trained in fp32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(exact, dtype="float32", local_files_only=True).to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(exact).save_pretrained(out)


class Road:
    """The runs in a folder, one for each station; a finished one is not made again."""

    def __init__(self, folder: Path, model: Path, data: str, more: list[str]):
        self.folder, self.model, self.data, self.more = folder, model, data, more
        self.verb("data", "data", f"data.path={data}")

    def verb(self, run: str, verb: str, *argv, name: str | None = None) -> Path:
        """The finished artifact `name` of a run, the verb's own unless given."""
        out = self.folder / run / (name or verb)
        if not (out / "manifest.json").is_file():
            print(f"  {verb} {run} {' '.join(argv)}", file=sys.stderr, flush=True)
            done = subprocess.run(
                [sys.executable, "-m", f"src.{verb}", f"run={run}", f"outputs={self.folder}", *argv],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(done.stderr[-3000:])
        return out

    def peer(self, run: str, how: str, *inputs: Path) -> Path:
        out = self.folder / run / "merge"
        if not (out / "config.json").is_file():
            subprocess.run([sys.executable, __file__, how, *map(str, inputs), str(out)], cwd=ROOT, check=True, capture_output=True)
        return out

    def loss(self, artifact: Path) -> float:
        run = f"measured-{artifact.parent.name}"
        report = self.verb(
            run,
            "evaluate",
            f"source={artifact}",
            f"dataset={self.folder / 'data' / 'data'}",
            "evaluation.samples=0",
            name=f"evaluate-{artifact.name}",
        )
        return json.loads((report / "report.json").read_text())["loss"]

    def tuned(self, tuner: str, run: str, *argv) -> Path:
        given = [f"model.path={self.model}", f"source={self.folder / 'data' / 'data'}", f"tuner={tuner}", STEPS[tuner]]
        return self.verb(run, "finetune", *given, *self.more, *argv)

    def merged(self, run: str, adapter: Path, *argv) -> Path:
        return self.verb(run, "merge", f"source={adapter}", "max_loss_change=100", *argv)

    def int4(self, run: str, model: Path, *argv) -> Path:
        return self.verb(run, "quantize", f"source={model}", f"dataset={self.folder / 'data' / 'data'}", GROUP, *argv)

    def bundle(self, run: str, model: Path, target: str, *argv) -> float:
        out = self.verb(run, "deploy", f"source={model}", f"target={target}", *argv, name=f"deploy-{target}")
        return json.loads((out / "manifest.json").read_text())["metrics"]["loss_after"]


def draw(rows: list[tuple[str, float, float | None]], file: Path) -> None:
    """Bars of what LoRA and full fine-tuning learnt and what of it is saved, up to the base's loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = [
        ("LoRA: adapter on its base", "lora: adapter on its base", "#444444"),
        ("merged in bf16, here", "its merge in bf16, stochastic (the default)", "#2a7f62"),
        ("merged in bf16 by peft", "peft's merge_and_unload in bf16", "#c44e52"),
        ("full: as training reported", "full, as training reported", "#444444"),
        ("saved in bf16, here", "full: as saved in bf16, stochastic (the default)", "#2a7f62"),
        ("saved in bf16 by transformers", "transformers' save_pretrained in bf16", "#c44e52"),
    ]
    losses = {what: loss for what, loss, _ in reversed(rows)}  # LoRA's rows come before Q-LoRA's of the same name
    at = [0, 1, 2, 3.6, 4.6, 5.6]
    figure, axes = pyplot.subplots(figsize=(8, 3.2), layout="constrained")
    values = [losses[name] for _, name, _ in bars]
    axes.barh(at, values, color=[colour for _, _, colour in bars], height=0.75)
    for y, value in zip(at, values):
        axes.text(value + 0.02, y, f"{value:.3f}", va="center", fontsize=9)
    axes.axvline(losses["the base"], color="#999999", linestyle=":", linewidth=1)
    axes.text(losses["the base"] - 0.02, 2.3, "the base, untrained", rotation=90, ha="right", va="center", fontsize=8, color="#777777")
    axes.set_yticks(at, [label for label, _, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, losses["the base"] * 1.05)
    axes.set_xlabel("loss on held-out conversations (nats)", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main(folder: Path, model: Path | None, argv: list[str]) -> None:
    if model is None:
        model = folder / "SmolLM2-135M-Instruct"
        if not model.is_dir() and subprocess.run([sys.executable, ROOT / "scripts" / "real_model.py", model]).returncode:
            sys.exit(7)
    data = next((a.removeprefix("data.path=") for a in argv if a.startswith("data.path=")), str(ROOT / "assets" / "conversations.json"))
    road = Road(folder, model.resolve(), data, [a for a in argv if not a.startswith(("data.path=", "plot="))])
    here = (ROOT / ".venv-openvino").is_dir()
    rows: list[tuple[str, float, float | None]] = []

    def row(what: str, loss: float, before: float | None = None) -> float:
        rows.append((what, loss, before))
        print(f"| {what} | {loss:.4f} | {'' if before is None else f'{loss - before:+.4f}'} |", flush=True)
        return loss

    print(f"model {model.name}, data {Path(data).name}\n\n| | loss on val | from the row it was made of |\n|---|---:|---:|")
    for tuner in ("lora", "qlora"):
        adapter = road.tuned(tuner, tuner)
        trained = json.loads((adapter / "manifest.json").read_text())["metrics"]["val_loss"]
        row(f"{tuner}, as training reported", trained)
        exact = row(f"{tuner}: adapter on its base", road.loss(adapter), trained)
        merge = road.merged(f"{tuner}-bf16", adapter)
        row("its merge in bf16, stochastic (the default)", road.loss(merge), exact)
        row("its merge in bf16, nearest", road.loss(road.merged(f"{tuner}-nearest", adapter, "rounding=nearest")), exact)
        if tuner == "lora":
            row("peft's merge_and_unload in bf16", road.loss(road.peer(f"{tuner}-peft", "--peft", road.model, adapter)), exact)
        row("its merge in fp16, stochastic", road.loss(road.merged(f"{tuner}-fp16", adapter, "dtype=float16")), exact)
        row("its merge in fp32", road.loss(road.merged(f"{tuner}-fp32", adapter, "dtype=float32")), exact)
        int4 = row("GPTQ int4 of the exact sum (the default)", road.loss(road.int4(f"{tuner}-int4", merge)), exact)
        row("GPTQ int4 of the bf16 merge, stochastic", road.loss(road.int4(f"{tuner}-int4-stored", merge, "weights=stored")), int4)
        nearest = road.folder / f"{tuner}-nearest" / "merge"
        row("GPTQ int4 of the bf16 merge, nearest", road.loss(road.int4(f"{tuner}-int4-nearest", nearest, "weights=stored")), int4)
        if tuner == "lora":
            row("llama2c fp32 bundle", road.bundle("lora-fp32-bundle", merge, "llama2c"), exact)
            row("llama2c int8 bundle", road.bundle("lora-int8-bundle", merge, "llama2c", "target.format=int8_v2"), exact)
            if here:
                row("OpenVINO int8 bundle", road.bundle("lora-openvino", merge, "openvino_cpu"), exact)
                row("OpenVINO int4 bundle", road.bundle("lora-openvino-int4", merge, "openvino_npu"), exact)
    full32 = road.tuned("full", "full-fp32", "tuner.dtype=float32")
    trained = row("full, as training reported", json.loads((full32 / "manifest.json").read_text())["metrics"]["val_loss_trained"])
    row("full: its fp32 weights (tuner.dtype=float32)", road.loss(full32), trained)
    full = road.tuned("full", "full")
    row("full: as saved in bf16, stochastic (the default)", road.loss(full), trained)
    row("transformers' save_pretrained in bf16", road.loss(road.peer("full-transformers", "--transformers", full32)), trained)
    int4 = row("GPTQ int4 of the fp32 weights", road.loss(road.int4("full-int4-fp32", full32)), trained)
    row("GPTQ int4 of the bf16 weights, stochastic", road.loss(road.int4("full-int4", full)), int4)
    row("the base", road.loss(road.model))
    for option in argv:
        if option.startswith("plot="):
            draw(rows, Path(option.removeprefix("plot=")))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peft"]:
        by_peft(*map(Path, sys.argv[2:]))
    elif sys.argv[1:2] == ["--transformers"]:
        by_transformers(*map(Path, sys.argv[2:]))
    elif not sys.argv[1:]:
        sys.exit("usage: python benchmarks/fidelity.py FOLDER [MODEL] [key=value ...]")
    else:
        rest = sys.argv[2:]
        main(Path(sys.argv[1]).resolve(), Path(rest.pop(0)) if rest and "=" not in rest[0] else None, rest)
