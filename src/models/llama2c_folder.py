"""model.bin and tokenizer.bin of karpathy/llama2.c, read back into a folder that transformers and this project load.

What these files do not say is llama2.c's own: a rope base of 10,000, an epsilon of 1e-5, tokens 1 and 2 that begin and end a text, at either of which its
programs stop, and a sentencepiece BPE whose merges follow from the scores of its pieces.
"""

import json
import struct
from pathlib import Path
from typing import Any

from src.core.errors import AGAIN, BadData, WrongKind
from src.core.files import write_json
from src.models import safetensors_io
from src.models.llama2c_file import FREQUENCIES, HEADER, MAGIC, ROPE_TABLES, Form, Shape, header, layout, reader_of

BOS, EOS = 1, 2
MOST = 1 << 24
"""of any size in a header"""


def read_header(path: Path) -> tuple[Shape, Form]:
    """Sizes and form of a model.bin, held against the file's own size. Raises BadData where they do not fit, WrongKind for version 3."""
    with open(path, "rb") as file:
        head = file.read(HEADER)
    if len(head) < HEADER:
        raise BadData("it is too short for a model.bin of llama2.c", where=str(path), fix=AGAIN)
    magic, version = struct.unpack("<Ii", head[:8])
    if magic != MAGIC:
        version = 0
    elif version not in (1, 2):
        raise WrongKind(
            f"a model.bin of version {version}; llama2.c's are 0, 1 and 2, and 3 is made here from a Hugging Face folder",
            where=str(path),
            fix="take that folder, which manifest.json beside the file names",
        )
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("<7i", head[:28] if version == 0 else head[8:36])
    shared = vocab > 0 if version == 0 else head[36] != 0
    group = struct.unpack("<i", head[37:41])[0] if version == 2 else 0
    sizes = (dim, hidden, layers, heads, kv_heads, abs(vocab), context)
    if (
        not all(0 < size <= MOST for size in sizes)
        or dim % heads
        or heads % kv_heads
        or (version == 2 and (group < 1 or dim % group or hidden % group))
    ):
        raise BadData("it is no model.bin of llama2.c: its header has sizes that no model has", where=str(path), fix=AGAIN)
    shape = Shape(dim, hidden, layers, heads, kv_heads, abs(vocab), context, 10000.0, 1e-5, shared, dim // heads)
    form = Form(version, 8 if version == 2 else 32, group)
    smallest = 7 * layers * dim  # before anything loops over the layers
    expected = (
        len(header(shape, form, 1.0)) + sum(form.size(part) for part in layout(shape, form)) if smallest <= path.stat().st_size else -1
    )
    if expected != path.stat().st_size:
        raise BadData(
            f"its size is not what its header asks for ({expected:,} bytes)" if expected > 0 else "it is cut short",
            where=str(path),
            fix=AGAIN,
        )
    return shape, form


def read_pieces(path: Path, vocab: int) -> tuple[list[str], list[float]]:
    """(pieces as sentencepiece writes them, scores) of a tokenizer.bin for a model of so many tokens. Raises BadData for one that is not."""
    data, at = path.read_bytes(), 4
    pieces, scores = [], []
    try:
        for id in range(vocab):
            score, length = struct.unpack_from("<fi", data, at)
            if length < 0 or at + 8 + length > len(data):
                raise ValueError("a piece ends behind the file")
            piece = data[at + 8 : at + 8 + length].decode("utf-8")
            pieces.append(piece.strip("\n") if id in (BOS, EOS) else piece.replace(" ", "▁"))
            scores.append(score)
            at += 8 + length
        if at != len(data):
            raise ValueError("it goes on behind the last piece")
    except (struct.error, ValueError) as fault:
        raise BadData(f"it is no tokenizer.bin of a model of {vocab:,} tokens: {fault}", where=str(path), fix=AGAIN) from None
    if len({*pieces}) != vocab or "<0x00>" not in pieces:
        raise BadData(
            "it is no tokenizer.bin of a sentencepiece BPE: pieces are there twice, or its bytes are missing", where=str(path), fix=AGAIN
        )
    return pieces, scores


def tokenizer_json(pieces: list[str], scores: list[float]) -> dict[str, Any]:
    """The tokenizer as transformers converts one of Llama 2's kind. A piece may come of each two that make it up; better scores merge first."""
    ids = {piece: id for id, piece in enumerate(pieces)}
    merges = []
    for piece in sorted(ids, key=lambda piece: (-scores[ids[piece]], ids[piece])):
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += sorted(((a, b) for a, b in halves if a in ids and b in ids), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": pieces[id], **special} for id in (0, BOS, EOS)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": pieces[BOS], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {pieces[BOS]: {"id": pieces[BOS], "ids": [BOS], "tokens": [pieces[BOS]]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


def write_folder(model: Path, tokenizer: Path, out: Path) -> None:
    """The folder, in fp32: int8 values times their scales. Raises what read_header and read_pieces do, before anything is written."""
    shape, form = read_header(model)
    pieces, scores = read_pieces(tokenizer, shape.vocab)
    out.mkdir(parents=True)
    parts = [part for part in layout(shape, form) if part.name not in (FREQUENCIES, ROPE_TABLES)]
    plan = [safetensors_io.Entry(part.name, "F32", part.shape, model) for part in parts]
    safetensors_io.write(out, plan, reader_of(model, shape, form), safetensors_io.parse_size("5GB"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "rms_norm_eps": shape.eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": shape.shared,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "dtype": "float32",
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": [BOS, EOS]})
    (out / "tokenizer.json").write_text(json.dumps(tokenizer_json(pieces, scores), ensure_ascii=False, indent=1) + "\n", "utf-8")
    names = {"unk_token": pieces[0], "bos_token": pieces[BOS], "eos_token": pieces[EOS]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, "model_max_length": shape.context}
    write_json(out / "tokenizer_config.json", {**settings, **names})
