"""Print a plan as tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pretune.core.terminal import shown
from pretune.core.units import duration, memory, short
from pretune.tasks.plan.estimate import Plan
from pretune.tasks.plan.family import Biggest
from pretune.tasks.plan.scaling import Scaling


def show(plan: Plan, console: Console | None = None) -> None:
    """Print the plan."""
    console = console or Console()
    tables = [_parameters(plan), _memory(plan), _budget(plan), *([_biggest(plan)] if plan.biggest else [])]
    if plan.scaling is not None:
        tables.append(_scaling(plan.scaling))
    for table in tables:
        console.print(table)
    for note in plan.notes:
        console.print(shown(f"Note: {note}."), highlight=False)


def _parameters(plan: Plan) -> Table:
    table = _table(f"{plan.name}: parameters", "part", "parameters", "share")
    total = sum(plan.parameters.values())
    for part, count in plan.parameters.items():
        table.add_row(part, f"{count:,}", f"{count / total:.1%}")
    table.add_section()
    table.add_row("all", f"{total:,}", f"{plan.flops_per_token / 1e6:,.1f} MFLOP a token")
    return table


def _memory(plan: Plan) -> Table:
    each = "" if plan.scaling is None else " of each device"
    title = f"memory{each} at the peak of a step, micro-batches of {plan.micro_batch} sequences"
    table = _table(title, "part", "memory", plan.precision)
    for part, size in plan.memory.items():
        table.add_row(part, memory(size), "")
    table.add_section()
    where = shown(f"of {memory(plan.usable_memory)} on {plan.device.name}")
    table.add_row("all", memory(sum(plan.memory.values())), where)
    table.add_row("largest micro-batch", str(plan.largest_micro_batch or "none"), "that fits and divides a step")
    table.add_row("decoding, 1,000 tokens", memory(1000 * plan.cache_bytes_per_token), "keys and values, bfloat16")
    return table


def _budget(plan: Plan) -> Table:
    device, reach = plan.device, plan.tokens_per_parameter
    many = "" if plan.scaling is None else f"{plan.scaling.planned.devices:,} x "
    table = _table(f"what the budget buys on {many}{device.name} ({plan.limit} ends it)", "", "", "")
    peak = f"{device.peak_flops / 1e12:.4g} TFLOP/s ({device.source})"
    reached = plan.mfu if plan.scaling is None else plan.mfu * plan.scaling.planned.efficiency
    table.add_row("speed", f"{plan.tokens_per_second:,.0f} tokens/s", f"{reached:.1%} of {many}{peak}")
    table.add_row("time", duration(plan.seconds), "")
    table.add_row("steps", f"{plan.steps:,}", "")
    table.add_row("tokens", f"{plan.tokens:,}", "")
    optimum = f"compute-optimal is about {plan.compute_optimal_ratio:g} (arXiv:2203.15556)"
    table.add_row("tokens per parameter", f"{reach:.3g}", optimum)
    if plan.fitted_loss is not None:
        published = "arXiv:2404.10102, for other data and tokens; off by +0.3 and -0.3 on two known runs"
        table.add_row("loss, by a published fit", f"{plan.fitted_loss:.2f}", published)
    return table


def _scaling(scaling: Scaling) -> Table:
    """The same step on more and more devices. Fits 80 columns."""
    title = f"the same step on several devices, joined by {scaling.link} ({scaling.source})"
    table = _table(title, "devices", "memory", "step", "waits", "each sends", "tokens/s", "efficiency")
    for one in scaling.others:
        planned = one.devices == scaling.planned.devices
        table.add_row(
            f"{one.devices:,} {one.kind}",
            "too much" if one.memory is None else memory(one.memory),
            f"{1000 * one.step:,.1f} ms",
            f"{one.waits / one.step:.1%}",
            memory(one.sent),
            short(one.tokens_per_second),
            f"{one.efficiency:.1%}",
            style="bold" if planned else None,
        )
    return table


def _biggest(plan: Plan) -> Table:
    """Layers x dim of the biggest models, and what the next larger one runs out of. Fits 80 columns."""
    title = f"the biggest model of these proportions on {plan.device.name}"
    table = _table(title, "for", "size", "shape", "memory", "tokens/s", "time", "limit")
    for one in plan.biggest:
        table.add_row(*_biggest_row(one))
    return table


def _biggest_row(one: Biggest) -> tuple[str, ...]:
    if one.model is None:
        return (one.way, "none", "", "", "", "", one.limit)
    shape = f"{one.model.num_layers} x {one.model.dim}"
    time = "" if one.seconds is None else duration(one.seconds)
    return (one.way, short(one.parameters), shape, memory(one.memory), f"{one.tokens_per_second:,.0f}", time, one.limit)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in (1, 3, 4, 5) else "left", no_wrap=index == 0)
    return table
