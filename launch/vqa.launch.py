"""Start vqa_node, with its private names mapped to the public ones.

ros2 launch mobilevlm_ros vqa.launch.py image_topic:=/camera/image_raw
"""

from __future__ import annotations

from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import LifecycleNode
from launch_ros.substitutions import FindPackageShare

from launch import LaunchContext, LaunchDescription

# Relative, so that they follow the namespace: /ask_image, or /robot1/ask_image with namespace:=robot1.
ASK = 'ask_image'
TOPICS = 'embodied_qa'
ACTION_PARTS = ('send_goal', 'cancel_goal', 'get_result', 'feedback', 'status')
REMAPPINGS = [
    ('~/ask_image', ASK),
    *((f'~/ask_image/_action/{part}', f'{ASK}/_action/{part}') for part in ACTION_PARTS),
    *((f'~/{name}', f'{TOPICS}/{name}') for name in ('question', 'answer', 'event', 'model_info')),
]
BOOLEANS = ['true', 'false']


def generate_launch_description() -> LaunchDescription:
    """Declare every argument, then start the node with them."""
    default_parameters = PathJoinSubstitution([FindPackageShare('mobilevlm_ros'), 'config', 'vqa.yaml'])
    return LaunchDescription(
        [
            DeclareLaunchArgument(
                'image_topic',
                default_value='/camera/image_raw',
                description='Camera to watch, raw or compressed: the topic that the node knows as "image". '
                'Several cameras are named in params_file.',
            ),
            DeclareLaunchArgument(
                'params_file',
                default_value=default_parameters,
                description='YAML file with the parameters.',
            ),
            DeclareLaunchArgument(
                'bundle',
                default_value='',
                description='Directory of the built model; empty: as params_file says, and if that is empty, '
                'the embedded default.',
            ),
            DeclareLaunchArgument(
                'autostart',
                default_value='',
                choices=['', *BOOLEANS],
                description='Configure and activate at start (true), or leave that to a lifecycle manager (false); '
                'empty: as params_file says.',
            ),
            DeclareLaunchArgument(
                'namespace', default_value='', description='Namespace of the node and of its public names.'
            ),
            DeclareLaunchArgument('node_name', default_value='vqa_node', description='Name of the node.'),
            DeclareLaunchArgument(
                'use_sim_time',
                default_value='false',
                choices=BOOLEANS,
                description='Take the time from /clock, for simulation and bags.',
            ),
            DeclareLaunchArgument(
                'log_level',
                default_value='info',
                choices=['debug', 'info', 'warn', 'error', 'fatal'],
                description='Lowest level that is logged.',
            ),
            OpaqueFunction(function=start_node),
        ]
    )


def overrides(context: LaunchContext) -> dict[str, str | bool]:
    """Return the parameters to set over params_file; an empty argument sets none."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ('bundle', 'autostart', 'use_sim_time')}
    parameters: dict[str, str | bool] = {'use_sim_time': given['use_sim_time'] == 'true'}
    if given['bundle']:
        parameters['bundle'] = given['bundle']
    if given['autostart']:
        parameters['autostart'] = given['autostart'] == 'true'
    return parameters


def start_node(context: LaunchContext) -> list[LifecycleNode]:
    """Start the node with what was given."""
    return [
        LifecycleNode(
            package='mobilevlm_ros',
            executable='vqa_node',
            name=LaunchConfiguration('node_name'),
            namespace=LaunchConfiguration('namespace'),
            parameters=[LaunchConfiguration('params_file'), overrides(context)],
            remappings=[('image', LaunchConfiguration('image_topic')), *REMAPPINGS],
            ros_arguments=['--log-level', LaunchConfiguration('log_level')],
            output='both',
            emulate_tty=True,
        )
    ]
