"""A run from its settings: teachers and journal opened, records through the steps, the files written, or the estimate made."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from src.core.artifact import Artifact
from src.core.errors import BadData, BudgetSpent, UserError
from src.core.log import say
from src.distill import card, sources
from src.distill.batch import Batches
from src.distill.dispatch import Dispatcher, TeacherChannel
from src.distill.endpoint import RemoteTeacher
from src.distill.estimate import Estimate, by_root, estimate
from src.distill.journal import Journal, Total
from src.distill.limits import BudgetTracker, Gate
from src.distill.output import Output, Rejected, keep
from src.distill.pipeline import NamedStep, Record, Records, Work, check_flows, through
from src.distill.progress import Progress
from src.distill.steps import STEPS
from src.settings.recipes import Asking, Magpie, SelfInstruct
from src.settings.teachers import EndpointTeacher, LocalTeacher, SameTeacher
from src.settings.verbs import DistillVerb

JOURNAL = "distill.journal.sqlite"
READ, KEEP = "read prompts", "keep records"
"""the engine's own first and last step; no step of a recipe has a space in its name"""


@dataclass
class DistillRun:
    """What is open while records are under way."""

    cfg: DistillVerb
    dispatcher: Dispatcher
    budget: BudgetTracker
    journal: Journal
    work: Work
    total: int

    @property
    def steps(self) -> list[str]:
        return [READ, *self.cfg.recipe.order, KEEP]

    def state(self) -> tuple[int, int, int, int, int, float]:
        """As Progress wants it. A record has gone through once nothing of it is under work any more."""
        flows = self.work.flows
        begun = flows[READ].went if READ in flows else 0
        under_work = sum(f.came + f.made - f.went - f.aside.total() for f in flows.values())
        kept = flows[KEEP].went if KEEP in flows else 0
        aside = sum(f.aside.total() for f in flows.values())
        gone = max(0, begun - under_work) if begun else kept
        return gone, self.total, kept, aside, self.budget.tokens, self.budget.money


@contextlib.asynccontextmanager
async def opened(
    cfg: DistillVerb, inputs: dict[str, Artifact], aside: Rejected, costs: dict[str, tuple[int, float]] | None = None
) -> AsyncIterator[DistillRun]:
    """Everything a run needs, and an orderly end: what is on its way is waited for, then all is closed."""
    survey = sources.survey(path_of(cfg), cfg.recipe.takes, cfg.prompts.count, cfg.prompts.on_fault)
    async with contextlib.AsyncExitStack() as stack:
        journal = await stack.enter_async_context(Journal(Path(cfg.outputs) / cfg.run / JOURNAL))
        if cfg.retry_set_aside and (count := await journal.take_back_all()):
            say(f"distill: asks {count:,} requests anew that were set aside")
        totals = await journal.totals()
        budget = BudgetTracker(cfg.budget, sum(t.tokens for t in totals.values()), sum(t.money for t in totals.values()))
        _say_totals(totals)
        dispatcher = Dispatcher({}, journal, budget, allow_cut_off=cfg.allow_cut_off, costs=costs)
        for role, teacher in teachers(cfg).items():
            dispatcher.channels[role] = await _channel(teacher, role, inputs, dispatcher, stack)
        if isinstance(cfg.judge, SameTeacher):
            dispatcher.channels["judge"] = dispatcher.channels["teacher"]
        window = max(256, 4 * max(channel.at_once for channel in dispatcher.channels.values()))
        work = Work(seed=cfg.seed, ask=dispatcher.ask, window=window, on_aside=aside)
        run = DistillRun(cfg, dispatcher, budget, journal, work, survey.records or _wanted(cfg))
        await stack.enter_async_context(Progress(run.state))
        stack.push_async_callback(dispatcher.drain)
        yield run


def teachers(cfg: DistillVerb) -> dict[str, EndpointTeacher | LocalTeacher]:
    """{role: teacher} of those that are one of their own."""
    return {"teacher": cfg.teacher} | ({} if isinstance(cfg.judge, SameTeacher) else {"judge": cfg.judge})


def path_of(cfg: DistillVerb) -> Path | None:
    return Path(cfg.prompts.path) if cfg.prompts.path is not None else None


async def _channel(
    teacher: EndpointTeacher | LocalTeacher,
    role: str,
    inputs: dict[str, Artifact],
    dispatcher: Dispatcher,
    stack: contextlib.AsyncExitStack,
) -> TeacherChannel:
    if isinstance(teacher, LocalTeacher):
        from src.distill.local_model import LocalModel, limits_of

        limits = limits_of(teacher)
        return TeacherChannel(await stack.enter_async_context(LocalModel(teacher, inputs[role])), limits, Gate(limits))
    endpoint = await stack.enter_async_context(RemoteTeacher(teacher))
    channel = TeacherChannel(endpoint, teacher.limits, Gate(teacher.limits))
    if teacher.batch:
        channel.batches = await stack.enter_async_context(
            Batches(endpoint, dispatcher.journal, dispatcher.budget, partial(dispatcher.settle, channel))
        )
    return channel


def _wanted(cfg: DistillVerb) -> int:
    """Records that a recipe without a source makes."""
    return sum(getattr(step, "rows", 0) for _, step in cfg.recipe.ordered()[:1])


def _say_totals(totals: dict[str, Total]) -> None:
    if not totals:
        return
    tokens, money = sum(t.tokens for t in totals.values()), sum(t.money for t in totals.values())
    lost = sum(t.lost for t in totals.values())
    say(
        f"distill: earlier commands sent {sum(t.requests for t in totals.values()):,} requests for {tokens:,} tokens, ${money:,.4f}"
        + (f"; {lost:,} of them were on their way when a command was killed, and count in full" if lost else "")
    )


async def _read(run: DistillRun) -> Records:
    """The source's records."""
    mine = run.work.at(READ)
    for record in sources.records(path_of(run.cfg), run.cfg.recipe.takes, run.cfg.prompts.count):
        mine.flow.came += 1
        if isinstance(record, Record):
            mine.flow.went += 1
            yield record
        else:
            where, fault = record
            mine.set_aside(Record(where, []), f"malformed: {fault.reason}", str(fault))


def steps_of(cfg: DistillVerb) -> list[NamedStep]:
    """The recipe's steps."""
    return [NamedStep(name, STEPS[settings.kind], settings) for name, settings in cfg.recipe.ordered()]


def records_of(run: DistillRun, steps: list[NamedStep]) -> Records:
    """The result's records, in order."""
    cost = {channel.teacher.name: channel.teacher.cost for channel in run.dispatcher.channels.values()}

    def price(teacher: str, prompt_tokens: int, tokens: int) -> float:
        return cost[teacher](prompt_tokens, tokens)

    kept = partial(keep, journal=run.journal, holdout=run.cfg.holdout)
    return through(_read(run), [*steps, NamedStep(KEEP, kept, price)], run.work)


async def make(cfg: DistillVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Write the dataset into the folder `out` and return its figures."""
    aside, output = Rejected(), Output(out)
    with contextlib.closing(output):
        async with opened(cfg, inputs, aside) as run:
            samples = card.Samples(cfg.samples, run.work.draw("samples"))
            with told_how_far(run):
                async with contextlib.aclosing(records_of(run, steps_of(cfg))) as records:
                    async for record in records:
                        output.write(record)
                        samples.offer(record)
            totals = await run.journal.totals()
    check_flows(run.work)
    report(run, output.records)
    if not output.records["train"]:
        raise BadData("no record is left to train on", where=cfg.prompts.path or cfg.recipe.name)
    aside.write(out / "set_aside.jsonl", run.steps)
    samples.write(out / "samples.html", f"{cfg.recipe.name}: samples of {cfg.run}")
    card.write(out / "README.md", cfg, inputs, run.work, run.steps, output.records, totals)
    return figures(run, output.records, totals)


async def guess(cfg: DistillVerb, inputs: dict[str, Artifact]) -> Estimate:
    """Work on cfg.estimate records and say what all would cost: records drawn at random before the first step that asks, since steps before it cost nothing;
    or, where the recipe makes its own, the first so many."""
    costs: dict[str, tuple[int, float]] = {}
    async with opened(cfg, inputs, Rejected(), costs) as run:
        roots, steps = list[str](), steps_of(cfg)
        noted = NamedStep("note records", _noted, roots)
        with told_how_far(run):
            if isinstance(making := steps[0].settings, SelfInstruct | Magpie):
                total = making.rows
                few = steps[0]._replace(settings=making.model_copy(update={"rows": min(cfg.estimate, total)}))
                steps = [few, noted, *steps[1:]]
            else:
                first = next((place for place, step in enumerate(steps) if isinstance(step.settings, Asking)), len(steps))
                total = sum([1 async for _ in through(_read(run), steps[:first], run.work)])
                run.work.clear()
                places = set(run.work.draw("estimate").sample(range(total), min(cfg.estimate, total)))
                steps = [*steps[:first], NamedStep("draw records", _drawn, places), noted, *steps[first:]]
            async with contextlib.aclosing(records_of(run, steps)) as records:
                async for _ in records:
                    pass
        if not roots:
            raise BadData("no record came to where teachers are asked")
        return estimate(by_root(costs, roots), total, run.work.draw("bootstrap"))


async def _drawn(records: Records, places: set[int], work: Work) -> Records:
    place = 0
    async for record in records:
        if place in places:
            yield record
        place += 1


async def _noted(records: Records, ids: list[str], work: Work) -> Records:
    async for record in records:
        ids.append(record.id)
        yield record


@contextlib.contextmanager
def told_how_far(run: DistillRun):
    """What stops a run is told with how far it came."""
    try:
        yield
    except UserError as error:
        gone, total, kept, aside, tokens, money = run.state()
        say(
            f"distill: stopped with {gone:,} of {total:,} records through, {kept:,} kept, {aside:,} set aside, {tokens:,} tokens, ${money:,.4f} spent"
        )
        if isinstance(error, BudgetSpent):
            raise BudgetSpent(
                f"{error.what}; {gone:,} of {total:,} records are done, {total - gone:,} remain",
                where=str(run.journal.path),
                fix=[
                    "the same command with a higher budget.tokens or budget.money goes on",
                    "prompts.count=N makes a smaller dataset of the first",
                ],
            ) from None
        raise


def report(run: DistillRun, records: dict[str, int]) -> None:
    """Say what became of the records."""
    flows = run.work.flows
    begun, kept = flows[READ].came if READ in flows else 0, flows[KEEP].went
    made, aside = sum(f.made for f in flows.values()), sum(f.aside.total() for f in flows.values())
    splits = ", ".join(f"{count:,} {split}" for split, count in records.items() if count or split != "preference")
    say(f"distill: {begun:,} records in + {made:,} made = {kept:,} kept + {aside:,} set aside; {splits}")
    for step in run.steps:
        for reason, count in flows[step].aside.most_common() if step in flows else []:
            say(f"distill: set aside {count:,} in {step}: {reason}")
        for name, value in {**run.work.counts.get(step, {}), **run.work.measures.get(step, {})}.items():
            say(f"distill: {step}: {name} {value:,.4g}" if isinstance(value, float) else f"distill: {step}: {name} {value:,}")
    say(f"distill: {run.budget.tokens:,} tokens and ${run.budget.money:,.4f} spent over all commands of this run")


def figures(run: DistillRun, records: dict[str, int], totals: dict[str, Total]) -> dict:
    """The manifest's metrics."""
    flows, work = run.work.flows, run.work
    return {
        **{f"{split}_rows": count for split, count in records.items()},
        "steps": {step: {"came": f.came, "made": f.made, "went": f.went, "aside": dict(f.aside)} for step, f in flows.items()},
        "counts": {step: dict(counts) for step, counts in work.counts.items()},
        "measures": work.measures,
        "spent": {
            name: {"requests": t.requests, "tokens": t.tokens, "money": round(t.money, 9), "lost": t.lost} for name, t in totals.items()
        },
    }
