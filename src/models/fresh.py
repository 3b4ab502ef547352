"""A model from nothing: a tokenizer learnt from text, and weights drawn at random. Equal inputs give equal bytes.

The tokenizer is byte-level BPE, whose words are cut as GPT-2's are, so that any text has tokens and comes back whole. Its first ids are those that Llama 2
and llama2.c's programs know: 1 begins a text, 2 ends it; 0 pads.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from src.core.errors import BadData
from src.core.files import read_json, write_json
from src.models import complete
from src.settings.training import Size

PAD, BOS, EOS = SPECIAL = ("<pad>", "<s>", "</s>")
CLASSES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
SPREAD, AT_WIDTH = 0.02, 768
"""standard deviation of new weights, and GPT-2's width, for which it is meant; narrower models begin with larger ones, so that a layer's output is as large"""


def learn_tokenizer(texts: Iterable[str], vocab: int, longest: int, folder: Path) -> None:
    """Write into `folder` a tokenizer of `vocab` tokens learnt from texts. longest: context of its model. Raises BadData where the texts hold fewer tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) < vocab:
        raise BadData(
            f"the text holds {found:,} different tokens, not {vocab:,}", where="size.vocab", fix=[f"size.vocab={found}", "more text"]
        )
    begin = [(BOS, SPECIAL.index(BOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=begin)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": longest,
            "clean_up_tokenization_spaces": False,
            **{"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
        },
    )


def tokens_of(folder: Path) -> int | None:
    """How many tokens a folder's tokenizer.json has; None where it has none."""
    if not (file := folder / "tokenizer.json").is_file():
        return None
    spec = read_json(file)
    vocab = spec["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max(max(ids, default=0), *(token["id"] for token in spec["added_tokens"]))


def config_of(size: Size, vocab: int, special: dict[str, int | None]) -> dict:
    """config.json of a model of this shape. special: ids of the begin, end and padding tokens, as bos_token_id and so on."""
    return {
        "architectures": [CLASSES[size.family]],
        "model_type": size.family,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.hidden // size.heads,
        "vocab_size": vocab,
        "max_position_embeddings": size.max_length,
        "rope_theta": size.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "attention_bias": False,
        "initializer_range": round(SPREAD * math.sqrt(AT_WIDTH / size.hidden), 4),
        "tie_word_embeddings": size.tied,
        "dtype": "float32",
        **special,
    }


def write_start(folder: Path, size: Size, tokenizer, tokenizer_files: Path, seed: int) -> None:
    """Write the model before its first step into `folder`: weights drawn by `seed`, and the tokenizer's files.

    What a layer adds to the residual stream starts smaller by the root of how often that is done, as in GPT-2 (Radford et al. 2019, section 2.3).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = config_of(size, len(tokenizer), special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight /= math.sqrt(2 * size.layers)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({name: i for name, i in special.items() if i is not None}, indent=2) + "\n")
    complete.copy(tokenizer_files, folder)
