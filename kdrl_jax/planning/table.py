"""A run's plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from kdrl_jax.planning.hlo import COLLECTIVES
from kdrl_jax.planning.run_plan import RunPlan
from kdrl_jax.training.memory import human


def text_of(plan: RunPlan) -> str:
    """Memory by phase and part, programs, speed, and whether it fits."""
    machine, peak = plan.machine, plan.machine.peak
    lines = [
        f"{machine.name}: {machine.count} x {machine.chip.kind}, {human(plan.limit)} each, "
        f"{peak.flops / 1e12:.0f} TFLOP/s, {peak.bandwidth / 1e9:.0f} GB/s, "
        f"links {machine.chip.link / 1e9:.0f} GB/s",
        f"mesh {_axes(plan.mesh)}; the teacher's {_axes(plan.teacher_mesh)}; of rollouts "
        f"{_axes(plan.rollout_mesh)}",
        "",
        "Memory, estimated from shapes",
        plan.estimate.table(),
    ]
    if plan.compiled:
        cells = [plan.compiled_need(phase) for phase in plan.estimate.phases]
        row = "".join(f"{'' if x is None else human(x):>12}" for x in cells)
        lines += [f"{'by the compiler':26}{row}", "", "Memory, by the compiler"]
        lines += [_programs(plan), "", _collectives(plan)]
    else:
        lines += ["", f"Not compiled: {plan.why}"]
    lines += ["", "Seconds of the longest step: every completion uses its whole budget"]
    lines += [_speed(plan), ""]
    lines += [f"note: {note}" for note in plan.notes]
    lines += [f"does not fit: {problem}" for problem in plan.problems] or ["fits"]
    return "\n".join(lines)


def _axes(mesh: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "of 1"


def _programs(plan: RunPlan) -> str:
    head = ["program", "arguments", "results", "temporary", "beside", "sum", ""]
    rows = [head]
    for x in plan.compiled.values():
        if x.error:
            sizes = ["", "", human(x.temporary) if x.limit else "", human(x.beside), human(x.need)]
        else:
            parts = (x.arguments, x.results, x.temporary, x.beside, x.need)
            sizes = [human(size) for size in parts]
        verdict = "" if x.fits(plan.limit) else "too large" if x.limit or not x.error else "failed"
        rows.append([x.program, *sizes, verdict])
    return _lay_out(rows)


def _collectives(plan: RunPlan) -> str:
    if any(x.no_text for x in plan.compiled.values()) and not any(
        x.account for x in plan.compiled.values()
    ):
        return "Collectives: not known, as a note below says"
    there = [k for k in COLLECTIVES if any(k in _moved(x) for x in plan.compiled.values())]
    rows = [["program", *there]]
    for x in plan.compiled.values():
        sizes = [_moved(x)[k].size / 1e9 if k in _moved(x) else 0.0 for k in there]
        rows.append([x.program, *("?" if x.no_text else f"{size:.3g}" for size in sizes)])
    return "Collectives: GB that a device receives in all turns\n" + _lay_out(rows, 20)


def _moved(x):
    return x.account.moved if x.account else {}


def _speed(plan: RunPlan) -> str:
    rows = [["phase", "compute", "memory", "links", "bound", "compiler", "tokens/s at most"]]
    for name, x in plan.speed.items():
        seconds = [_seconds(s) for s in (x.compute, x.memory, x.links, x.bound, x.compiler)]
        rows.append([name, *seconds, f"{x.tokens / x.bound:,.0f} ({x.limited_by})"])
    whole, bound = plan.step_seconds("compiler"), plan.step_seconds("bound")
    assert bound is not None
    per_second = f"{plan.learnt / bound:,.0f}"
    rows.append(["step", "", "", "", _seconds(bound), _seconds(whole), per_second])
    return _lay_out(rows, 11)


def _seconds(x: float | None) -> str:
    return "?" if x is None else f"{x:.3g}" if x < 100 else f"{x:,.0f}"


def _lay_out(rows: Sequence[Sequence[str]], width: int = 12) -> str:
    first = max(len(row[0]) for row in rows) + 1
    return "\n".join(
        f"{row[0]:{first}}" + "".join(f"{cell:>{width}}" for cell in row[1:-1]) + f"  {row[-1]:>18}"
        for row in rows
    )
