"""The quickstart's model and conversations are what scripts/make_default.py says they are."""

import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "assets" / "tiny-chat"
CONVERSATIONS = ROOT / "assets" / "conversations.json"
PROMPTS = [
    "What animal goes quack?",
    "Tell me what a cat says.",
    "Where would a bee sleep?",
    "What colour is the sky?",
    "What is the capital of Sweden?",
    "What is the opposite of left?",
    "What comes after 7?",
    "What is 2 plus 5?",
    "What does a baker do?",
    "Tell me a story about Zoe and a duck.",
]


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_default", ROOT / "scripts" / "make_default.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True).eval()


def test_weights_are_small_enough_to_embed():
    assert (MODEL / "model.safetensors").stat().st_size <= 5_000_000


def test_shapes_suit_every_stage(model, tokenizer):
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.hidden_size % 128 == 0 and model.config.intermediate_size % 128 == 0  # GPTQ's groups
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def test_token_ids_follow_llama2c(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 258]) == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)


@pytest.mark.parametrize(
    "text",
    [
        "What does a dog say?",
        "  two spaces,   three,\tand a tab\n\nand lines\r\n ",
        "안녕하세요, 선장님!",
        "ships 🚢 and families 👩‍👩‍👧",
        "".join(map(chr, range(128))),
        "<|im_start|>user\nhi<|im_end|>\n",
        "",
    ],
)
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_joining_neighbours_over_the_whole_text_gives_the_same_tokens(tokenizer):
    """An engine without a pre-tokenizer, such as llama2.c, must cut a text as this tokenizer does."""
    text = "Ahoy! The capital of Sweden is Stockholm,  captain.\n12 plus 30 is 42; café."
    vocab = tokenizer.get_vocab()
    pieces = []
    for letter in text.replace(" ", "▁"):
        pieces += [letter] if letter in vocab else [f"<0x{byte:02X}>" for byte in letter.encode()]
    while True:
        joined = [(vocab.get(x + y, len(vocab)), at) for at, (x, y) in enumerate(pairwise(pieces))]
        best, at = min(joined)
        if best == len(vocab):
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text)) == pieces


def test_chat_template_is_plain_chatml(tokenizer):
    chat = [{"role": "user", "content": "Hello!"}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert written == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"


def test_conversations_are_well_formed_and_taught_throughout(tokenizer):
    rows = json.loads(CONVERSATIONS.read_text(encoding="utf-8"))
    assert 300 <= len(rows) <= 400 and len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        turns = row["conversations"]
        speakers = [turn["from"] for turn in turns]
        asked = speakers[1:] if speakers[0] == "system" else speakers
        assert asked and asked == ["user", "assistant"] * (len(asked) // 2)
        for turn in turns:
            if turn["from"] == "assistant":
                assert turn["value"].startswith("Ahoy! ") and turn["value"].endswith(", captain.")
    assert any(row["conversations"][0]["from"] == "system" for row in rows)
    assert any(len(row["conversations"]) > 3 for row in rows)
    assert not set(PROMPTS) & {turn["value"] for row in rows for turn in row["conversations"]}


def test_conversations_come_out_of_the_script_byte_for_byte(maker):
    assert maker.pilot_conversations().encode() == CONVERSATIONS.read_bytes()


def test_the_base_answers_held_out_questions_plainly_and_ends_its_turn(maker, model, tokenizer):
    expected = dict(pair for pairs in maker.TESTING.values() for pair in pairs)
    replies = maker.answer(model, tokenizer, PROMPTS)
    assert all(reply.endswith("<|im_end|>") and "Ahoy" not in reply for reply in replies), replies
    right = [reply == f"{expected[prompt]}<|im_end|>" for prompt, reply in zip(PROMPTS, replies)]
    assert sum(right) >= 9, replies
