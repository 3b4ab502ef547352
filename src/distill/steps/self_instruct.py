"""New tasks in the manner of seeds, and an input and an output for each (Self-Instruct, Wang et al. 2022, arXiv:2212.10560)."""

from dataclasses import dataclass, field

from src.core.errors import BadData
from src.core.log import warn
from src.distill.filters import task
from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.requests import TEXT, YES_NO, array, obj, request, stream
from src.distill.rouge import Pool
from src.distill.texts import append_answer, derive, fill, listed, part, usable, user
from src.records.near_duplicates import words
from src.settings.recipes import Instances, SelfInstruct


@dataclass
class Tasks:
    """What has been seen so far: the seeds, the tasks made, and the words of both."""

    seeds: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    pool: Pool = field(default_factory=Pool)


async def self_instruct(records: Records, settings: SelfInstruct, work: Work) -> Records:
    """Asks for new tasks until there are enough, each request showing examples drawn from seeds and from tasks made before.

    Requests go out in rounds of a fixed number that see the same pool, so the result does not depend on which answer comes first. ROUGE-L is over
    words as `texts.words` has them (rouge-score, which the paper used, knows ASCII words only); tasks are asked for as JSON, not as a numbered list.
    """
    tasks = Tasks()
    async for record in records:
        if not instruction_of(record):
            work.set_aside(record, "no task")
            continue
        tasks.seeds.append(instruction_of(record))
        tasks.pool.add(words(tasks.seeds[-1]))
        if settings.keep_seeds:
            yield derive(record, messages=user(tasks.seeds[-1]))
        else:
            work.set_aside(record, "a seed, used as an example only")
    if not tasks.seeds:
        raise BadData("there is no seed to go on from", fix="prompts.path=FILE names a file of seed tasks")
    for first in range(0, settings.requests, settings.round):
        if len(tasks.made) >= settings.rows:
            break
        requests = [_examples(number, tasks, settings, work) for number in range(first, min(first + settings.round, settings.requests))]
        work.made(len(requests))
        async for record in work.each(stream(requests), _asking(settings, work)):
            if reason := _left_out(record, tasks, settings):
                work.set_aside(record, reason)
                continue
            text = record.messages[0]["content"]
            tasks.made.append(text)
            tasks.pool.add(words(text))
            yield record
    if len(tasks.made) < settings.rows:
        work.count("tasks fewer than asked for", settings.rows - len(tasks.made))
        warn(
            f"{work.step}: {len(tasks.made)} of {settings.rows} tasks after {settings.requests} requests; recipe.steps.{work.step}.requests allows more"
        )


def instruction_of(record: Record) -> str:
    """The task of a seed, or the prompt of any other record."""
    return record.data.get("instruction") or part(record.messages, "prompt")


def _examples(number: int, tasks: Tasks, settings: SelfInstruct, work: Work) -> Record:
    """A record that stands for a request, with the examples it shows."""
    draw = work.draw(work.step, number)
    examples = draw.sample(tasks.seeds, min(settings.seeds, len(tasks.seeds)))
    examples += draw.sample(tasks.made, min(settings.made, len(tasks.made)))
    draw.shuffle(examples)
    return Record(f"{work.step}/{number}", [], {"examples": examples, "number": number})


def _asking(settings: SelfInstruct, work: Work):
    schema = obj(tasks=array(TEXT, 1, settings.count))

    async def ask(record: Record) -> list[Record]:
        prompt = fill(settings.prompt, examples=listed(record.data["examples"], "task"), count=settings.count)
        answer = await work.ask(request(prompt, settings.teacher, settings.sampling, seed=record.data["number"], schema=schema))
        return [_task(f"{record.id}/{i}", text, answer.key) for i, text in enumerate(answer.value["tasks"])]

    return ask


def _task(id: str, text: str, key: str) -> Record:
    """A record of a new task; with data["eliminated"] where its text cannot be kept."""
    try:
        return Record(id, user(usable(text, "task")), {}, (key,))
    except SetAside as aside:
        return Record(id, [], {"eliminated": aside.reason}, (key,))


def _left_out(record: Record, tasks: Tasks, settings: SelfInstruct) -> str | None:
    """Why a new task does not join the pool; None where it does."""
    if "eliminated" in record.data:
        return record.data["eliminated"]
    text = record.messages[0]["content"]
    if reason := task(text, low=settings.min_words, high=settings.max_words, keywords=settings.keywords, ascii_start=settings.ascii_start):
        return reason
    if tasks.pool.near(words(text), settings.rouge) is not None:
        return f"ROUGE-L of {settings.rouge:g} or more with a task in the pool"
    return "more than were asked for" if len(tasks.made) >= settings.rows else None


async def instances(records: Records, settings: Instances, work: Work) -> Records:
    """Asks whether a task is a classification, then for its labels and an input of one of them, or for an input and its output.

    The label first, since a teacher that writes the input first gives most inputs the same label (section 2.2 of the paper). One instance a task.
    """
    pieces = {
        True: (settings.label_first, obj(labels=array(TEXT, 2, 20), label=TEXT, input=TEXT)),
        False: (settings.input_first, obj(input=TEXT, output=TEXT)),
    }

    async def make(record: Record) -> Record:
        instruction = usable(instruction_of(record), "task")
        asked = request(
            fill(settings.classify, instruction=instruction), settings.teacher, settings.sampling, schema=obj(classification=YES_NO)
        )
        kind = await work.ask(asked)
        classification = kind.value["classification"]
        prompt, schema = pieces[classification]
        answer = await work.ask(request(fill(prompt, instruction=instruction), settings.teacher, settings.sampling, schema=schema))
        work.count("classifications" if classification else "other tasks")
        given, output = _instance(answer.value)
        messages = append_answer(user(f"{instruction}\n\n{given}" if given else instruction), output)
        return derive(record, kind, answer, messages=messages, classification=classification)

    async for record in work.each(records, make):
        yield record


def _instance(value: dict) -> tuple[str, str]:
    """(input, output); the input may be empty. Raises SetAside for what cannot be learned from."""
    given = usable(value["input"], "input") if value["input"].strip() else ""
    if "label" in value:
        if not given:
            raise SetAside("empty input of a classification")
        if value["label"] not in value["labels"]:
            raise SetAside("a label that is not among the labels")
    output = usable(value["label"] if "label" in value else value["output"])
    if output == given:
        raise SetAside("the output repeats the input")
    return given, output
