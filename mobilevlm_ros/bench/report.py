"""The benchmark for people: tables of the cost card, the figures, the paper's protocols and the comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mobilevlm_ros.bench.card import PROMPT_TOKENS, CostCard
from mobilevlm_ros.bench.figures import BundleFigures
from mobilevlm_ros.bench.paper import TABLE5, TABLE6
from mobilevlm_ros.bench.protocols import Measured
from mobilevlm_ros.bench.series import BUSY_CORES, Series
from mobilevlm_ros.bench.versus import Comparison

__all__ = ['Report']

_BUSY_MARK = '*'


class Report:
    """Prints to one console, as results come."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def machine(self, machine: dict[str, Any], versions: dict[str, str], settings: dict[str, Any]) -> None:
        """On what, with what, how."""
        table = _plain('The machine')
        table.add_row('processor', f'{machine["cpu"]}, {machine["cores"]} cores, {machine["architecture"]}')
        table.add_row('instructions', ' '.join(machine['flags']) or 'unknown')
        table.add_row('memory', f'{machine["memory_gib"]} GiB, {machine["available_gib"]} GiB free')
        table.add_row('versions', ', '.join(f'{name} {version}' for name, version in versions.items()))
        table.add_row('settings', ', '.join(f'{name} {value}' for name, value in settings.items()))
        self._console.print(table)

    def card(self, name: str, card: CostCard) -> None:
        """What an answer costs, what the machine can do, and what follows."""
        language, vision, ceilings = card.language, card.vision, card.ceilings
        table = _plain(f'Cost card of {name}')
        table.add_row(
            'language model',
            f'{language.architecture}, {language.n_layers} layers, {language.n_embd} wide, '
            f'{language.n_parameters / 1e6:,.0f} M parameters, {language.bits_per_weight:.2f} bits a weight',
        )
        table.add_row('read per token', f'{language.weight_bytes / 1e6:,.1f} MB of {language.file_bytes / 1e6:,.1f} MB')
        table.add_row('keys and values', f'{language.kv_bytes:,} bytes a position')
        table.add_row('decode', f'{_flops(language.decode_flops)} a token')
        table.add_row('prefill', f'{_flops(language.prompt_flops)} a token (no logits but of the last)')
        table.add_row('attention', f'{_flops(language.attention_flops)} a token for each position it attends to')
        if vision is not None:
            table.add_row(
                'vision',
                f'tower {_flops(vision.tower_flops)}, projector {_flops(vision.projector_flops)} an image, '
                f'{"int8" if vision.int8 else "floating point"}, file {vision.file_bytes / 1e6:,.1f} MB',
            )
        busy = ceilings.foreign_cores > BUSY_CORES
        threads = f'{ceilings.n_threads} threads'
        table.add_row(
            _marked('ceiling: memory', busy), f'{ceilings.read_bytes / 1e9:.1f} GB/s read (numpy max and or, {threads})'
        )
        for what, product, fp32, int8 in (
            ('vision', ceilings.vision_product, ceilings.vision_fp32, ceilings.vision_int8),
            ('prompt', ceilings.prompt_product, ceilings.prompt_fp32, ceilings.prompt_int8),
        ):
            if product is not None and fp32 is not None:
                shape = 'x'.join(map(str, product))
                eight = 'int8 not measured: no onnx' if int8 is None else f'int8 {int8 / 1e9:.0f} GOP/s (onnxruntime)'
                table.add_row(
                    _marked(f'ceiling: {what} product', busy),
                    f'{shape}: fp32 {fp32 / 1e9:.0f} GFLOP/s (numpy BLAS), {eight}',
                )
        table.add_row('bound: decode', f'{1 / card.decode_bound_s(0):.1f} tok/s, reading weights')
        prefill = PROMPT_TOKENS / card.prefill_bound_s(PROMPT_TOKENS)
        table.add_row('bound: prefill', f'{prefill:.0f} tok/s, {PROMPT_TOKENS} tokens at the prompt product')
        if card.vision_bound_s is not None:
            table.add_row('bound: vision', f'{card.vision_bound_s:.3f} s at the vision product')
        self._console.print(table)
        self._busy(busy)

    def figures(self, figures: BundleFigures) -> None:
        """The series with their shares of the bounds, and memory."""
        table = _grid(f'Figures of {figures.description["model_id"]}')
        for column in ('', 'median', '95 % interval', 'p90', 'best', 'n', 'bound', 'share of bound'):
            table.add_column(column, justify='left' if not column else 'right')
        for series in figures.series.values():
            bound = None if series.bound_s is None else series.as_record()['bound']
            table.add_row(
                _marked(series.name, series.busy),
                _value(series, series.median),
                _range(series, *series.interval),
                *(_value(series, value) for value in (series.p90, series.best)),
                str(len(series.seconds)),
                '–' if bound is None else _value(series, bound),
                '–' if series.share is None else f'{series.share:.0%}',
            )
        self._console.print(table)
        for name, ratio in figures.ratios.items():
            self._console.print(
                f'{name}: {ratio.value:.2f} times as fast as one after the other '
                f'(95 % interval {ratio.low:.2f} to {ratio.high:.2f})',
                highlight=False,
            )
        self._kept(figures.series.values())
        described, memory = figures.description, figures.memory
        self._kernels({'ours': described['kernel']}, described['quantization'])
        self._console.print(
            f'load {described["load_s"]:.2f} s, and {described["check_s"]:.2f} s to check the hashes of its files '
            f'({_mib(described["files_bytes"])}); peak memory {_mib(described["memory_loaded"]["peak"])} loaded, '
            f'{_mib(memory["peak"])} after one answer: {_mib(memory["own"])} of its own now, {_mib(memory["mapped"])} '
            'mapped files that the system can take back',
            highlight=False,
        )
        self._busy(any(series.busy for series in figures.series.values()))

    def table5(self, rows: Sequence[Measured]) -> None:
        """The paper's Table 5 with our rows on top."""
        table = _grid("Language model latency, protocol of the paper's Table 5 (tok/s)")
        for column in ('model', 'bits', 'measured on', 'size GB', 'sample', 'eval prompt', 'eval', 'total s'):
            table.add_column(column, justify='left' if column in ('model', 'measured on') else 'right')
        for row in rows:
            table.add_row(
                _named(row),
                f'{row.bits:.1f}',
                'this machine',
                *(f'{row.size_gb:.2f}', f'{row.sample:,.0f}', f'{row.prompt:.2f}', f'{row.eval:.2f}'),
                f'{row.total_s:.2f}',
            )
        table.add_section()
        names = {row.paper_name for row in rows}
        for paper in TABLE5:
            table.add_row(
                *(paper.model, str(paper.bits), paper.device, f'{paper.size_gb:.1f}', f'{paper.sample:,.0f}'),
                *(f'{paper.prompt:.2f}', f'{paper.eval:.2f}', f'{paper.total_s:.2f}'),
                style='bold' if paper.model in names else None,
            )
        self._console.print(table)
        self._after_protocol(rows, 400, 'Devices of the paper: llama.cpp on the CPU of the phone, CUDA on Orin.')

    def table6(self, rows: Sequence[Measured]) -> None:
        """The paper's Table 6 with our rows on top."""
        table = _grid("Vision language model latency, protocol of the paper's Table 6 (tok/s)")
        left = ('model', 'measured on')
        columns = (*left, 'size GB', 'VE ms/token', 'VE ms/patch', 'sample', 'eval prompt', 'eval', 'load s', 'total s')
        for column in columns:
            table.add_column(column, justify='left' if column in left else 'right')
        for row in rows:
            table.add_row(
                _named(row),
                'this machine',
                f'{row.size_gb:.2f}',
                *('–' if ve is None else f'{ve:.2f}' for ve in (row.ve_per_token_ms, row.ve_per_patch_ms)),
                *(f'{row.sample:,.0f}', f'{row.prompt:.2f}', f'{row.eval:.2f}', f'{row.load_s:.2f}'),
                f'{row.total_s:.2f}',
            )
        table.add_section()
        names = {row.paper_name for row in rows}
        for paper in TABLE6:
            table.add_row(
                *(paper.model, paper.device, f'{paper.size_gb:.2f}', f'[{paper.ve_ms:.2f}]'.replace('[', r'\[')),
                *(f'[{paper.ve_ms:.2f}]'.replace('[', r'\['), f'{paper.sample:,.0f}', f'{paper.prompt:.2f}'),
                *(f'{paper.eval:.2f}', '–', f'{paper.total_s:.2f}'),
                style='bold' if paper.language in names else None,
            )
        self._console.print(table)
        self._after_protocol(
            rows,
            256,
            'VE: ours is divided by visual tokens and by patches; the paper does not say which it divided by (its one '
            'figure stands in both columns, in brackets), and users of the same phone measured 143 to 147 ms. Totals: '
            "ours hold loading and the vision encoder, the paper's no vision encoder; two of its phone rows exceed "
            'their own totals.',
        )

    def comparisons(
        self, comparisons: Sequence[Comparison], kernels: Mapping[str, dict[str, Any] | None], quantization: str
    ) -> None:
        """Ours against others, with ratios.

        :param kernels: by contestant; None: it does not run llama.cpp.
        :param quantization: of the language model.
        """
        table = _grid('Against others, turn by turn in the same run')
        for column in ('', 'against', 'ours', 'theirs', 'ratio', '95 % interval', 'n'):
            table.add_column(column, justify='right' if column in ('ours', 'theirs', 'ratio', 'n') else 'left')
        for one in comparisons:
            table.add_row(
                _marked(one.metric, one.ours.busy or one.theirs.busy),
                one.rival,
                _value(one.ours, one.ours.median),
                _value(one.theirs, one.theirs.median),
                f'{one.ratio.value:.2f}x',
                f'{one.ratio.low:.2f} to {one.ratio.high:.2f}',
                str(len(one.ours.seconds)),
            )
        self._console.print(table)
        self._console.print(
            'Above 1 we are faster. mtmd and PyTorch keep nothing between questions, so a known frame is a new one to '
            'them. mtmd computes a wrong graph for MobileVLM: its speed is compared, not its answers.',
            highlight=False,
        )
        self._kept([one.ours for one in comparisons])
        self._kernels(kernels, quantization)
        self._busy(any(one.ours.busy or one.theirs.busy for one in comparisons))

    def _kept(self, series: Iterable[Series]) -> None:
        """What was kept from earlier questions and not computed, in positions of the prompt."""
        kept = {one.name: f'{one.name} {one.n_reused} of {one.n_prompt}' for one in series if one.n_prompt}
        if kept:
            self._console.print(
                f'Positions of the prompt that we keep from earlier questions: {"; ".join(kept.values())}. A running '
                'node keeps the prompt up to the image; a first question after the start finds nothing.',
                highlight=False,
            )

    def _kernels(self, kernels: Mapping[str, dict[str, Any] | None], quantization: str) -> None:
        """Whose products are used, where it matters."""
        if quantization == 'Q4_0':
            named = [f"{who}: {one['kernel']}'s ({one['reason']})" for who, one in kernels.items() if one]
            self._console.print(f'Products with Q4_0 weights: {"; ".join(named)}.', highlight=False)

    def _after_protocol(self, rows: Sequence[Measured], n_tokens: int, caveat: str) -> None:
        self._console.print(caveat, highlight=False)
        if any(row.n_tokens != n_tokens for row in rows):
            self._console.print(f'Ours stopped at {rows[0].n_tokens} tokens, the paper went on to {n_tokens}.')
        self._busy(any(row.foreign_cores > BUSY_CORES for row in rows))

    def _busy(self, some: bool) -> None:
        if some:
            self._console.print(
                f'{_BUSY_MARK} other programs took more than {BUSY_CORES} cores meanwhile: '
                'measure again on a quiet machine',
                style='yellow',
                highlight=False,
            )


def _plain(title: str) -> Table:
    table = Table(title=title, title_justify='left', title_style='bold', box=None, show_header=False, pad_edge=False)
    table.add_column(style='dim', no_wrap=True)
    table.add_column()
    return table


def _grid(title: str) -> Table:
    return Table(title=title, title_justify='left', title_style='bold', box=None, pad_edge=False, header_style='dim')


def _named(row: Measured) -> str:
    name = f'{row.name} ({row.paper_name})' if row.paper_name and row.paper_name != row.name else row.name
    return _marked(name, row.foreign_cores > BUSY_CORES)


def _marked(name: str, busy: bool) -> str:
    return f'{name} {_BUSY_MARK}' if busy else name


def _value(series: Series, value: float) -> str:
    if series.amount:
        return f'{value:,.1f} tok/s'
    # One unit for all values of a series.
    return f'{value:.2f} s' if series.median >= 1 else f'{1e3 * value:.1f} ms'


def _range(series: Series, low: float, high: float) -> str:
    return f'{_value(series, low).split()[0]} to {_value(series, high)}'


def _mib(n_bytes: int) -> str:
    return f'{n_bytes / 2**20:,.0f} MiB'


def _flops(n: float) -> str:
    for unit, size in (('TFLOP', 1e12), ('GFLOP', 1e9), ('MFLOP', 1e6)):
        if n >= size:
            return f'{n / size:.4g} {unit}'
    return f'{n / 1e3:.4g} kFLOP'
