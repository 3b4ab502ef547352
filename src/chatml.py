"""From messages to token ids and a loss mask, through the model's own chat template.

The mask is built from token spans, never by searching text: for each assistant turn the template is rendered up to its opening (as a prompt
would be), the rendering is a prefix of the whole conversation, and the turn runs from there to its stop token. What is trained is so exactly
what a served model has to produce after the prompt it gets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from src.errors import BadData, WrongKind

START, END = "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n<tool_call>\\n' + (call['function'] | tojson) + '\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IGNORE = -100
QWEN_SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Encoded:
    """One conversation as training input.

    input_ids: token ids. labels: the same ids where the loss counts, -100 elsewhere; both of the same length.
    """

    input_ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        """Tokens the loss counts."""
        return sum(label != IGNORE for label in self.labels)


def ensure_chat(tokenizer) -> list[str]:
    """Give a tokenizer without a chat template ChatML: the template, its two tokens where missing, and a padding token.

    Returns the tokens added, in id order. A tokenizer that has a template keeps it. Turn end becomes the eos token, as serving tools expect.
    """
    if tokenizer.chat_template:
        added = []
    else:
        missing = [token for token in (START, END) if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
        starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.add_special_tokens({"extra_special_tokens": [START, END]} if missing else {})
        tokenizer.eos_token = END
        tokenizer.chat_template = ("{{ bos_token }}" if starts_with_bos else "") + TEMPLATE
        added = missing
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return added


def render(tokenizer, messages: Sequence[dict], tools=None, *, prompt: bool = False) -> str:
    """The conversation as text; with prompt=True opened for the assistant's next turn. Raises BadData where the template refuses such turns."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=list(tools) if tools else None, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise BadData(f"the chat template refuses this conversation: {error}") from None


def turn_end(tokenizer) -> int:
    """Id of the special token that ends an assistant turn in this template."""
    probe = [{"role": "user", "content": "a"}]
    head = render(tokenizer, probe, prompt=True)
    whole = render(tokenizer, [*probe, {"role": "assistant", "content": "b"}])
    ids = tokenizer(whole[len(head) :], add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids)
    end = next((i for i in ids if i in special), None)
    if not whole.startswith(head) or end is None:
        raise WrongKind(
            "the chat template does not end an assistant turn with a special token, so a tuned model could not learn to stop",
            where=str(tokenizer.name_or_path),
            fix="remove chat_template from tokenizer_config.json (and chat_template.jinja) to train with ChatML",
        )
    return end


def encode(tokenizer, messages: Sequence[dict], tools=None, *, end: int) -> Encoded:
    """Token ids and labels of one conversation; trained are the assistant's text and the token `end` that closes it.

    Raises BadData where the template does not render the turns one after another.
    """
    whole = render(tokenizer, messages, tools)
    cuts = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            head = render(tokenizer, messages[:i], tools, prompt=True)
            if not whole.startswith(head):
                raise BadData(
                    f"the chat template renders message {i + 1} differently as a prompt and as history, so its tokens cannot be told apart"
                )
            cuts.append(len(head))
    ids, starts = _ids(tokenizer, whole, cuts)
    labels = [IGNORE] * len(ids)
    for start, limit in zip(starts, [*starts[1:], len(ids)]):
        stop = next((k for k in range(start, limit) if ids[k] == end), None)
        if stop is None:
            raise BadData("an assistant turn has no stop token after the template")
        labels[start : stop + 1] = ids[start : stop + 1]
    return Encoded(ids, labels)


def _ids(tokenizer, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
    """Token ids of the text and the index of the first token at or after each cut (character positions, rising).

    Where one token would reach over a cut, the text is tokenized in two there: a served model gets the prompt's tokens without what follows.
    """
    if not tokenizer.is_fast:
        return _ids_by_piece(tokenizer, text, cuts)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    starts, k = [], 0
    for cut in cuts:
        while k < len(ids) and offsets[k][0] < cut:
            if offsets[k][1] > cut:
                return _ids_by_piece(tokenizer, text, cuts)
            k += 1
        starts.append(k)
    return ids, starts


def _ids_by_piece(tokenizer, text: str, cuts: list[int]) -> tuple[list[int], list[int]]:
    ids, starts = [], []
    for begin, stop in zip([0, *cuts], [*cuts, len(text)]):
        if begin:
            starts.append(len(ids))
        ids += tokenizer(text[begin:stop], add_special_tokens=False).input_ids
    return ids, starts


def encode_qwen_legacy(tokenizer, messages: Sequence[dict], tools=None, *, end: int) -> Encoded:
    """Token ids and labels as Qwen's finetune.py makes them (QwenLM/Qwen, `preprocess`): every turn's markers and newline are trained too,
    a default system turn is put first where there is none, and each piece is tokenized by itself. Tools are not known to it."""
    start, newline = tokenizer.convert_tokens_to_ids(START), tokenizer("\n", add_special_tokens=False).input_ids
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": QWEN_SYSTEM}, *messages]
    ids, labels = [], []
    for message in messages:
        role = tokenizer(message["role"], add_special_tokens=False).input_ids
        content = tokenizer(message["content"], add_special_tokens=False).input_ids
        hidden = [IGNORE] * (len(role) + len(newline))
        ids += [start, *role, *newline, *content, end, *newline]
        labels += [start, *hidden, *(content if message["role"] == "assistant" else [IGNORE] * len(content)), end, *newline]
    return Encoded(ids, labels)
