"""The doctor's look at the ROS graph: which topics carry images, with which QoS, and who answers questions."""

from __future__ import annotations

import time

import rclpy
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, ReliabilityPolicy

from mobilevlm_ros.types import Check

__all__ = ['examine_graph']

_IMAGE_TYPES = {'sensor_msgs/msg/Image': 'raw', 'sensor_msgs/msg/CompressedImage': 'compressed'}
_SERVICE_TYPE = 'mobilevlm_msgs/srv/AskImage'


def examine_graph(listen_s: float) -> list[Check]:
    """Listen for ``listen_s`` seconds, then report; needs no daemon."""
    context = Context()
    rclpy.init(context=context)
    try:
        node = rclpy.create_node('mobilevlm_doctor', context=context)
        executor = SingleThreadedExecutor(context=context)
        executor.add_node(node)
        end_s = time.monotonic() + listen_s
        while (left_s := end_s - time.monotonic()) > 0:
            executor.spin_once(timeout_sec=left_s)
        checks = _cameras(node) + _services(node)
        executor.shutdown()
        node.destroy_node()
        return checks
    finally:
        context.try_shutdown()


def _cameras(node: Node) -> list[Check]:
    checks = []
    for topic, types in sorted(node.get_topic_names_and_types()):
        for image_type in sorted(set(types) & set(_IMAGE_TYPES)):
            for publisher in node.get_publishers_info_by_topic(topic):
                if publisher.topic_type != image_type:
                    continue
                qos = publisher.qos_profile
                reliability, durability = ReliabilityPolicy(qos.reliability).name, DurabilityPolicy(qos.durability).name
                kind = _IMAGE_TYPES[image_type]
                found = f'{kind} images from {publisher.node_name}, {reliability}, {durability}'
                checks.append(Check('camera', topic, 'ok', found))
    if not checks:
        advice = 'start a camera, then: ros2 launch mobilevlm_ros vqa.launch.py image_topic:=/your/image'
        checks.append(Check('camera', 'no images', 'note', 'no topic carries images', advice))
    return checks


def _services(node: Node) -> list[Check]:
    names = [name for name, types in node.get_service_names_and_types() if _SERVICE_TYPE in types]
    if names:
        return [Check('node', name, 'ok', 'answers questions about images') for name in sorted(names)]
    return [
        Check(
            'node',
            'not running',
            'note',
            'nobody offers a service of type AskImage',
            'ros2 launch mobilevlm_ros vqa.launch.py',
        )
    ]
