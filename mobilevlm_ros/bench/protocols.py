"""The paper's two latency protocols on our engines, with the paper's columns.

Times are those of a wall clock around our own loop: sampling is all of the loop that is not inside the language
engine, choosing a token, its probability and its text. Totals hold everything from the prompt on, loading too in
Table 6, where the paper's Eq. 4 has it; unlike the paper's, they include the vision encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mobilevlm_ros.bench.language_cost import LanguageCost
from mobilevlm_ros.bench.paper import TABLE5_PROMPT, TABLE6_PROMPT, TABLE6_SIDE, model_of
from mobilevlm_ros.bench.process import Contestant
from mobilevlm_ros.bench.quiet import QuietMachine
from mobilevlm_ros.runtime.prompt import TEMPLATES

__all__ = ['Measured', 'complete', 'see', 'see_language_only']

_FIRST_INDEX = 5000
"""Of the frames here, so that none was seen by another part of the benchmark."""


@dataclass(frozen=True)
class Measured:
    """One row of either table; the median run by its total.

    :ivar name: what was measured.
    :ivar paper_name: the paper's name for a language model of this shape; empty if it has none.
    :ivar ve_per_token_ms: the vision encoder over the visual tokens; None in Table 5, and where none ran.
    :ivar ve_per_patch_ms: the same over the patches of the image.
    :ivar foreign_cores: load of other programs meanwhile.
    """

    name: str
    paper_name: str
    bits: float
    size_gb: float
    prompt_tokens: int
    sample: float
    prompt: float
    eval: float
    load_s: float
    total_s: float
    n_runs: int
    n_tokens: int
    ve_per_token_ms: float | None = None
    ve_per_patch_ms: float | None = None
    foreign_cores: float = 0.0
    runs: list[dict[str, float]] = field(default_factory=list)

    def as_record(self) -> dict[str, Any]:
        """For the JSON line."""
        return asdict(self)


def complete(
    engine: Contestant, name: str, cost: LanguageCost, machine: QuietMachine, *, n_tokens: int, n_runs: int
) -> Measured:
    """Table 5: continue the paper's text by ``n_tokens``."""
    runs, foreign = _runs(engine, machine, n_runs, 'complete', prompt=TABLE5_PROMPT, n_tokens=n_tokens)
    return _measured(runs, foreign, name, cost, engine.call('describe')['load_s'], cost.file_bytes, 0.0)


def see(
    engine: Contestant,
    name: str,
    cost: LanguageCost,
    n_patches: int,
    machine: QuietMachine,
    *,
    n_tokens: int,
    n_runs: int,
) -> Measured:
    """Table 6: the paper's question about a new picture, answered with ``n_tokens``."""
    described = engine.call('describe')
    asked = {'side': TABLE6_SIDE, 'question': TABLE6_PROMPT, 'n_tokens': n_tokens}
    runs, foreign = _runs(engine, machine, n_runs, 'answer', _FIRST_INDEX, **asked)
    row = _measured(runs, foreign, name, cost, described['load_s'], described['files_bytes'], described['load_s'])
    ve_ms = 1e3 * _median_run(runs)['vision_s']
    return replace(
        row,
        ve_per_token_ms=ve_ms / described['n_visual_tokens'],
        ve_per_patch_ms=ve_ms / n_patches if n_patches else None,
    )


def see_language_only(
    engine: Contestant,
    name: str,
    cost: LanguageCost,
    machine: QuietMachine,
    *,
    n_visual_tokens: int,
    n_tokens: int,
    n_runs: int,
) -> Measured:
    """Table 6 for a model of which there is only the GGUF file: random rows stand for ``n_visual_tokens``."""
    before, after = TEMPLATES['v1']().render(TABLE6_PROMPT).split('<image>')
    asked = {'before': before, 'after': after, 'n_visual_tokens': n_visual_tokens, 'n_tokens': n_tokens}
    runs, foreign = _runs(engine, machine, n_runs, 'answer', _FIRST_INDEX, **asked)
    load_s = engine.call('describe')['load_s']
    return _measured(runs, foreign, name, cost, load_s, cost.file_bytes, load_s)


def _runs(
    engine: Contestant,
    machine: QuietMachine,
    n_runs: int,
    method: str,
    first_index: int | None = None,
    /,
    **arguments: Any,
) -> tuple[list[dict[str, float]], float]:
    """``n_runs`` after a short one that does not count; and the greatest foreign load."""
    runs: list[dict[str, float]] = []
    foreign = 0.0
    for run in range(n_runs + 1):
        index = {} if first_index is None else {'index': first_index + run}
        tokens = {} if run else {'n_tokens': min(arguments['n_tokens'], 4)}
        machine.wait()
        with machine.watch() as load:
            result = engine.call(method, **{**arguments, **index, **tokens})
        if run:
            runs.append(result)
            foreign = max(foreign, load.foreign_cores)
    return runs, foreign


def _median_run(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return sorted(runs, key=lambda run: run['total_s'])[(len(runs) - 1) // 2]


def _measured(
    runs: list[dict[str, float]],
    foreign_cores: float,
    name: str,
    cost: LanguageCost,
    load_s: float,
    size_bytes: int,
    counted_load_s: float,
) -> Measured:
    run = _median_run(runs)
    return Measured(
        name=name,
        paper_name=model_of(cost),
        bits=cost.bits_per_weight,
        size_gb=size_bytes / 1e9,
        prompt_tokens=int(run['prompt_tokens']),
        sample=_rate(run['sampled'], run['sample_s']),
        prompt=_rate(run['prompt_tokens'], run['prompt_s']),
        eval=_rate(run['evaluated'], run['eval_s']),
        load_s=load_s,
        total_s=run['total_s'] + counted_load_s,
        n_runs=len(runs),
        n_tokens=int(run['sampled']),
        foreign_cores=foreign_cores,
        runs=runs,
    )


def _rate(amount: float, seconds: float) -> float:
    return amount / max(seconds, 1e-9)
