"""The three ways to ask: the service, the action and the question topic; all lead to the same queue.

Handlers run on the executor's thread and never wait there: a coroutine is suspended until the worker's answer resumes
it. They never raise, because an exception that leaves a callback ends the executor.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from typing import Any

from mobilevlm_msgs.action import AskImage as AskImageAction
from mobilevlm_msgs.msg import Answer as AnswerMsg
from mobilevlm_msgs.msg import Question as QuestionMsg
from mobilevlm_msgs.srv import AskImage as AskImageService
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.task import Future

from mobilevlm_ros.errors import MobileVLMError, StaleFrameError
from mobilevlm_ros.node.conversions import (
    answer_msg,
    carries_image,
    fill_result,
    printable,
    question_from,
    request_frame,
    unchecked_question,
)
from mobilevlm_ros.node.parameters import NodeSettings
from mobilevlm_ros.runtime.assistant import Progress
from mobilevlm_ros.runtime.cancel import CancelToken
from mobilevlm_ros.runtime.formats import prepare
from mobilevlm_ros.runtime.frames import FrameStore
from mobilevlm_ros.runtime.worker import Job, refusal
from mobilevlm_ros.types import Answer, Frame, Question, ResultCode

__all__ = ['Doors']

_logger = logging.getLogger(__name__)
_TOPIC_DEPTH = 16


class Doors:
    """See the module.

    :param submit: puts a job on the queue; raises ``MobileVLMError`` to refuse it.
    :param settings: the present settings.
    :param cameras: the present cameras; raises ``NotActiveError`` while there are none.
    :param take_frame: camera and largest age -> the frame for a question; runs on the worker's thread.
    :param on_answer: told every answer, refusals included.
    """

    def __init__(
        self,
        node: Node,
        *,
        submit: Callable[[Job], None],
        settings: Callable[[], NodeSettings],
        cameras: Callable[[], FrameStore],
        take_frame: Callable[[str, float], Frame],
        on_answer: Callable[[Answer], None],
    ) -> None:
        self._node = node
        self._submit = submit
        self._settings = settings
        self._cameras = cameras
        self._frame_of_camera = take_frame
        self._on_answer = on_answer
        self._cancels: dict[bytes, CancelToken] = {}
        # Reentrant: while one question waits for its answer, the next must still be taken, and a cancel served.
        group = ReentrantCallbackGroup()
        self._publisher = node.create_publisher(AnswerMsg, '~/answer', QoSProfile(depth=_TOPIC_DEPTH))
        self._service = node.create_service(AskImageService, '~/ask_image', self._on_request, callback_group=group)
        self._action = ActionServer(
            node,
            AskImageAction,
            '~/ask_image',
            execute_callback=self._on_goal,
            goal_callback=lambda _: GoalResponse.ACCEPT,
            cancel_callback=self._on_cancel,
            callback_group=group,
        )
        self._subscription = node.create_subscription(
            QuestionMsg, '~/question', self._on_question, QoSProfile(depth=_TOPIC_DEPTH), callback_group=group
        )

    def close(self) -> None:
        """Close all three; whoever still waits gets no answer, so stop the worker and spin once before."""
        self._node.destroy_subscription(self._subscription)
        self._action.destroy()
        self._node.destroy_service(self._service)
        self._node.destroy_publisher(self._publisher)

    # -- the doors ----------------------------------------------------------------------------------------------------

    async def _on_request(self, request: Any, response: Any) -> Any:
        return fill_result(response, await self._ask(request, _new_id(), CancelToken()))

    async def _on_goal(self, goal_handle: Any) -> Any:
        key = bytes(goal_handle.goal_id.uuid)
        cancel = self._cancels.setdefault(key, CancelToken())

        def on_progress(progress: Progress) -> None:
            feedback = AskImageAction.Feedback(stage=progress.stage, text=printable(progress.text))
            try:
                goal_handle.publish_feedback(feedback)
            except RuntimeError as error:  # rclpy's RCLError: the context went down meanwhile
                cancel.set(ResultCode.NOT_ACTIVE, f'the answer cannot be streamed any more: {error}')

        goal_handle.publish_feedback(AskImageAction.Feedback(stage='queued'))
        try:
            answer = await self._ask(goal_handle.request, key.hex()[:12], cancel, on_progress)
        finally:
            self._cancels.pop(key, None)
        if goal_handle.is_cancel_requested:
            goal_handle.canceled()
        elif answer.success:
            goal_handle.succeed()
        else:
            goal_handle.abort()
        return fill_result(AskImageAction.Result(), answer)

    def _on_cancel(self, goal_handle: Any) -> Any:
        # A goal can be canceled before its handler ran for the first time: the token then waits for it.
        token = self._cancels.setdefault(bytes(goal_handle.goal_id.uuid), CancelToken())
        token.set(ResultCode.CANCELED, 'the client canceled the question')
        return CancelResponse.ACCEPT

    def _on_question(self, message: Any) -> None:
        # The answer goes out on the topic like every other (see _finish); nobody waits for it here.
        self._start(message, message.id or _new_id(), CancelToken(), lambda _: None, lambda _: None)

    # -- the way to the queue -----------------------------------------------------------------------------------------

    async def _ask(
        self,
        request: Any,
        question_id: str,
        cancel: CancelToken,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Answer:
        future: Future = Future(executor=self._node.executor)
        # Older executors look at suspended coroutines only when something wakes them; a done callback does.
        future.add_done_callback(lambda _: None)
        self._start(request, question_id, cancel, on_progress, future.set_result)
        answer: Answer = await future
        return answer

    def _start(
        self,
        request: Any,
        question_id: str,
        cancel: CancelToken,
        on_progress: Callable[[Progress], None],
        on_done: Callable[[Answer], None],
    ) -> None:
        """Turn a request into a job; ``on_done`` is told the answer, whatever happens."""
        question = unchecked_question(request, question_id)

        def finish(answer: Answer) -> None:
            self._finish(answer)
            on_done(answer)

        try:
            settings = self._settings()
            question = question_from(request, question_id, settings.deadline_s)
            # What cannot be asked is refused here, without a place in the queue.
            prepare(question)
            # Questions about one camera may share a frame; an image of the request is its own.
            camera = None if carries_image(request) else self._cameras().resolve(question.camera)
            job = Job(
                question,
                take_frame=lambda: self._take_frame(request, question, settings.max_frame_age_s),
                on_done=finish,
                on_progress=on_progress,
                settings=settings.assistant,
                cancel=cancel,
                group=camera,
            )
            self._submit(job)
        except MobileVLMError as error:
            finish(refusal(question, error))
        except Exception as error:  # must not leave a callback; see the module
            _logger.exception('question %r could not be accepted', question_id)
            finish(Answer(question, ResultCode.ENGINE_ERROR, message=f'internal error: {error}'))

    def _take_frame(self, request: Any, question: Question, default_max_age_s: float) -> Frame:
        """The frame of a question; runs on the worker's thread, when the question's turn has come."""
        if carries_image(request):
            frame = request_frame(request, self._node.get_clock().now().nanoseconds)
            # The asker chose this image; only a limit that came with it can refuse it.
            limit_s = question.max_frame_age_s
            if limit_s is not None and frame.age_s > limit_s:
                message = f'the image of the request is {frame.age_s:.3f} s old, its limit is {limit_s:.3f} s'
                raise StaleFrameError(message, frame)
            return frame
        return self._frame_of_camera(question.camera, question.max_frame_age_s or default_max_age_s)

    def _finish(self, answer: Answer) -> None:
        self._on_answer(answer)
        try:
            self._publisher.publish(answer_msg(answer))
        except RuntimeError as error:  # rclpy's RCLError: the context went down meanwhile
            _logger.warning('answer %s was not published: %s', answer.question.id, error)


def _new_id() -> str:
    return uuid.uuid4().hex[:12]
