"""The TensorRT plan of a bundle, built on the device where it will run, and held against PyTorch there.

A plan fits one version of TensorRT and one kind of GPU, so a bundle for TensorRT is built elsewhere with the graph
alone. This adds the plan and changes the bundle's description in one step; interrupted, the bundle stays as it was.
Needs TensorRT and a GPU, but no PyTorch: what PyTorch computes is recorded in the bundle.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

from mobilevlm_ros.build.bundle_build import REFERENCE
from mobilevlm_ros.build.parity import PLAN_TOKENS, REPORT, VISUAL_TOKENS, ParityReport, check_vision, read_report
from mobilevlm_ros.build.reference import Reference, read_reference
from mobilevlm_ros.build.stages import Reporter, check_room
from mobilevlm_ros.build.tensorrt_plan import build_plan
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.paths import cache_dir
from mobilevlm_ros.runtime.bundle import DESCRIPTION, Bundle, file_entry, open_bundle, sha256_of, write_description
from mobilevlm_ros.runtime.vision.opening import open_engine
from mobilevlm_ros.runtime.vision.plan_key import PlanKey

__all__ = ['plan_bundle']

_MADE = ('vision-*.plan', 'parity-*.json')
"""Files of earlier plans, which go when there is a new one."""


def plan_bundle(path: Path, reporter: Reporter) -> Bundle:
    """Build the plan of the bundle in ``path``, or build it again.

    :raise BundleError: if the bundle is damaged.
    :raise BuildError: if it is for another backend, TensorRT refuses the graph, or a file cannot be written.
    :raise ParityError: if the plan computes something else than the model; the bundle stays as it was.
    :raise DependencyError: if TensorRT is missing.
    """
    bundle = open_bundle(path)
    vision = bundle.vision
    if vision['backend'] != 'tensorrt':
        raise BuildError(
            f'{path} runs its vision engine with {vision["backend"]}; only bundles of a profile with the backend '
            'tensorrt have a plan, for example: mobilevlm build MODEL --profile jetson-orin'
        )
    # Looked at before the minutes of building.
    reference, earlier = read_reference(path / REFERENCE), read_report(bundle)
    graph, made = path / vision.get('onnx', vision['file']), path / '.vision.plan.partial'
    check_room(path, 2 * graph.stat().st_size, 'a TensorRT plan')
    timing_cache = cache_dir() / 'tensorrt.timing-cache'
    try:
        timing_cache.parent.mkdir(parents=True, exist_ok=True)
        reporter.step('TensorRT plan for this GPU (minutes)')
        key = build_plan(graph, made, timing_cache=timing_cache, on_progress=reporter.progress)
        reporter.step('comparing the plan with PyTorch')
        report = _check(bundle, reference, earlier, made, key)
        return _put_in(bundle, made, key, graph, report)
    except OSError as error:
        raise BuildError(
            f'{error.filename or path}: {error.strerror or error}. The bundle is as it was: free some space, or make '
            'it writable, and run the command again.'
        ) from error
    finally:
        for left in path.glob('.*.partial*'):
            left.unlink(missing_ok=True)


def _check(bundle: Bundle, reference: Reference, earlier: ParityReport, plan: Path, key: PlanKey) -> ParityReport:
    """The bundle's report with the plan in it; its limit is that of the graph."""
    limit = next((stage.limit for stage in earlier.stages if stage.stage == VISUAL_TOKENS), None)
    if limit is None:
        raise BuildError(f'the parity report of {bundle.path} says nothing of {VISUAL_TOKENS}: build the bundle again')
    engine = open_engine('tensorrt', plan, bundle.vision['precision'], plan_key=key.to_dict())
    try:
        stage = check_vision(reference, bundle.preprocess_spec(), engine, limit)
    finally:
        engine.close()
    others = (one for one in earlier.stages if one.stage != PLAN_TOKENS)
    report = replace(earlier, stages=(*others, replace(stage, stage=PLAN_TOKENS)))
    report.raise_if_failed(bundle.vision['precision'], bundle.language['quantization'])
    return report


def _put_in(bundle: Bundle, made: Path, key: PlanKey, graph: Path, report: ParityReport) -> Bundle:
    """Put plan and report beside what is there, then change the description; old ones go last.

    They are named by their content, so that until the description changes every file is the one that it lists.
    """
    path, description = bundle.path, bundle.description
    text = report.as_json()
    plan, parity = f'vision-{sha256_of(made)[:8]}.plan', f'parity-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json'
    made.replace(path / plan)
    written = path / '.parity.partial'
    written.write_text(text)
    written.replace(path / parity)
    before = {description.get('parity', REPORT), bundle.vision['file']} - {graph.name}
    kept = {name: entry for name, entry in description['files'].items() if name not in before}
    changed = {
        **description,
        'parity': parity,
        'vision': {**bundle.vision, 'file': plan, 'onnx': graph.name, 'plan_key': key.to_dict()},
        'files': kept | {name: file_entry(path / name) for name in (plan, parity)},
    }
    write_description(path, changed)
    stale = before | {found.name for pattern in _MADE for found in path.glob(pattern)}
    for name in stale - {DESCRIPTION, *changed['files']}:
        (path / name).unlink(missing_ok=True)
    return open_bundle(path, verify_hashes=False)
