"""A model on a board: does it fit, how fast, how long, and the equations behind each figure."""

import typing

from src.core.log import size
from src.plan.answer import Answer
from src.settings.verbs import PlanVerb
from src.sizing.budget import (
    Fit,
    Format,
    Quantity,
    board_fit,
    board_of,
    device_parts,
    embedding_bytes,
    format_of,
    head_bytes,
    host_needs,
    kv_cache_bytes,
    largest_batch,
    layer_bytes,
)
from src.sizing.chart import Point
from src.sizing.shape import ModelShape
from src.sizing.speed import decode_ms, first_token_ms, rates_of, speed_lines


def board_answer(shape: ModelShape, cfg: PlanVerb) -> Answer:
    target, board = cfg.target, board_of(cfg.target)
    form, fit = format_of(shape, target), board_fit(shape, target)
    rates = rates_of(board)
    speed = 1000 / decode_ms(shape, form, rates, form.context) if rates else None
    first = first_token_ms(shape, form, rates, form.prompt) / 1000 if rates else None
    lines = [
        f"{target.name} ({target.kind}): weights {form.name}, context {form.context:,}, prompt {form.prompt:,} in chunks of {form.chunk}",
        *weight_lines(shape, cfg),
        f"KV cache = {form.kv:.4g} B x {shape.kv_values:,} values x {form.context:,} tokens = {size(kv_cache_bytes(shape, form, form.context))} for one sequence",
        *fit.lines,
        *length_lines(fit, form, target.name),
        *speed_lines(shape, form, board, form.context, form.prompt),
        *batch_lines(shape, cfg, form, fit),
        *host_needs(shape, target)[2],
    ]
    longest = shape.max_positions or form.context
    contexts = [n for n in (256 * 2**i for i in range(14)) if n <= min(longest, max(form.context, 32768))]
    points = [
        Point(
            length=n,
            memory=sum(device_parts(shape, target, form, n, min(form.prompt, n)).values()),
            limit=fit.available,
            speed=1000 / decode_ms(shape, form, rates, n) if rates else None,
            wait=first_token_ms(shape, form, rates, n) / 1000 if rates else None,
        )
        for n in contexts
    ]
    said = (
        f"; {speed:,.1f} tokens/s at a context of {form.context:,}, the first token of a prompt of {form.prompt:,} after {first:,.2f} s"
        if rates
        else ""
    )
    return Answer(
        on=target.name,
        fits=fit.fits,
        needed=fit.needed,
        available=fit.available,
        host=0,
        speed=speed,
        wait=first,
        longest=fit.longest,
        words=board_words(fit, target.name) + said,
        lines=lines,
        points=points,
    )


def board_words(fit: Fit, name: str) -> str:
    if fit.available is None:
        return f"not known whether it fits {name}: {size(fit.needed)} are needed, its memory is not known"
    over = fit.needed > fit.available
    if fit.fits:
        return f"fits {name}: {size(fit.needed)} of {size(fit.available)}"
    if over:
        return f"does NOT fit {name}: {size(fit.needed)} are needed, {size(fit.available)} are there"
    return f"does NOT fit {name}: the embedding table of {size(fit.host_needed)} goes into the host's memory, {size(fit.host_available or 0)} are there"


def weight_lines(shape: ModelShape, cfg: PlanVerb) -> list[str]:
    """Bytes of the weights in each type the target can be given."""
    setting = "weight_type" if "weight_type" in type(cfg.target).model_fields else "format"
    if setting not in type(cfg.target).model_fields:
        return []
    names = [n for n in typing.get_args(type(cfg.target).model_fields[setting].annotation) if n != "auto"]
    forms = {name: format_of(shape, cfg.target.model_copy(update={setting: name})) for name in names}
    width = max(map(len, names))
    return [
        f"  {name:<{width}}  layers {size(layer_bytes(shape, f)):>8}  output layer {size(head_bytes(shape, f)):>8}  embedding {size(embedding_bytes(shape, f)):>8}"
        for name, f in forms.items()
    ]


def length_lines(fit: Fit, form: Format, name: str) -> list[str]:
    if fit.longest is None or fit.longest_prompt is None:
        return []
    if not fit.longest:
        return [f"no context fits {name}"]
    return [
        f"longest context that fits with this prompt: {fit.longest:,} tokens",
        f"longest prompt within it: {fit.longest_prompt:,} tokens, {fit.longest_prompt // form.chunk:,} chunks",
    ]


def batch_lines(shape: ModelShape, cfg: PlanVerb, form: Format, fit: Fit) -> list[str]:
    """The best batch, up to which another sequence costs little, and the largest that memory allows."""
    if fit.available is None or not fit.fits:
        return []
    most = largest_batch(shape, cfg.target, form, fit.available, form.context, form.prompt)
    kv = kv_cache_bytes(shape, form, form.context)
    return [
        str(Quantity("largest batch", most, "sequences", f"KV caches of {size(kv)} in what {size(fit.available)} leave beside the weights"))
    ]
