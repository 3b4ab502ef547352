"""What a model does otherwise under AXERA's runtimes than in training, as lines for the log and the bundle's README: nothing of it stops it."""

from src.chat import encoding
from src.core.errors import BadData
from src.deploy.axera.tokenizer_txt import Reader, spec_of
from src.deploy.byte_level import steps_of

UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
THOUGHT = "17 is prime"


def of_the_reader(tokenizer, reader: Reader, entries: list[tuple[str, str, list[int]]]) -> list[str]:
    """Texts that axllm's tokenizer, of this year or an older one, cuts otherwise. entries: (name, text, ids) of the bundle's contract."""
    spec, lines = spec_of(tokenizer), []
    if spec["model"].get("ignore_merges"):
        split, whole = reader.split_pieces(spec["model"]["vocab"])
        if split:
            lines.append(
                f"the tokenizer takes a word that is a piece whole (ignore_merges), axllm by its merge rules: {len(split):,} of {whole:,} pieces, such as "
                f"{', '.join(repr(word) for word in split[:3])}, get other ids there"
            )
    forms = sorted({step["type"] for step in steps_of(spec.get("normalizer"), "normalizers")} & UNICODE_FORMS)
    if forms:
        lines.append(
            f"the tokenizer brings text into Unicode's form {' and '.join(forms)} first, axllm does not: text in another form, such as Korean typed or named on "
            "macOS (NFD), gets other ids there"
        )
    older = [name for name, text, ids in entries if reader.encode(text, knows_family=False) != ids]
    if older:
        lines.append(
            "axllm builds from before 2026, which read no third number in tokenizer.txt, cut words by ASCII letters, digits and signs and drop '_': "
            f"{len(older)} of the contract's {len(entries)} texts get other ids there ({', '.join(older)})"
        )
    return lines


def of_history(tokenizer, type: str) -> list[str]:
    """Whether the template takes an earlier answer's thoughts out, which axllm leaves in its history for every type but Gemma4."""
    if type == "Gemma4" or not tokenizer.chat_template:
        return []
    turns = [("user", "Is 17 prime?"), ("assistant", f"<think>\n{THOUGHT}\n</think>\n\nYes."), ("user", "And 18?")]
    try:
        text = encoding.render(tokenizer, [{"role": role, "content": content} for role, content in turns], prompt=True)
    except BadData:
        return []
    if THOUGHT in text:
        return []
    return [
        "the template takes the thoughts of earlier answers out of a conversation, axllm leaves them in: long talks fill the context sooner"
    ]


def of_sampling(post_config: dict, topk: int) -> list[str]:
    """What axllm makes of post_config.json's settings. topk: candidates that the output layer gives instead of logits, 0: all logits."""
    lines = []
    if topk:
        lines.append(
            f"the output layer gives {topk} candidates instead of logits (target.post_topk): the older main reads them; whether axllm does is not known"
        )
    if post_config["enable_top_p_sampling"] and post_config["enable_top_k_sampling"]:
        lines.append(
            f"the model asks for top_p {post_config['top_p']} and top_k {post_config['top_k']} together; in axllm only top_p acts then. "
            "enable_top_p_sampling=false in post_config.json lets top_k act instead"
        )
    if post_config["enable_repetition_penalty"]:
        lines.append(
            f"the model asks for a repetition penalty of {post_config['repetition_penalty']}; axllm applies its square root, over the last "
            f"{post_config['penalty_window']} tokens alone"
        )
    return lines
