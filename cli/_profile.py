"""What a sweep prints of the profile that it measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._output import print_line, print_table

if TYPE_CHECKING:
    from peft_onelayer.records.ranking import LayerRanking


def print_profile(profile: LayerRanking) -> None:
    from peft_onelayer.records.figures import Figures, with_error

    def cell(value: float | None, error: float | None, sign: str = "") -> str:
        return "" if value is None else with_error(Figures(value, error), sign)

    sweep = profile.sweep
    assert sweep is not None and sweep.means and sweep.full_gain and sweep.contribution_errors and sweep.seeds
    rows = [["base", cell(sweep.base, sweep.base_error), "", ""]]
    rows.append(["full", f"{sweep.full:.4f}", cell(sweep.full_gain[0], sweep.full_gain[1], "+"), ""])
    for k, mean in enumerate(sweep.means):
        if mean is not None:
            gained = cell(profile.scores[k], profile.errors[k], "+")
            c = "undefined" if sweep.undefined else cell(sweep.contribution[k], sweep.contribution_errors[k])
            rows.append([str(k), f"{mean:.4f}", gained, c])
        elif str(k) in sweep.stopped:
            rows.append([str(k), f"stopped after {', '.join(map(str, sweep.stopped[str(k)]))} steps", "", ""])
    print_table(
        f"{sweep.algorithm} on {profile.task}: {sweep.steps} steps, seeds {', '.join(map(str, sweep.seeds))}, "
        f"{sweep.problems} problems x {sweep.samples}",
        ["block", "score", "gain", "C"],
        rows,
    )
    print_line("± one standard error: over the problems, paired, and over the seeds where there are several.")
    if sweep.undefined:
        print_line(f"C is undefined: {sweep.undefined}.")
    if sweep.regimes:
        from peft_onelayer.sweep.regimes import regime_lines, regime_table

        print_table("C under three regimes of learning rates", *regime_table(sweep.regimes))
        for line in regime_lines(sweep.regimes, sweep.seeds):
            print_line(line)
    print_line(_verdict(profile))
    for line in _advice(profile):
        print_line(line)
    if sweep.learning_rate_search or sweep.learning_rates_found:
        print_line(f"Learning rates found: {profile.learning_rate:g} for a block, {sweep.full_learning_rate:g} full.")
    cost = profile.cost
    print_line(
        f"Cost: {cost['tokens_generated']:,.0f} tokens generated, {cost['tokens_trained']:,.0f} trained on, "
        f"{cost['seconds']:.0f} s of runs; {cost['share']:.1f} times one run of a block."
    )


def _advice(profile: LayerRanking) -> list[str]:
    """What the scores tell of the learning rates."""
    from peft_onelayer.statistics import Z_95

    sweep, lines = profile.sweep, []
    assert sweep is not None and sweep.full_gain
    still = [k for k in sorted(profile.order) if profile.scores[k] == 0 == profile.errors[k]]
    if still and (len(still) < len(profile.order) or sweep.full_gain != [0, 0]):
        lines.append(
            f"Scored as the base on every problem: block {', '.join(map(str, still))}; a higher --learning-rate or "
            "more --steps may move it."
        )

    def fell(gain: float | None, error: float | None) -> bool:
        return gain is not None and error is not None and gain < -Z_95 * error

    if fallen := [str(k) for k in sorted(profile.order) if fell(profile.scores[k], profile.errors[k])]:
        lines.append(
            f"Below the base, beyond noise: block {', '.join(fallen)}; the learning rate may be too high there. To try "
            f"another: --layers {','.join(fallen)} --learning-rate RATE, with another --out."
        )
    if fell(*sweep.full_gain):
        lines.append("All parameters ended below the base, beyond noise; a lower --full-learning-rate may mend it.")
    return lines


def _verdict(profile: LayerRanking) -> str:
    if not profile.order:
        return "No block was measured to the end."
    best = profile.order[0]
    if len(profile.order) == 1:
        gained = "it did not gain beyond noise" if profile.pick is None else "it gained"
        return f"Block {best} is the only one that was measured; {gained}."
    others = [str(k) for k in sorted(profile.tied) if k != best]
    tie = f"indistinguishable from {', '.join(others)}" if others else "ahead of every other"
    if profile.pick is None:
        return f"No block gained beyond noise; the most, block {best}, is {tie}."
    return f"Block {best} is the best, {tie}."
