"""The bundle against transformers: its token ids, its chat template and its greedy answers on this machine's CPU, whatever device it is for."""

import json
from collections.abc import Callable
from pathlib import Path

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import ProofFailed
from src.core.files import read_json
from src.core.log import say, warn
from src.deploy import answers, contract
from src.deploy.openvino import recipe
from src.deploy.openvino.exporter import ANOTHER, READ
from src.models import fidelity, seen
from src.models.generation import stop_ids
from src.settings.targets import Openvino

TOKENS = 64
INSIDE = Path(__file__).with_name("inside.py")


def questioner(target: Openvino, bundle: Path, work: Path) -> Callable[..., dict]:
    """ask(do, **what) -> the answer of inside.py, run by the environment's interpreter; it lists what can be asked."""
    return answers.questioner(recipe.python(target), INSIDE, work, "OpenVINO", READ, bundle=str(bundle.absolute()), device="CPU")


def unmade_pieces(tokenizer) -> list[str]:
    """Pieces of a byte-level BPE vocabulary that no merge makes. Hugging Face's tokenizers never give them for a text; openvino_tokenizers 2026.4 takes
    each for an indivisible character and does. Only their encoding is in question: the model may say them, so the detokenizer keeps them."""
    if not tokenizer.is_fast:
        return []
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = spec["model"], {token["content"] for token in spec["added_tokens"]}
    if model["type"] != "BPE" or model.get("ignore_merges") or '"ByteLevel"' not in json.dumps(spec["pre_tokenizer"]):
        return []
    made = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model["merges"]}
    return [piece for piece in model["vocab"] if len(piece) > 1 and piece not in made and piece not in added]


def mend_tokenizer(tokenizer, model_dir: Path, ask: Callable[..., dict], *, trust: bool) -> int:
    """Have openvino_tokenizer.xml made anew without the unmade pieces, if there are any; returns how many."""
    if pieces := unmade_pieces(tokenizer):
        say(
            f"tokenizer: {len(pieces)} pieces that no merge makes, such as {pieces[-1]!r}, are left out of OpenVINO's encoder, which would use them"
        )
        ask("convert", model=str(model_dir.absolute()), trust=trust, unmade=pieces)
    return len(pieces)


def prove_ids(tokenizer, out: Path, ask: Callable[..., dict]) -> dict:
    """contract.json and its counts: openvino_tokenizer.xml gives the model's own token ids, and the runtime renders the model's own template."""
    counts = contract.prove(tokenizer, out, lambda texts: ask("encode", texts=texts)["ids"])
    talks = json.loads((out / contract.FILE).read_text("utf-8"))["conversations"]
    rendered = ask("render", conversations=[{"messages": t["messages"], "tools": t["tools"]} for t in talks])["texts"] if talks else []
    differ = [talk for talk, text in zip(talks, rendered, strict=True) if text != talk["text"]]
    if plain := [talk["name"] for talk in differ if not talk["tools"]]:
        raise ProofFailed(
            f"OpenVINO GenAI renders the model's chat template otherwise than transformers: {', '.join(plain)}",
            where=str(out / "openvino_tokenizer.xml"),
        )
    if differ:
        warn(
            "OpenVINO GenAI renders tools otherwise than transformers; render such conversations with transformers before the bundle gets them"
        )
    return {**counts, "template_equal": len(talks) - len(differ)}


def prove(start: Artifact, out: Path, tokenizer, target: Openvino, ask: Callable[..., dict], dataset: Path | None) -> dict:
    """OpenVINO's greedy answers, and what was lost on held-out rows, on this CPU against transformers in fp32, layer by layer."""
    config = read_json(start.path / "config.json")
    limit = min(target.context_len, config.get("max_position_embeddings") or target.context_len)
    asked = answers.prompts(out, tokenizer, min(target.prompt_len, limit - TOKENS))
    if not asked:
        raise ProofFailed(f"no prompt leaves room for an answer of {TOKENS} tokens in {limit}", where=str(out))
    answer = ask("answer", prompts=asked, tokens=TOKENS)
    check_ends(answer["ids"], set(stop_ids(start.path, tokenizer)), out)
    held = fidelity.held_out(dataset, tokenizer, start.path)
    before = seen.observe(fidelity.reader(start, "float32"), [*answers.rows_of(asked, answer["ids"]), *held])
    made = sum(map(len, answer["ids"]))
    narrow = target.weight_type == "int4"
    metrics = answers.judge(
        answer["ids"], before[:made], 0.5 if narrow else 0.9, "OpenVINO", "target.weight_type=int8" if narrow else ANOTHER
    )
    return (
        metrics
        | {key: answer[key] for key in ("tokens_per_second", "first_token_ms", "load_seconds")}
        | lost(before[made:], held, ask, target)
    )


def lost(before: seen.Seen, rows: list[encoding.Encoded], ask: Callable[..., dict], target: Openvino) -> dict:
    """What the bundle, as OpenVINO computes it here, says at held-out rows, against `before`; see fidelity."""
    if not rows:
        return {}
    told = ask("observe", rows=answers.questions(before, rows))["rows"]
    change = fidelity.compare(before, answers.seen_of(before, told), len(rows))
    ways = "target.weight_type=int8 loses less" if target.weight_type == "int4" else ""
    return fidelity.report("openvino", change, f"in {target.weight_type}", ways)


def check_ends(said: list[list[int]], stops: set[int], out: Path) -> None:
    """Raises ProofFailed for an answer that stops early or runs on."""
    for ours in said:
        if not ours or (len(ours) < TOKENS and ours[-1] not in stops) or stops & set(ours[:-1]):
            raise ProofFailed(
                f"OpenVINO's answer of {len(ours)} tokens does not end where the model's stop tokens {sorted(stops)} say: {ours[-8:]}",
                where=str(out / "generation_config.json"),
                fix="put every token that ends a turn into eos_token_id of the model's generation_config.json",
            )
