"""The chat templates that are compiled into axllm, chosen by `tokenizer_type`, and the one that renders as the model's own template does.

On the board the model's template does not count: axllm has one per type. A type that renders otherwise makes a tuned model answer worse without a word.
"""

from src.chat import encoding
from src.core.errors import BadData, WrongKind
from src.core.log import say, warn
from src.deploy import contract

# axllm's types whose rendering is known: ChatML, a missing system turn filled in from config.json's system_prompt
# (AXERA's tokenizer repository, Qwen3Tokenizer.hpp; ax-llm docs/configuration.md).
CHATML_TYPES = ("Qwen2_5", "Qwen3")
# All others that axllm lists (tools/tokenizer_smoke.cpp), for text models.
OTHER_TYPES = ("HunYuan", "MiniCPM4", "MiniCPM5", "Gemma3", "Gemma4", "SmolLM2", "SmolLM3", "GLM5", "KimiK25", "Qwen3_5", "MiniMaxM2")
FAMILY_TYPE = {
    "qwen2": "Qwen2_5",
    "qwen3": "Qwen3",
    "qwen3_5_text": "Qwen3_5",
    "minicpm": "MiniCPM4",
    "gemma3_text": "Gemma3",
    "gemma4_text": "Gemma4",
    "smollm3": "SmolLM3",
    "hunyuan_v1_dense": "HunYuan",
}


def board_text(messages: list[dict], system_prompt: str | None) -> str:
    """What axllm makes of a conversation under one of CHATML_TYPES, opened for the assistant's answer."""
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages) + "<|im_start|>assistant\n"


def board_type(wanted: str, model_type: str) -> str:
    """axllm's type for a model: the user's, or with auto that of its family, or for a family without one ChatML's."""
    return FAMILY_TYPE.get(model_type, CHATML_TYPES[-1]) if wanted == "auto" else wanted


def prefix(tokenizer, type: str) -> list[int]:
    """The ids axllm is to put before every text: BOS where the model's template begins with it, and nothing where it does not, whatever the tokenizer
    adds by itself. Of a template that begins with BOS, under a type whose rendering is not known here, and without template: what the tokenizer adds."""
    first, *rest = tokenizer("A").input_ids
    added = [first] if rest and first in tokenizer.added_tokens_decoder else []
    if not tokenizer.chat_template:
        return added
    if not _bos_before(tokenizer):
        return []
    return [tokenizer.bos_token_id] if type in CHATML_TYPES else added


def _bos_before(tokenizer) -> str:
    """BOS, where the template begins with it; empty where it does not, or where BOS is ChatML's own opening, as SmolLM2's is, which axllm writes itself."""
    opened, bos = encoding.render(tokenizer, [{"role": "user", "content": "Q"}], prompt=True), tokenizer.bos_token or ""
    return bos if opened.startswith(bos) and bos != encoding.START else ""


def choose(tokenizer, type: str) -> tuple[str, str | None]:
    """(tokenizer_type, system_prompt) for axllm's config.json. Raises WrongKind where the type renders conversations otherwise than the model's template.

    type: of `board_type`.
    """
    if type not in CHATML_TYPES:
        warn(f"how axllm's type {type} renders a conversation is not known here, so only the token ids of rendered texts are compared")
        return type, None
    if not tokenizer.chat_template:
        warn(f"the model has no chat template; axllm puts ChatML around every prompt (type {type})")
        return type, None
    system_prompt, bos = default_system(tokenizer), _bos_before(tokenizer)
    for name, (messages, tools) in contract.conversations().items():
        if tools:
            continue  # axllm renders tools in a way of its own (docs/tool_calling.md), which is not known here to the letter
        try:
            ours = encoding.render(tokenizer, messages, prompt=True).removeprefix(bos)  # axllm puts BOS before the text, as an id
        except BadData:
            continue
        theirs = board_text(messages, system_prompt)
        if ours != theirs:
            at = next((k for k, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
            raise WrongKind(
                f"axllm's chat template (type {type}) is not the model's: on '{name}' it has {theirs[at : at + 40]!r} where the model was trained on {ours[at : at + 40]!r}",
                where=str(tokenizer.name_or_path),
                fix=[
                    "train with ChatML: remove chat_template from the base's tokenizer_config.json (and chat_template.jinja), then fine-tune again",
                    f"target.tokenizer_type=TYPE where axllm has the model's own: {', '.join((*CHATML_TYPES, *OTHER_TYPES))}",
                ],
            )
    say(
        f"axllm's type {type} renders conversations as the model's own template"
        + (f"; its system prompt becomes {system_prompt!r}" if system_prompt else "")
    )
    return type, system_prompt


def default_system(tokenizer) -> str | None:
    """The system text a ChatML template puts in where a conversation has none; None where it puts in none."""
    text = encoding.render(tokenizer, [{"role": "user", "content": "Q"}], prompt=True).removeprefix(_bos_before(tokenizer))
    opening = f"{encoding.START}system\n"
    return text[len(opening) :].partition(encoding.END)[0] if text.startswith(opening) else None
