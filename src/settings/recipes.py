"""The settings of distillation recipes: what records a recipe starts from, its steps and their order. The recipes themselves are configs/recipe/*.yaml.

Every prompt a teacher or judge reads stands in the YAML, with {names} for what a step fills in; a prompt that lacks a name its step has to fill,
or has one it does not know, is refused before anything is spent.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from src.settings.base import Settings, Unkeyed

NAME = re.compile(r"\{([a-z_]+)\}")
Share = Annotated[float, Field(ge=0, le=1)]
Language = Literal["ko", "zh", "ja", "en"]
Part = Literal["prompt", "answer", "all"]


def naming(*names: str, free: tuple[str, ...] = ()) -> AfterValidator:
    """Of a prompt that has to name each of `names` in braces, may name `free`, and nothing else."""

    def check(text: str) -> str:
        found = set(NAME.findall(text))
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"the prompt has no {{{missing[0]}}}, so what the step puts there would be lost")
        if unknown := sorted(found - {*names, *free}):
            raise ValueError(f"the prompt names {{{unknown[0]}}}; this step knows {', '.join(f'{{{n}}}' for n in (*names, *free))}")
        return text

    return AfterValidator(check)


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]


class Sampling(Settings):
    temperature: NonNegativeFloat
    """0: the likeliest token each time"""
    top_p: Annotated[float, Field(gt=0, le=1)]
    """sample from the likeliest tokens that together hold this probability"""
    max_tokens: Annotated[PositiveInt, Field(lt=1 << 31)]
    """tokens of an answer at most; a record whose answer is cut off there is set aside, unless allow_cut_off=true"""


class Step(Settings):
    """One step of a recipe."""

    kind: str
    """which kind of step"""


class Asking(Step):
    teacher: str
    """which of the teachers is asked"""
    sampling: Sampling
    """how it draws its answer"""


# ---- answers


class Respond(Asking):
    kind: Literal["respond"]
    """the teacher answers the prompt of each record"""
    system: str | None
    """system text put before prompts that have none; null: none. It stays in the record"""
    n: PositiveInt
    """answers to each prompt; with more than one a later step has to choose"""


class BestOf(Step):
    kind: Literal["best_of"]
    """one of several answers becomes the record's"""
    by: Literal["ratings", "agreement"]
    """ratings: the highest mean rating (a `rate` step before); agreement: what most answers end in, or the one nearest to the others"""
    final: Pattern | None
    """by agreement: regular expression whose first group is the part that has to agree, such as a final number; null: whole texts, by ROUGE-L"""
    at_least: NonNegativeFloat
    """mean rating, share of agreeing answers, or mean ROUGE-L below which the record is set aside"""


class Rate(Asking):
    kind: Literal["rate"]
    """a judge writes a critique and a score of every answer, one request an aspect and vote, answers in another order each time"""
    prompt: Annotated[str, naming("conversation", "answers", "aspect", "lowest", "highest", free=("count",))]
    """what the judge reads"""
    aspects: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], str], Field(min_length=1)]
    """what is rated: a name, and the description and scale the judge reads"""
    lowest: NonNegativeInt
    """lowest score"""
    highest: PositiveInt
    """highest score"""
    votes: PositiveInt
    """independent ratings of each aspect; their mean counts, their agreement is reported"""
    check: Annotated[str, naming("critiques", "aspect", "lowest", "highest", free=("count",))] | None
    """a second question: which scores do these critiques, read alone, deserve? null: not asked"""
    tolerance: NonNegativeInt
    """points by which the two scores may differ; a vote that differs more does not count"""

    @model_validator(mode="after")
    def _scale(self) -> Self:
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} is not below highest {self.highest}")
        return self


class Pair(Step):
    kind: Literal["pair"]
    """two of several rated answers become a preference: chosen and rejected"""
    rejected: Literal["lowest", "random"]
    """the answer rated lowest (a clear lesson), or any that is rated below the best (closer ones too)"""
    margin: NonNegativeFloat
    """least difference of their mean ratings"""


class Compare(Asking):
    kind: Literal["compare"]
    """a judge sees chosen and rejected in both orders; the pair stays where most votes prefer the chosen one in both"""
    prompt: Annotated[str, naming("conversation", "first", "second")]
    """what the judge reads"""
    votes: PositiveInt
    """judgements in each order"""


# ---- prompts


class SelfInstruct(Asking):
    kind: Literal["self_instruct"]
    """new tasks in the manner of seeds (Wang et al. 2022, arXiv:2212.10560)"""
    prompt: Annotated[str, naming("examples", "count")]
    """what the teacher reads"""
    rows: PositiveInt
    """tasks to make"""
    requests: PositiveInt
    """requests at most, however few tasks they gave"""
    round: PositiveInt
    """requests that see the same pool; larger keeps more going at once, smaller lets new tasks be seen sooner"""
    count: PositiveInt
    """tasks asked for in one request"""
    seeds: PositiveInt
    """examples from the seeds in one request"""
    made: NonNegativeInt
    """examples from the tasks made so far"""
    rouge: Annotated[float, Field(gt=0, le=1)]
    """a task whose ROUGE-L with any in the pool is this or more is set aside"""
    min_words: PositiveInt
    """shortest task"""
    max_words: PositiveInt
    """longest task"""
    keywords: list[str]
    """words of tasks that text alone cannot do"""
    ascii_start: bool
    """a task has to begin with an ASCII character, as in the paper; false for languages that are written otherwise"""
    keep_seeds: bool
    """give the seeds out too"""


class Instances(Asking):
    kind: Literal["instances"]
    """an input and an output for each task: for a classification the label first, else the input first, as Self-Instruct does"""
    classify: Annotated[str, naming("instruction")]
    """is it a classification with few labels?"""
    input_first: Annotated[str, naming("instruction")]
    """asks for an input (may be empty) and its output"""
    label_first: Annotated[str, naming("instruction")]
    """asks for the labels, and an input for one of them"""


class Evolve(Asking):
    kind: Literal["evolve"]
    """harder and rarer prompts out of given ones (Evol-Instruct, Xu et al. 2023, arXiv:2304.12244)"""
    rounds: PositiveInt
    """times a prompt is evolved, each time from what the last good evolution gave"""
    in_depth: Annotated[dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Annotated[str, naming("prompt")]], Field(min_length=1)]
    """ways to make a prompt harder: a name, and what the teacher reads; one is drawn each time"""
    in_breadth: Annotated[str, naming("prompt")]
    """asks for a new prompt of the same domain; drawn as often as any one way in depth"""
    answer: Sampling
    """how the teacher answers evolved prompts"""
    judge: str
    """which of the teachers says whether two prompts ask the same"""
    equal: Annotated[str, naming("first", "second")]
    """asks whether two prompts ask the same"""
    copied: list[str]
    """words of the evolving prompt that must not turn up in an evolved one unless they were in the prompt before"""
    refusals: list[str]
    """beginnings of an answer that gives up, which eliminates its prompt; compared without case"""
    keep_given: bool
    """give the prompts it started from out too, answered"""


class Magpie(Asking):
    kind: Literal["magpie"]
    """prompts that an aligned teacher writes when it is given the opening of a user's turn and nothing else (Xu et al. 2024, arXiv:2406.08464)"""
    prefix: str
    """the teacher's chat template up to where a user's text would begin"""
    rows: PositiveInt
    """prompts to draw"""
    min_chars: PositiveInt
    """shortest prompt"""


class Translate(Asking):
    kind: Literal["translate"]
    """each conversation in other languages, with code, addresses, numbers and placeholders as they were"""
    prompt: Annotated[str, naming("language", "texts", "count")]
    """what the teacher reads"""
    to: Annotated[list[Language], Field(min_length=1)]
    """languages"""
    keep_given: bool
    """give the conversations it started from out too"""


# ---- choosing records


class Select(Step):
    kind: Literal["select"]
    """the best records that are not like one another (DEITA, Liu et al. 2023, arXiv:2312.15685)"""
    rows: PositiveInt
    """records to choose"""
    by: Annotated[list[str], Field(min_length=1)]
    """aspects (of a `rate` step before) whose product orders the records"""
    similarity: Annotated[float, Field(gt=0, le=1)]
    """a record whose cosine similarity to one already chosen is this or more is passed over"""


class Classify(Asking):
    kind: Literal["classify"]
    """the teacher scores a sample of the texts, a classifier trained on these scores filters all (phi-1, Gunasekar et al. 2023, arXiv:2306.11644)"""
    prompt: Annotated[str, naming("text", "lowest", "highest")]
    """what the teacher reads"""
    sample: Annotated[int, Field(ge=10)]
    """texts it scores"""
    lowest: NonNegativeInt
    """lowest score"""
    highest: PositiveInt
    """highest score"""
    good: PositiveInt
    """a text with this score or more is a good one"""
    at_least: Annotated[float, Field(gt=0, lt=1)]
    """probability of being good, by the classifier, below which a text is set aside"""
    l2: PositiveFloat
    """strength of the classifier's regularization"""


# ---- code


class Exercise(Asking):
    kind: Literal["exercise"]
    """from a text, exercises: a function's signature and docstring, its body, and tests of it (phi-1)"""
    prompt: Annotated[str, naming("text", "topic")]
    """what the teacher reads"""
    topics: Annotated[list[str], Field(min_length=1)]
    """one is drawn for each exercise, so that one text gives different ones"""
    n: PositiveInt
    """exercises for each text"""
    ask: Annotated[str, naming("signature")]
    """the user's turn of the record"""


class RunCode(Step):
    kind: Literal["run_code"]
    """records whose code passes its tests in a closed-off process stay"""
    isolation: Annotated[Literal["full", "limits"], Unkeyed]
    """full: no network, no file to read but Python's and none to write, no process beside it, or the step is refused; limits: what the kernel can of it"""
    seconds: PositiveFloat
    """time it may take, on the clock and of the processor"""
    memory: PositiveFloat
    """MiB of memory it may take"""
    at_once: Annotated[PositiveInt, Unkeyed]
    """processes at a time"""


# ---- documents


class Chunk(Step):
    kind: Literal["chunk"]
    """texts in pieces, cut between paragraphs, else sentences"""
    max_chars: PositiveInt
    """longest piece"""
    min_chars: PositiveInt
    """shorter pieces at the end of a text are set aside"""

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} is above max_chars {self.max_chars}")
        return self


class Questions(Asking):
    kind: Literal["questions"]
    """questions that a piece of text answers"""
    prompt: Annotated[str, naming("text", "count")]
    """what the teacher reads"""
    n: PositiveInt
    """questions for each piece"""


class Ground(Asking):
    kind: Literal["ground"]
    """answers out of a piece of text, with quotations that have to stand in it word for word"""
    prompt: Annotated[str, naming("text", "question")]
    """what the teacher reads"""
    with_text: Share
    """share of records whose user turn holds the text before the question, drawn by seed; the others hold the question alone"""
    ask: Annotated[str, naming("text", "question")]
    """the user turn of those records"""


# ---- filters


class Length(Step):
    kind: Literal["length"]
    """records whose length is out of bounds are set aside"""
    of: Part
    """what is measured: the last user turn, the last answer, or the whole conversation"""
    unit: Literal["words", "characters", "turns"]
    """words as people count them, each Chinese, Japanese or Korean character of a run of them being one; characters; or messages"""
    min: NonNegativeInt
    """shortest"""
    max: PositiveInt
    """longest"""


class InLanguage(Step):
    kind: Literal["language"]
    """records in other languages are set aside; told by script, and English from other Latin languages by its commonest words"""
    of: Part
    """what is looked at"""
    languages: Annotated[list[Language], Field(min_length=1)]
    """languages that stay; a translated record has to be in the one it was translated to"""
    share: Annotated[float, Field(gt=0, le=1)]
    """least share of letters in the language's script"""


class Refusal(Step):
    kind: Literal["refusal"]
    """answers that decline are set aside"""
    phrases: Annotated[list[Pattern], Field(min_length=1)]
    """regular expressions looked for in the first `within` characters, without case"""
    within: PositiveInt
    """characters looked at"""


class Repetition(Step):
    kind: Literal["repetition"]
    """texts that repeat themselves are set aside"""
    of: Part
    """what is looked at"""
    n: PositiveInt
    """words in a row that are compared"""
    share: Share
    """largest share of such n-grams that occurred before in the text"""
    run: PositiveInt
    """most times one line may stand in it"""


class NearDuplicates(Step):
    kind: Literal["near_duplicates"]
    """records nearly equal to an earlier one are set aside, by MinHash (Broder 1997)"""
    of: Part
    """what is compared"""
    n: PositiveInt
    """words in a row that make a feature"""
    permutations: Annotated[int, Field(ge=16, le=1024)]
    """hashes a text is kept as; more tell similarity more exactly"""
    similarity: Annotated[float, Field(gt=0, le=1)]
    """estimated Jaccard similarity from which two texts are one"""


class Overlap(Step):
    kind: Literal["overlap"]
    """records that hold part of an evaluation set are set aside"""
    sets: Annotated[list[str], Unkeyed]
    """files of evaluation questions and answers: JSON lines (every string in them) or plain text; none: nothing is compared, and that is said"""
    n: PositiveInt
    """words in a row that must not be shared; 13 is GPT-3's (Brown et al. 2020, arXiv:2005.14165)"""
    shortest: PositiveInt
    """an evaluation text of fewer than n words is looked for whole, if it has at least this many"""
    code: bool
    """compare Python by syntax tree too, so that renaming does not hide it"""
    nodes: PositiveInt
    """smallest function, in nodes of its syntax tree, that is compared"""
    match: Annotated[float, Field(gt=0, le=1)]
    """share of a function's subtrees found in the record from which the two are one"""


AnyStep = Annotated[
    Respond
    | BestOf
    | Rate
    | Pair
    | Compare
    | SelfInstruct
    | Instances
    | Evolve
    | Magpie
    | Translate
    | Select
    | Classify
    | Exercise
    | RunCode
    | Chunk
    | Questions
    | Ground
    | Length
    | InLanguage
    | Refusal
    | Repetition
    | NearDuplicates
    | Overlap,
    Field(discriminator="kind"),
]


NEEDS = {"pair": "rate", "compare": "pair", "select": "rate", "run_code": "exercise", "ground": "questions"}
"""kind of step: the kind it goes on from"""


class Recipe(Settings):
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_]*$")]
    """name of the recipe"""
    takes: Literal["prompts", "conversations", "seeds", "texts", "nothing"]
    """records it starts from: prompts to answer, whole conversations, seed tasks, a folder of texts, or none"""
    order: Annotated[list[str], Field(min_length=1)]
    """the steps in the order they run; a step left out does not run"""
    steps: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], AnyStep]
    """the steps by name"""

    @model_validator(mode="after")
    def _order_names_steps(self) -> Self:
        for name in self.order:
            if name not in self.steps:
                raise ValueError(f"order names '{name}', and there is no such step; there is {', '.join(self.steps)}")
        if len(set(self.order)) != len(self.order):
            raise ValueError("order names a step twice; give the second a name of its own under steps")
        return self

    @model_validator(mode="after")
    def _steps_follow(self) -> Self:
        """What a step reads of a record another has to write before it; found out here, before anything is spent."""
        before: dict[str, Step] = {}
        for name, step in self.ordered():
            rates = isinstance(step, BestOf) and step.by == "ratings"
            needed = "rate" if rates else NEEDS.get(step.kind)
            if needed and needed not in before:
                raise ValueError(f"'{name}' works on what a step of the kind {needed} finds, and order has none before it")
            if isinstance(step, BestOf | Pair) and getattr(before.get("respond"), "n", 0) < 2:
                raise ValueError(f"'{name}' chooses among answers; a step of the kind respond before it needs n of 2 or more")
            if (
                isinstance(step, Select)
                and isinstance(rating := before["rate"], Rate)
                and (unknown := [a for a in step.by if a not in rating.aspects])
            ):
                raise ValueError(f"'{name}' orders records by '{unknown[0]}', which no step before it rates")
            before[step.kind] = step
        if getattr(before.get("respond"), "n", 1) > 1 and not before.keys() & {"best_of", "pair"}:
            several = next(name for name, step in self.ordered() if step is before["respond"])
            raise ValueError(
                f"a step gives several answers and none chooses among them: recipe.order needs one of the kind best_of or pair, or recipe.steps.{several}.n=1"
            )
        return self

    def ordered(self) -> list[tuple[str, Step]]:
        """(name, settings) of the steps that run, in their order."""
        return [(name, self.steps[name]) for name in self.order]

    def files(self) -> dict[str, str]:
        """{role: path} of files that steps read beside their records."""
        return {
            f"{name}_{number}": path
            for name, step in self.ordered()
            if isinstance(step, Overlap)
            for number, path in enumerate(step.sets, 1)
        }
