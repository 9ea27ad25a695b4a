"""The TensorRT plan of a bundle, built on the device where it will run, and held against PyTorch there.

A plan fits one version of TensorRT and one kind of GPU, so a bundle for TensorRT is built elsewhere with the graph
alone. This adds the plan and changes the bundle's description in one step; interrupted, the bundle stays as it was.
Needs TensorRT and a GPU, but no PyTorch: what PyTorch computes is recorded in the bundle.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from mobilevlm_ros.build.bundle_build import REFERENCE
from mobilevlm_ros.build.parity import ParityReport, check_vision, read_report
from mobilevlm_ros.build.profile import read_profile
from mobilevlm_ros.build.reference import read_reference
from mobilevlm_ros.build.stages import Reporter, check_room
from mobilevlm_ros.build.tensorrt_plan import build_plan
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.paths import cache_dir
from mobilevlm_ros.runtime.bundle import Bundle, file_entry, open_bundle, sha256_of, write_description
from mobilevlm_ros.runtime.vision.opening import open_engine

__all__ = ['plan_bundle']


def plan_bundle(path: Path, reporter: Reporter) -> Bundle:
    """Build the plan of the bundle in ``path``, or build it again.

    :raise BundleError: if the bundle is damaged.
    :raise BuildError: if it is for another backend, or TensorRT refuses the graph.
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
    graph = path / vision.get('onnx', vision['file'])
    check_room(path, 2 * graph.stat().st_size, 'a TensorRT plan')
    made = path / '.vision.plan.partial'
    timing_cache = cache_dir() / 'tensorrt.timing-cache'
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    try:
        reporter.step('TensorRT plan for this GPU (minutes)')
        key = build_plan(graph, made, timing_cache=timing_cache, on_progress=reporter.progress)
        reporter.step('comparing the plan with PyTorch')
        report = _check(bundle, made, key.to_dict(), graph)
        # Named by their content, so that until the description changes every file is the one that it lists.
        plan = f'vision-{sha256_of(made)[:8]}.plan'
        text = report.as_json()
        parity = f'parity-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json'
        made.replace(path / plan)
    finally:
        made.unlink(missing_ok=True)
    (path / parity).write_text(text)
    description = bundle.description
    before = {description['parity'], vision['file']} - {graph.name}
    description['parity'] = parity
    description['vision'] = {**vision, 'file': plan, 'onnx': graph.name, 'plan_key': key.to_dict()}
    kept = {name: entry for name, entry in description['files'].items() if name not in before}
    description['files'] = kept | {name: file_entry(path / name) for name in (plan, parity)}
    write_description(path, description)
    for name in before - {plan, parity}:
        (path / name).unlink(missing_ok=True)
    return open_bundle(path, verify_hashes=False)


def _check(bundle: Bundle, plan: Path, key: dict[str, Any], graph: Path) -> ParityReport:
    profile = read_profile(bundle.profile)
    reference = read_reference(bundle.path / REFERENCE)
    engine = open_engine('tensorrt', plan, bundle.vision['precision'], plan_key=key)
    try:
        stage = check_vision(reference, bundle.preprocess_spec(), engine, profile.parity.vision_cosine)
    finally:
        engine.close()
    stage = replace(stage, stage='visual tokens of the plan')
    earlier = read_report(bundle)
    stages = (*(one for one in earlier.stages if one.stage != stage.stage), stage)
    report = replace(earlier, stages=stages)
    report.raise_if_failed(profile)
    return report
