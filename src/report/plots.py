"""The page's plots, by Bokeh: they zoom and tell their values, and lie on light and dark ground alike."""

from collections.abc import Sequence
from typing import Any

INK, GRID, SHOWN = "#8a919c", "#8a919c", 500
COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
"""of runs and forms, each legible on white and on near black"""


def figure(title: str, x: str, y: str, *, height: int = 260, **more: Any) -> Any:
    from bokeh.models import BasicTickFormatter, LinearAxis
    from bokeh.plotting import figure as bokeh_figure

    made: Any = bokeh_figure(
        title=title,
        x_axis_label=x,
        y_axis_label=y,
        height=height,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,xwheel_zoom,reset",
        active_scroll=None,
        toolbar_location="right",
        background_fill_alpha=0,
        border_fill_alpha=0,
        outline_line_color=None,
        min_border_left=50,
        **more,
    )
    made.toolbar.logo, made.toolbar.autohide = None, True
    made.title.text_color = made.xaxis.axis_label_text_color = made.yaxis.axis_label_text_color = INK
    made.axis.major_label_text_color = made.axis.axis_line_color = made.axis.major_tick_line_color = INK
    made.axis.minor_tick_line_color = None
    for axis in (*made.xaxis, *made.yaxis):
        if isinstance(axis, LinearAxis):
            axis.formatter = BasicTickFormatter(use_scientific=True, power_limit_low=-4)
    made.axis.axis_label_text_font_style = "normal"
    made.title.text_font_style = "normal"
    made.grid.grid_line_color, made.grid.grid_line_alpha = GRID, 0.2
    return made


def _tips(made: Any, renderers: list[Any], tips: Sequence[tuple[str, str]]) -> None:
    from bokeh.models import HoverTool

    made.add_tools(HoverTool(renderers=renderers, tooltips=list(tips)))


def _legend(made: Any) -> None:
    made.legend.label_text_color = INK
    made.legend.background_fill_alpha = made.legend.border_line_alpha = 0
    made.legend.label_text_font_size = "11px"


def thinned(values: Sequence[Any]) -> list[Any]:
    """At most SHOWN of the values, evenly, the first and last among them."""
    if len(values) <= SHOWN:
        return list(values)
    return [values[round(i * (len(values) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def histogram(lengths: Sequence[int], limit: int | None, unit: str) -> Any:
    """Conversations by length, against the limit of the training."""
    import numpy as np

    counts, edges = np.histogram(lengths, bins=min(40, max(5, len(set(lengths)))))
    made = figure("Length of conversations", unit, "conversations")
    bars = made.quad(top=counts, bottom=0, left=edges[:-1], right=edges[1:], fill_color=COLOURS[0], line_color=None, fill_alpha=0.85)
    _tips(made, [bars], [(unit, "@left{0} to @right{0}"), ("conversations", "@top")])
    if limit and limit <= 2 * edges[-1]:
        from bokeh.models.annotations import Label, Span

        made.add_layout(Span(location=limit, dimension="height", line_color=COLOURS[3], line_dash="dashed"))
        made.add_layout(
            Label(x=limit, y=0, y_units="screen", text=f" train.max_length={limit}", text_color=COLOURS[3], text_font_size="11px")
        )
    return made


def curves(
    runs: Sequence[tuple[str, Sequence[dict]]], key: str, title: str, more: Sequence[tuple[str, Sequence[dict], str]] = ()
) -> Any | None:
    """One figure of the training against steps, a line for each run; None where none has it. more: (label, points, key) drawn as marks."""
    told = [(name, thinned([p for p in points if p.get(key) is not None])) for name, points in runs]
    lines = [(name, points) for name, points in told if len(points) > 1]
    if not lines:
        return None
    made = figure(title, "step", "")
    several = len(lines) > 1 or more
    for number, (name, points) in enumerate(lines):
        label = {"legend_label": name} if several else {}
        drawn = made.line(
            [p["step"] for p in points], [p[key] for p in points], color=COLOURS[number % len(COLOURS)], line_width=2, **label
        )
        _tips(made, [drawn], [("run", name), ("step", "@x"), (title, "@y{0.0000}")])
    for number, (name, marks, of) in enumerate(more):
        label = {"legend_label": name}
        drawn = made.scatter(
            [p["step"] for p in marks], [p[of] for p in marks], color=COLOURS[(number + 1) % len(COLOURS)], size=8, **label
        )
        _tips(made, [drawn], [(name, "@y{0.0000}"), ("step", "@x")])
    if several:
        _legend(made)
    return made


def intervals(named: Sequence[tuple[str, float, Sequence[float] | None]], title: str, unit: str, *, zero: bool = False) -> Any | None:
    """A figure of several models with its interval, one below the other. zero: mark where nothing differs."""
    if not named:
        return None
    from bokeh.models import ColumnDataSource
    from bokeh.models.annotations import Span, Whisker

    names = [name for name, _, _ in named]
    made = figure(title, unit, "", height=90 + 34 * len(named), y_range=list(reversed(names)))
    low = [v if i is None else i[0] for _, v, i in named]
    high = [v if i is None else i[1] for _, v, i in named]
    source = ColumnDataSource({"name": names, "value": [v for _, v, _ in named], "low": low, "high": high})
    made.add_layout(
        Whisker(
            base="name",
            lower="low",
            upper="high",
            dimension="width",
            source=source,
            line_color=COLOURS[0],
            line_width=2,
            level="annotation",
        )
    )
    if zero:
        made.add_layout(Span(location=0, dimension="height", line_color=INK, line_dash="dashed"))
    marks = made.scatter("value", "name", source=source, size=10, color=COLOURS[0])
    made.x_range.start = min(low) - 0.08 * ((max(high) - min(low)) or 1)
    made.x_range.end = max(high) + 0.08 * ((max(high) - min(low)) or 1)
    _tips(made, [marks], [("", "@name"), (unit, "@value{0.0000} [@low{0.0000}, @high{0.0000}]")])
    return made


def embedded(plots: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """(the library and the plots' script, {name: its place on the page}); '' and nothing where there are no plots."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    if not plots:
        return "", {}
    script, places = components(plots)
    return Resources(mode="inline", components=["bokeh"]).render_js() + script, places
