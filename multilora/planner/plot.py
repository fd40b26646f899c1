"""A plan as a picture: tokens a second and first tokens over the rate of requests. Called by
`cli/plan/command.py`."""

from multilora.planner.chart import Chart, Line, svg
from multilora.planner.planner import ServingPlan


def plot(plan: ServingPlan) -> str:
    """The SVG."""
    w = plan.workload
    mark = (plan.breaks_at, f"breaks at {plan.breaks_at:.3g}") if plan.breaks_at else None
    what = f"{w.gpu}, {w.adapters} adapters of rank {w.rank}, {w.prompt} tokens in, {w.answer} out"
    tokens = Line("tokens/s", [(p.rps, p.tokens_per_second) for p in plan.curve])
    first = [
        Line("99th percentile", [(p.rps, p.first_token_p99 * 1e3) for p in plan.curve]),
        Line("median", [(p.rps, p.first_token_p50 * 1e3) for p in plan.curve]),
    ]
    return svg(
        [
            Chart(f"Output tokens a second: {what}", "requests a second", [tokens], mark=mark),
            Chart("First token, milliseconds", "requests a second", first, mark=mark),
        ]
    )
