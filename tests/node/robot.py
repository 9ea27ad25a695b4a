"""A robot for tests: the real node and a client, each on an executor thread of its own, talking over real DDS."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from mobilevlm_msgs.action import AskImage as AskImageAction
from mobilevlm_msgs.msg import Answer, Event, ModelInfo, Question
from mobilevlm_msgs.srv import AskImage
from numpy.typing import NDArray
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import DurabilityPolicy, QoSProfile, qos_profile_sensor_data
from sensor_msgs.msg import CompressedImage, Image

from mobilevlm_ros.node.main import spin
from mobilevlm_ros.node.vqa_node import VqaNode

WAIT_S = 20.0
LONG_TOKENS = 1900
"""An answer of the tiny model with this many tokens takes about a second."""


def wait_until(condition: Callable[[], Any], timeout_s: float = WAIT_S) -> Any:
    """Poll until ``condition`` is true; returns its value, fails after ``timeout_s``."""
    end_s = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < end_s, f'{condition} did not become true within {timeout_s} s'
        time.sleep(0.005)


class Robot:
    """See the module. ``start`` configures and activates."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        # A namespace of its own: whatever else runs on this machine and domain, nobody else answers.
        ns = self.ns = f'/robot_{uuid.uuid4().hex[:8]}'
        self._contexts = [Context(), Context()]
        for context in self._contexts:
            rclpy.init(context=context)
        node_context, client_context = self._contexts
        overrides = [Parameter(name, value=value) for name, value in parameters.items()]
        self.node = VqaNode(namespace=ns, context=node_context, parameter_overrides=overrides)
        self._node_executor = SingleThreadedExecutor(context=node_context)
        self._node_executor.add_node(self.node)
        self.client: Node = rclpy.create_node('client', context=client_context)
        self._client_executor = SingleThreadedExecutor(context=client_context)
        self._client_executor.add_node(self.client)
        self._service = self.client.create_client(AskImage, f'{ns}/vqa_node/ask_image')
        self._action: Any = ActionClient(self.client, AskImageAction, f'{ns}/vqa_node/ask_image')
        self._change_state = self.client.create_client(ChangeState, f'{ns}/vqa_node/change_state')
        self._get_state = self.client.create_client(GetState, f'{ns}/vqa_node/get_state')
        self.questions = self.client.create_publisher(Question, f'{ns}/vqa_node/question', QoSProfile(depth=16))
        self.answers: list[Any] = []
        self.events: list[Any] = []
        self.models: list[Any] = []
        self.diagnostics: list[Any] = []
        deep, latched = QoSProfile(depth=64), QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        for message_type, topic, qos, kept in (
            (Answer, f'{ns}/vqa_node/answer', deep, self.answers),
            (Event, f'{ns}/vqa_node/event', deep, self.events),
            (ModelInfo, f'{ns}/vqa_node/model_info', latched, self.models),
            (DiagnosticArray, '/diagnostics', deep, self.diagnostics),
        ):
            self.client.create_subscription(message_type, topic, kept.append, qos)
        self._publishers: dict[str, Any] = {}
        self.threads = [
            threading.Thread(target=spin, args=(self.node, self._node_executor), daemon=True),
            threading.Thread(target=self._spin_client, daemon=True),
        ]
        for thread in self.threads:
            thread.start()

    def _spin_client(self) -> None:
        with contextlib.suppress(ExternalShutdownException):
            self._client_executor.spin()

    def close(self) -> None:
        """Shut down; fails if a thread does not end."""
        for context in self._contexts:
            context.try_shutdown()
        for thread in self.threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in self.threads)
        self.drop_action_client()
        for executor, node in ((self._node_executor, self.node), (self._client_executor, self.client)):
            executor.shutdown(timeout_sec=WAIT_S)
            node.destroy_node()
        for context in self._contexts:
            context.destroy()
        # A DDS participant goes with its context's last reference. Discovery on one machine reaches only the first
        # 32 of them: without this, the robots of a long run stop finding their own clients.
        gc.collect()

    def drop_action_client(self) -> None:
        """Let the client of the action go away."""
        if self._action is not None:
            self._action.destroy()
            self._action = None

    # -- lifecycle ----------------------------------------------------------------------------------------------------

    def change_state(self, label: str) -> bool:
        """Ask for a transition over DDS; returns whether it succeeded."""
        request = ChangeState.Request()
        request.transition.label = label
        self._matched(self._change_state, 'change_state')
        return bool(self.result(self._change_state.call_async(request)).success)

    def _matched(self, client: Any, name: str) -> None:
        """Wait until both sides know each other: a response is lost if the server has not yet found the client."""
        assert client.wait_for_service(WAIT_S)
        wait_until(lambda: self.node.count_clients(f'{self.ns}/vqa_node/{name}') > 0)

    def state(self) -> str:
        """The state's label, asked over DDS."""
        self._matched(self._get_state, 'get_state')
        return str(self.result(self._get_state.call_async(GetState.Request())).current_state.label)

    def start(self) -> Robot:
        """Configure, activate, wait for the doors."""
        assert self.change_state('configure')
        assert self.change_state('activate')
        self._matched(self._service, 'ask_image')
        assert self._action.wait_for_server(WAIT_S)
        for part in ('send_goal', 'cancel_goal', 'get_result'):
            wait_until(lambda part=part: self.node.count_clients(f'{self.ns}/vqa_node/ask_image/_action/{part}') > 0)
        wait_until(lambda: self.questions.get_subscription_count() > 0)
        return self

    # -- cameras ------------------------------------------------------------------------------------------------------

    def publish(self, message: Any, topic: str = 'image', qos: QoSProfile = qos_profile_sensor_data) -> None:
        """Publish once; a relative topic is one of the robot's namespace."""
        publisher = self._publishers.get(topic)
        if publisher is None:
            full_name = topic if topic.startswith('/') else f'{self.ns}/{topic}'
            publisher = self._publishers[topic] = self.client.create_publisher(type(message), full_name, qos)
        publisher.publish(message)

    def image(self, rgb_hwc: NDArray[np.uint8], *, age_s: float = 0.0) -> Image:
        """An ``rgb8`` message with a stamp of ``age_s`` ago."""
        height, width = rgb_hwc.shape[:2]
        message = Image(height=height, width=width, encoding='rgb8', step=3 * width, data=rgb_hwc.tobytes())
        self.stamp(message, age_s)
        return message

    def stamp(self, message: Image | CompressedImage, age_s: float = 0.0) -> None:
        """Stamp a message, ``age_s`` ago."""
        nanoseconds = self.client.get_clock().now().nanoseconds - int(age_s * 1e9)
        message.header.stamp.sec, message.header.stamp.nanosec = divmod(nanoseconds, 1_000_000_000)
        message.header.frame_id = 'camera_optical_frame'

    def show(self, message: Any, topic: str = 'image', camera: str = 'camera') -> Any:
        """Publish until the node holds this very message as the camera's newest frame."""
        before = self.n_frames(camera)

        def arrived() -> bool:
            self.publish(message, topic)
            time.sleep(0.02)
            return self.n_frames(camera) > before

        wait_until(arrived)
        return message

    def n_frames(self, camera: str = 'camera') -> int:
        """How many frames of a camera the node has taken."""
        store = self.node._frames
        return next(status.n_frames for status in store.status() if status.camera == camera) if store else 0

    # -- questions ----------------------------------------------------------------------------------------------------

    def result(self, future: Any, timeout_s: float = WAIT_S) -> Any:
        """The result of a future that the client's executor completes."""
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        assert done.wait(timeout_s), f'no result within {timeout_s} s'
        return future.result()

    def ask_async(self, question: str = 'what is the table', **fields: Any) -> Any:
        """Call the service; returns the future of the response."""
        return self._service.call_async(AskImage.Request(question=question, **fields))

    def ask(self, question: str = 'what is the table', **fields: Any) -> Any:
        """Call the service; returns ``detail`` of the response."""
        fields.setdefault('max_tokens', 8)
        return self.result(self.ask_async(question, **fields)).detail

    def goal(
        self, question: str = 'what is the table', on_feedback: Callable[[Any], None] = lambda _: None, **fields: Any
    ) -> Any:
        """Send a goal to the action; returns its accepted handle."""
        goal = AskImageAction.Goal(question=question, **fields)
        handle = self.result(self._action.send_goal_async(goal, lambda message: on_feedback(message.feedback)))
        assert handle.accepted
        return handle
