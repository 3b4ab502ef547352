"""The tokenizer of a run: the base's, with the chat template that the settings ask for."""

from pathlib import Path

from src.chat import encoding, template
from src.core.errors import BadData, MissingInput
from src.models.loading import load_tokenizer
from src.settings.verbs import FinetuneVerb


def chat_tokenizer(cfg: FinetuneVerb, base: Path):
    """(the base's tokenizer set up for chats, tokens added). Raises BadData where transformers cannot read it, or reads it otherwise than it is."""
    try:
        tokenizer = load_tokenizer(base, trust_remote_code=cfg.model.trust_remote_code)
    except BadData as error:
        raise BadData(error.what, where=f"{error.where} (model.path={cfg.model.path})", fix=error.fix) from error
    text = template_text(cfg)
    return tokenizer, encoding.set_up(tokenizer, text=text, keywords=cfg.template, reasoning=cfg.reasoning, today=cfg.today)


def template_text(cfg: FinetuneVerb) -> str | None:
    """The chat template in place of the base's: a file's content, "chatml" for ours, or None."""
    if cfg.chat_template in (None, "chatml"):
        return cfg.chat_template
    try:
        return Path(cfg.chat_template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingInput(
            f"no chat template can be read: {error}",
            where=cfg.chat_template,
            fix="chat_template=chatml, or chat_template=FILE names a Jinja file",
        ) from None


def check(cfg: FinetuneVerb, base: Path) -> None:
    """Raises ConfigError for keywords that the template does not read, MissingInput where its file is not there."""
    text = template_text(cfg)
    template.check_keywords(template.CHATML if text == "chatml" else text or template.text_of(base) or template.CHATML, cfg.template)
