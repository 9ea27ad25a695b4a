"""Asks through every door of the node, as a robot's program would; calls block with a deadline.

The executor spins in its own thread, so a call may wait here without stopping anything.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

from mobilevlm_msgs.action import AskImage as AskImageAction
from mobilevlm_msgs.msg import Answer as AnswerMsg
from mobilevlm_msgs.msg import ModelInfo as ModelInfoMsg
from mobilevlm_msgs.msg import Question as QuestionMsg
from mobilevlm_msgs.srv import AskImage as AskImageService
from rclpy.action import ActionClient
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile

from mobilevlm_ros.errors import MobileVLMError

__all__ = ['AskClient', 'ClientTimeoutError']


class ClientTimeoutError(MobileVLMError):
    """The node did not answer in time."""


class AskClient:
    """See the module; names are those that the launch file gives."""

    def __init__(self, node: Node, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._service = node.create_client(AskImageService, '/ask_image')
        self._action = ActionClient(node, AskImageAction, '/ask_image')
        self._question = node.create_publisher(QuestionMsg, '/embodied_qa/question', QoSProfile(depth=16))
        self._answers: dict[str, AnswerMsg] = {}
        self._arrived = threading.Condition()
        node.create_subscription(AnswerMsg, '/embodied_qa/answer', self._on_answer, QoSProfile(depth=16))
        self.model: ModelInfoMsg | None = None
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(ModelInfoMsg, '/embodied_qa/model_info', self._on_model, latched)

    def _on_answer(self, message: Any) -> None:
        with self._arrived:
            self._answers[message.question_id] = message
            self._arrived.notify_all()

    def _on_model(self, message: Any) -> None:
        self.model = message

    def is_ready(self) -> bool:
        """Whether a model is loaded and all doors are open."""
        return (
            self.model is not None
            and self._service.service_is_ready()
            and self._action.server_is_ready()
            and self._question.get_subscription_count() > 0
        )

    def ask(self, **fields: Any) -> AnswerMsg:
        """Through the service; fields of ``AskImage``."""
        future = self._service.call_async(AskImageService.Request(**fields))
        return self._result(future, 'the service /ask_image').detail

    def ask_streamed(self, on_text: Callable[[str, str], None], **fields: Any) -> AnswerMsg:
        """Through the action; ``on_text`` is told stage and all text so far."""

        def on_feedback(message: Any) -> None:
            on_text(message.feedback.stage, message.feedback.text)

        goal = AskImageAction.Goal(**fields)
        handle = self._result(self._action.send_goal_async(goal, on_feedback), 'the action /ask_image')
        if not handle.accepted:
            raise ClientTimeoutError('the action /ask_image rejected the goal')
        return self._result(handle.get_result_async(), 'the action /ask_image').result.detail

    def ask_on_topic(self, **fields: Any) -> AnswerMsg:
        """Through the topics /embodied_qa/question and /embodied_qa/answer."""
        question_id = uuid.uuid4().hex[:12]
        self._question.publish(QuestionMsg(id=question_id, **fields))
        with self._arrived:
            if not self._arrived.wait_for(lambda: question_id in self._answers, self._timeout_s):
                raise ClientTimeoutError(f'no answer on /embodied_qa/answer within {self._timeout_s:.0f} s')
            return self._answers.pop(question_id)

    def _result(self, future: Any, what: str) -> Any:
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        if not done.wait(self._timeout_s):
            raise ClientTimeoutError(f'{what} gave no answer within {self._timeout_s:.0f} s')
        return future.result()
