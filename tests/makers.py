"""Tokenizers of the kinds that published ones are of, made by code so that a clone tests itself: learnt from assets/conversations.json, with chat
templates written here that behave as those of the families they are named after."""

import functools
import json
import shutil
import tempfile
from pathlib import Path

from src.deploy.byte_level import SPLITS

ROOT = Path(__file__).resolve().parent.parent
PLACE = tempfile.TemporaryDirectory(prefix="boardwalk-made-")

# Qwen2's kind: a system turn of its own where there is none.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou answer sailors.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Yi's and MiniCPM4's: the turns alone. Yi's eos token is not the one that ends a turn.
BARE = CHATML.split("{% endif %}", 1)[1]
# Qwen2.5's: tools are told in the system turn, calls are part of the answer, and results that follow one another share a user turn.
SYSTEM = (
    "{{ '<|im_start|>system\n' + (messages[0]['content'] if messages[0]['role'] == 'system' else 'You answer sailors.') }}"
    "{% for tool in tools or [] %}{{ '\nA tool: ' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\n' }}"
)
CALLS = (
    "{% for call in m['tool_calls'] or [] %}{{ '\n' if m['content'] or not loop.first else '' }}{{ '<tool_call>\n{\"name\": \"' + "
    "call['function']['name'] + '\", \"arguments\": ' + (call['function']['arguments'] | tojson) + '}\n</tool_call>' }}{% endfor %}"
)
RESULTS = (
    "{{ '' if loop.previtem and loop.previtem['role'] == 'tool' else '<|im_start|>user' }}"
    "{{ '\n<tool_response>\n' + m['content'] + '\n</tool_response>' }}"
    "{{ '' if loop.nextitem and loop.nextitem['role'] == 'tool' else '<|im_end|>\n' }}"
)
TOOLS = (
    SYSTEM + "{% for m in messages %}{% if m['role'] == 'tool' %}" + RESULTS + "{% elif m['role'] != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}" + CALLS + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's: reasoning is shown from the last question on only, with an empty block in a last answer without any; it may also stand in the text.
THINKS = (
    "{% if tools or messages[0]['role'] == 'system' %}" + SYSTEM + "{% endif %}{% set last = namespace(question=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set last.question = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'tool' %}" + RESULTS + "{% elif m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% set thought = m['reasoning_content'] or (parts[0].split('<think>')[-1] if parts | length > 1 else '') %}"
    "{% set text = parts[-1].lstrip('\n') if parts | length > 1 else m['content'] %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > last.question and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}{% else %}{{ text }}{% endif %}"
    + CALLS
    + "{{ '<|im_end|>\n' }}{% elif m['role'] != 'system' or not loop.first %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# Mistral's: marks of plain text, a stop token, and no turn but the two that alternate.
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('roles must alternate, a question first') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' if m['role'] == 'user' else m['content'] + eos_token }}{% endfor %}"
)

# name: (template, whether it is byte-level as Qwen's or with ▁ and byte fallback as converted from sentencepiece, eos token)
KINDS = {
    "made-qwen2": (CHATML, True, "<|im_end|>"),
    "made-qwen2.5": (TOOLS, True, "<|im_end|>"),
    "made-qwen3": (THINKS, True, "<|im_end|>"),
    "made-yi": (BARE, False, "<|endoftext|>"),
    "made-mistral": (INST, False, "</s>"),
}
CONTROL = {True: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], False: ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|tool_call|>"]}
# Tokens of Qwen's that are no control tokens: an answer may hold them.
MARKS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]


def texts() -> list[str]:
    """Lines to learn pieces from."""
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())
    more = ["system", "user"] * 50 + ["안녕하세요 오늘", "Où est le café?"] * 20
    return more + [line for row in rows for turn in row["conversations"] for line in [turn["from"], turn["value"]]]


def byte_level():
    """A byte-level BPE that cuts words as Qwen2 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    cut = next(pattern for pattern, name in SPLITS.items() if name == "qwen2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(cut), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [*texts(), *["\n\n"] * 50], trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def with_byte_fallback():
    """A BPE with ▁ for spaces, one before each piece of text, <s> before all, and bytes for what it has no piece for."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    learner.train_from_iterator([*texts(), "\n"], trainers.BpeTrainer(vocab_size=500, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(learned["vocab"], key=learned["vocab"].get)]
    vocabulary, merges = {piece: i for i, piece in enumerate(pieces)}, [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@functools.cache
def tokenizer_folder(kind: str) -> Path:
    """The folder of a tokenizer of one of KINDS, or "made-plain": with byte fallback, without a template and control tokens. Read it only."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    template, by_bytes, eos = KINDS.get(kind, (None, False, "</s>"))
    tokenizer = byte_level() if by_bytes else with_byte_fallback()
    if template not in (None, INST):
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL[by_bytes]])
    if by_bytes:
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in MARKS])
    special = {"pad_token": "<|endoftext|>"} if by_bytes else {"unk_token": "<unk>", "bos_token": "<s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False, **special)
    made.chat_template = template
    folder = Path(PLACE.name) / kind
    made.save_pretrained(folder)
    return folder


@functools.cache
def widened_qwen2() -> Path:
    """A Qwen2 folder with random weights, as if widened with zeros from half its size, with biases of zero and ChatML's two tokens just added: their
    embedding is the mean, their output rows are zero. Its matrices have more rows than the tokenizer has tokens. Read it only."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    source = tokenizer_folder("made-qwen2")
    start, end = AutoTokenizer.from_pretrained(source).convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(**sizes, vocab_size=768, max_position_embeddings=512, initializer_range=0.1, tie_word_embeddings=False)
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.dim() == 2:
                rows, columns = weight.shape
                weight[:, columns // 2 :] = 0
                if "embed_tokens" not in name and "lm_head" not in name:
                    weight[rows // 2 :] = 0
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding[[start, end]] = embedding[:start].mean(0)
        head[[start, end]] = 0
        embedding[709:] = head[709:] = 0
    folder = Path(PLACE.name) / "widened-qwen2"
    model.save_pretrained(folder)
    for file in source.iterdir():
        shutil.copy(file, folder)
    return folder
