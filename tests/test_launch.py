"""The launch file and the parameter file that it loads.

`launch` and `launch_ros` are on no package index: what needs them is skipped where ROS 2 comes from wheels.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_FILE = ROOT / 'launch' / 'vqa.launch.py'
CONFIG_FILE = ROOT / 'config' / 'vqa.yaml'
NO_LAUNCH = 'launch and launch_ros are not installed: they come with a ROS 2 installation, not from PyPI'
ARGUMENTS = {
    'autostart', 'bundle', 'image_topic', 'log_level', 'namespace', 'node_name', 'params_file', 'use_sim_time',
}  # fmt: skip


def calls(name: str) -> list[ast.Call]:
    """Return the calls of a function in the launch file."""
    tree = ast.parse(LAUNCH_FILE.read_text(encoding='utf-8'))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


# --- wherever Python runs


def test_every_argument_is_declared_with_default_and_description() -> None:
    declared = calls('DeclareLaunchArgument')
    assert {ast.literal_eval(call.args[0]) for call in declared} == ARGUMENTS
    for call in declared:
        assert {'default_value', 'description'} <= {keyword.arg for keyword in call.keywords}


def test_every_argument_is_declared_at_the_top_and_used() -> None:
    source = ast.parse(LAUNCH_FILE.read_text(encoding='utf-8'))
    top = next(node for node in source.body if getattr(node, 'name', '') == 'generate_launch_description')
    lines = range(top.lineno, (top.end_lineno or 0) + 1)
    assert all(call.lineno in lines for call in calls('DeclareLaunchArgument'))
    strings = [node.value for node in ast.walk(source) if isinstance(node, ast.Constant)]
    for name in ARGUMENTS:
        assert strings.count(name) >= 2, f'{name} is declared and never used'


def parameters() -> dict[str, Any]:
    """Return the node's parameters in the shipped file, flat."""
    document = yaml.safe_load(CONFIG_FILE.read_text(encoding='utf-8'))
    assert list(document) == ['/**'], 'must hold for any node name and namespace'

    def flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            found.update(flat(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value})
        return found

    return flat(document['/**']['ros__parameters'])


def test_the_shipped_parameters_are_all_of_the_node_with_their_defaults() -> None:
    table = pytest.importorskip('mobilevlm_ros.node.parameters', reason='needs rclpy').PARAMETERS
    expected = {parameter.name: parameter.default for parameter in table}
    expected |= {
        'cameras.camera.topic': 'image',
        'cameras.camera.type': 'auto',
        'cameras.camera.encode_ahead': True,
    }
    found = parameters()
    assert found == expected
    for name, value in found.items():
        assert type(value) is type(expected[name]), f'{name}: ROS tells {value!r} from {expected[name]!r}'


# --- where ROS 2 is installed


@pytest.fixture(scope='module')
def launch_file() -> ModuleType:
    """Return the launch file as a module."""
    # Not `launch` itself: the folder of that name beside the tests would do as a namespace package.
    for module in ('launch.actions', 'launch_ros.actions'):
        pytest.importorskip(module, reason=NO_LAUNCH)
    spec = importlib.util.spec_from_file_location('vqa_launch', LAUNCH_FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_show_args_lists_all(launch_file: ModuleType) -> None:
    arguments = {
        argument.name: argument for argument in launch_file.generate_launch_description().get_launch_arguments()
    }
    assert set(arguments) == ARGUMENTS
    for name, argument in arguments.items():
        assert argument.default_value is not None
        assert argument.description not in ('', 'no description given'), name
    assert arguments['log_level'].choices == ['debug', 'info', 'warn', 'error', 'fatal']
    for name in ('autostart', 'use_sim_time'):
        assert set(arguments[name].choices) >= {'true', 'false'}


def context_for(launch_file: ModuleType, **given: str) -> Any:
    """Return a launch context with some arguments given and the others at their defaults."""
    from launch import LaunchContext

    context = LaunchContext()
    context.launch_configurations.update({'params_file': str(CONFIG_FILE), **given})
    for argument in launch_file.generate_launch_description().get_launch_arguments():
        argument.execute(context)
    return context


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        ({}, {'use_sim_time': False}),
        ({'bundle': '/models/x'}, {'use_sim_time': False, 'bundle': '/models/x'}),
        ({'autostart': 'false'}, {'use_sim_time': False, 'autostart': False}),
        ({'autostart': 'true', 'use_sim_time': 'true'}, {'use_sim_time': True, 'autostart': True}),
    ],
)
def test_only_given_arguments_override_the_parameter_file(
    launch_file: ModuleType, given: dict[str, str], expected: dict[str, Any]
) -> None:
    assert launch_file.overrides(context_for(launch_file, **given)) == expected


def test_public_names_are_mapped_and_follow_the_namespace(launch_file: ModuleType) -> None:
    remappings = dict(launch_file.REMAPPINGS)
    assert remappings['~/ask_image'] == 'ask_image'
    assert remappings['~/ask_image/_action/feedback'] == 'ask_image/_action/feedback'
    assert remappings['~/question'] == 'embodied_qa/question'
    assert remappings['~/answer'] == 'embodied_qa/answer'
    assert remappings['~/event'] == 'embodied_qa/event'
    assert not [target for target in remappings.values() if target.startswith('/')]


SCRIPT = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
service = LaunchService()
arguments = [('bundle', 'fake'), ('namespace', 'robot1'), ('params_file', sys.argv[2])]
service.include_launch_description(LaunchDescription([
    IncludeLaunchDescription(sys.argv[1], launch_arguments=arguments)]))
sys.exit(service.run())
"""


@pytest.mark.slow
def test_launched_it_answers_under_its_public_name(launch_file: ModuleType) -> None:
    rclpy = pytest.importorskip('rclpy', reason='needs ROS 2')
    from ament_index_python import PackageNotFoundError, get_package_prefix
    from mobilevlm_msgs.msg import Answer
    from mobilevlm_msgs.srv import AskImage

    try:
        get_package_prefix('mobilevlm_ros')
    except PackageNotFoundError:
        pytest.skip('mobilevlm_ros is not in AMENT_PREFIX_PATH: make test sets it')
    domain = random.randint(1, 101)
    env = {**os.environ, 'ROS_DOMAIN_ID': str(domain), 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
    process = subprocess.Popen([sys.executable, '-c', SCRIPT, str(LAUNCH_FILE), str(CONFIG_FILE)], env=env)
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=domain)
    node = rclpy.create_node('asker', context=context)
    executor = rclpy.executors.SingleThreadedExecutor(context=context)
    executor.add_node(node)
    try:
        client = node.create_client(AskImage, '/robot1/ask_image')
        assert client.wait_for_service(60.0), 'the launched node offers no /robot1/ask_image'
        future = client.call_async(AskImage.Request(question='Is the door open?', format=Answer.YES_NO))
        executor.spin_until_future_complete(future, 30.0)
        assert future.result().detail.result_code in (Answer.NO_FRAME, Answer.NOT_ACTIVE)
    finally:
        executor.shutdown()
        node.destroy_node()
        context.try_shutdown()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)
    assert process.returncode == 0
