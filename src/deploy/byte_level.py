"""What is fixed about byte-level BPE tokenizers, for drivers that carry one to a board."""

# How tokenizer.json files cut text into words, by a name of ours. Sources: GPT-2's encoder.py, Llama 3's, Qwen2's and Qwen3.5's tokenizer.json.
SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama3",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen3_5",
}


def symbol_bytes() -> dict[str, int]:
    """GPT-2's printable stand-in -> byte, as in its encoder.py: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def steps_of(step: dict | None, key: str) -> list[dict]:
    """The steps of a tokenizer.json's normalizer or pre-tokenizer, of which a sequence holds several under `key`."""
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]
