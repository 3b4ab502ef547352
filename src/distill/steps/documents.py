"""Questions and answers out of texts, with quotations that have to stand in them."""

import re
import unicodedata
from collections.abc import Iterator

from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.requests import TEXT, YES_NO, array, obj, request
from src.distill.steps.respond import prompt_of
from src.distill.texts import all_usable, append_answer, derive, fill, text_of, usable, user
from src.settings.recipes import Chunk, Ground, Questions

# The end of a sentence, in Latin and in East Asian writing.
_SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
MOST_QUOTES = 8


async def chunk(records: Records, settings: Chunk, work: Work) -> Records:
    """A record for each piece of a text, in order; data["place"] is the piece's number in its text."""
    async for record in records:
        texts = list(pieces(record.data.get("text", ""), settings.max_chars))
        if not texts:
            work.set_aside(record, "empty text")
            continue
        work.made(len(texts) - 1)
        for place, text in enumerate(texts):
            child = derive(record, id=str(place), text=text, place=place)
            if len(text) < settings.min_chars:
                work.set_aside(child, f"a piece under {settings.min_chars} characters")
            else:
                yield child


def pieces(text: str, most: int) -> Iterator[str]:
    """The text in pieces of at most `most` characters: whole paragraphs, else whole sentences, else parts of one."""
    piece = ""
    for paragraph in re.split(r"\n\s*\n", text):
        for glue, part in _parts(paragraph.strip(), most):
            if piece and len(piece) + len(glue) + len(part) > most:
                yield piece
                piece = ""
            piece = f"{piece}{glue}{part}" if piece else part
    if piece:
        yield piece


def _parts(paragraph: str, most: int) -> Iterator[tuple[str, str]]:
    """(what joins it to the part before, part), each part within `most` characters; the first joins as a paragraph."""
    parts = [paragraph] if len(paragraph) <= most else [s for s in _SENTENCE.split(paragraph) if s]
    cut = [part[i : i + most] for part in parts for i in range(0, len(part), most)]
    for number, part in enumerate(cut):
        yield ("\n\n" if number == 0 else " "), part


async def questions(records: Records, settings: Questions, work: Work) -> Records:
    """A record for each question that the teacher finds a text to answer; questions twice are one."""
    schema = obj(questions=array(TEXT, 1, settings.n))

    async def ask(record: Record) -> list[Record]:
        prompt = fill(settings.prompt, text=usable(text_of(record), "text"), count=settings.n)
        answer = await work.ask(request(prompt, settings.teacher, settings.sampling, schema=schema))
        texts = dict.fromkeys(all_usable(answer.value["questions"], "question"))
        return [derive(record, answer, id=str(number), messages=user(text)) for number, text in enumerate(texts)]

    async for record in work.each(records, ask):
        yield record


async def ground(records: Records, settings: Ground, work: Work) -> Records:
    """The teacher answers from the text, quoting it; a record whose text does not answer, or holds not every quotation, is set aside.

    White space and typographic variants do not count in quotations (NFKC); every other character does.
    """
    schema = obj(answered=YES_NO, quotes=array(TEXT, 0, MOST_QUOTES), answer=TEXT)

    async def answer(record: Record) -> Record:
        text, question = record.data.get("text", ""), prompt_of(record, None)[-1]["content"]
        given = await work.ask(
            request(fill(settings.prompt, text=text, question=question), settings.teacher, settings.sampling, schema=schema)
        )
        if not given.value["answered"]:
            raise SetAside("the text does not answer the question")
        quotes = [usable(quote, "quotation") for quote in given.value["quotes"]]
        if not quotes:
            raise SetAside("no quotation")
        if any(plain(quote) not in plain(text) for quote in quotes):
            raise SetAside("a quotation does not stand in the text")
        shown = work.draw(work.step, record.id).random() < settings.with_text
        turn = fill(settings.ask, text=usable(text, "text"), question=question) if shown else question
        return derive(record, given, messages=append_answer(user(turn), usable(given.value["answer"])), quotes=quotes)

    async for record in work.each(records, answer):
        yield record


def plain(text: str) -> str:
    """One spelling for comparison: NFKC, straight quotation marks, single spaces."""
    text = unicodedata.normalize("NFKC", text).translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
    return " ".join(text.split())
