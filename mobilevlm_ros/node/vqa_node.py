"""The lifecycle node: cameras in, questions in, answers out.

configure reads the parameters and checks the bundle; activate loads it and listens to the cameras; deactivate
interrupts what runs, answers it with NOT_ACTIVE and frees the memory. Everything ROS happens on one executor thread
that never waits for an answer; one worker thread answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from mobilevlm_msgs.msg import Event as EventMsg
from mobilevlm_msgs.msg import ModelInfo as ModelInfoMsg
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.qos import DurabilityPolicy, QoSProfile

from mobilevlm_ros.errors import MobileVLMError, NotActiveError, SettingsError
from mobilevlm_ros.node import parameters
from mobilevlm_ros.node.camera import CameraInput, CameraNotice
from mobilevlm_ros.node.conversions import stamp_msg
from mobilevlm_ros.node.doors import Doors
from mobilevlm_ros.node.health import Health, NodeState, statuses
from mobilevlm_ros.node.session import Session
from mobilevlm_ros.runtime.ahead import AheadCounts
from mobilevlm_ros.runtime.frames import FrameStore
from mobilevlm_ros.runtime.worker import Job
from mobilevlm_ros.types import Answer, Frame, ResultCode

__all__ = ['VqaNode']

_LOOK_PERIOD_S = 0.5
_NOTICES = {
    CameraNotice.CONNECTED: EventMsg.CAMERA_CONNECTED,
    CameraNotice.INCOMPATIBLE_QOS: EventMsg.CAMERA_INCOMPATIBLE_QOS,
    CameraNotice.UNSUPPORTED: EventMsg.CAMERA_UNSUPPORTED,
}


class VqaNode(LifecycleNode):
    """See the module; all keyword arguments go to ``LifecycleNode``."""

    def __init__(self, node_name: str = 'vqa_node', **kwargs: Any) -> None:
        super().__init__(node_name, **kwargs)
        parameters.declare(self)
        self.add_on_set_parameters_callback(self._on_set_parameters)
        self._health = Health()
        # What exists from configure to cleanup, and from activate to deactivate; closed in reverse order, once.
        self._configured, self._activated = ExitStack(), ExitStack()
        self._event_publisher: Any = None
        self._model_publisher: Any = None
        self._session: Session | None = None
        self._cameras: list[CameraInput] = []
        self._frames: FrameStore | None = None
        self._lost: set[str] = set()
        self._counted: tuple[float, dict[str, tuple[int, int]]] = (time.monotonic(), {})
        # Wall time, not ROS time: a paused simulation must not hide a broken camera.
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._jump = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1), on_clock_change=True),
            post_callback=self._on_time_jump,
        )

    @property
    def settings(self) -> parameters.NodeSettings:
        """The present parameters, validated."""
        return parameters.settings_from(parameters.read(self))

    # -- lifecycle ----------------------------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Read the parameters, check the bundle, open the doors; questions are answered NOT_ACTIVE for now."""
        return self._transition('configure', self._configure)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model and listen to the cameras."""
        return self._transition('activate', self._activate)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Interrupt what runs, stop listening, free the memory."""
        return self._transition('deactivate', self._deactivate)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Close the doors."""
        return self._transition('cleanup', self._cleanup)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Interrupt what runs and free the memory; the doors stay until the node goes, to refuse politely."""
        return self._transition('shutdown', self._deactivate)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Release everything."""

        def release() -> None:
            self._deactivate()
            self._cleanup()

        return self._transition('recover', release)

    def _transition(self, name: str, action: Callable[[], None]) -> TransitionCallbackReturn:
        try:
            action()
            return TransitionCallbackReturn.SUCCESS
        except MobileVLMError as error:
            problem = str(error)
        except Exception as error:  # rclpy would swallow it without a word
            problem = f'{type(error).__name__}: {error}'
        self.get_logger().error(f'cannot {name}: {problem}')
        self._health.note_error(problem)
        return TransitionCallbackReturn.FAILURE

    def _configure(self) -> None:
        parameters.declare_cameras(self)
        settings = self.settings
        self.get_logger().info(Session.check(settings))
        with ExitStack() as stack:
            latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
            self._event_publisher = self._publisher(stack, EventMsg, '~/event', QoSProfile(depth=16))
            self._model_publisher = self._publisher(stack, ModelInfoMsg, '~/model_info', latched)
            diagnostics = self._publisher(stack, DiagnosticArray, '/diagnostics', QoSProfile(depth=10))
            timer = self.create_timer(
                settings.diagnostics_period_s, lambda: diagnostics.publish(self._diagnostics()), clock=self._steady
            )
            stack.callback(self.destroy_timer, timer)
            doors = Doors(
                self,
                submit=self._submit,
                settings=lambda: self.settings,
                cameras=self._active_frames,
                take_frame=self._take_frame,
                on_answer=self._on_answer,
            )
            stack.callback(doors.close)
            self._configured = stack.pop_all()

    def _publisher(self, stack: ExitStack, message_type: type[Any], name: str, qos: QoSProfile) -> Any:
        publisher = self.create_publisher(message_type, name, qos)
        stack.callback(self.destroy_publisher, publisher)
        return publisher

    def _cleanup(self) -> None:
        self._event_publisher = self._model_publisher = None
        self._configured.close()

    def _activate(self) -> None:
        settings = self.settings
        with ExitStack() as stack:
            frames = FrameStore([camera.name for camera in settings.cameras], self._now_ns)
            session = Session.open(settings, frames)
            stack.callback(session.close)
            # Before the session closes, questions must find none: they are refused instead of lost.
            stack.callback(self._forget_session)
            self._frames, self._session = frames, session
            for camera in settings.cameras:
                self._cameras.append(CameraInput(self, camera, frames, self._now_ns, self._on_notice))
                stack.callback(self._cameras[-1].close)
            stack.callback(self.destroy_timer, self.create_timer(_LOOK_PERIOD_S, self._look, clock=self._steady))
            self._look()
            info = session.info_msg(stamp_msg(self._now_ns()))
            self._model_publisher.publish(info)
            self._activated = stack.pop_all()
        if info.warning:
            self.get_logger().warning(info.warning.strip())
        message = f'{info.model_id} is loaded in {info.load_s:.1f} s and answers'
        self.get_logger().info(message)
        self._event(EventMsg.MODEL_LOADED, message)

    def _forget_session(self) -> None:
        self._frames = self._session = None
        self._cameras = []
        self._lost.clear()

    def _deactivate(self) -> None:
        was_active = self._session is not None
        self._activated.close()
        if was_active:
            self._event(EventMsg.MODEL_UNLOADED, 'the model was unloaded and its memory freed')

    def autostart(self) -> bool:
        """Configure and activate; returns whether the node is active now."""
        success = TransitionCallbackReturn.SUCCESS
        return self.trigger_configure() == success and self.trigger_activate() == success

    def destroy_node(self) -> None:
        """Stop the worker, free the memory, then go."""
        self._deactivate()
        self._cleanup()
        self._jump.unregister()
        super().destroy_node()

    # -- questions ----------------------------------------------------------------------------------------------------

    def _submit(self, job: Job) -> None:
        session = self._session
        if session is None:
            raise NotActiveError('questions are not answered at present: activate the node (ros2 lifecycle set)')
        session.worker.submit(job)

    def _active_frames(self) -> FrameStore:
        frames = self._frames
        if frames is None:
            raise NotActiveError('the node left the active state while the question was open')
        return frames

    def _take_frame(self, camera: str, max_age_s: float) -> Frame:
        """The frame for a question; on the worker's thread."""
        session = self._session
        if session is None:
            raise NotActiveError('the node left the active state while the question was open')
        return session.ahead.take(camera, max_age_s)

    def _on_answer(self, answer: Answer) -> None:
        self._health.add(answer)
        if answer.result_code >= 100:
            self.get_logger().warning(f'question {answer.question.id}: {answer.result_code.name}: {answer.message}')
            kind = (
                EventMsg.ENGINE_FAILED if answer.result_code is ResultCode.ENGINE_ERROR else EventMsg.QUESTION_REFUSED
            )
            self._event(
                kind,
                answer.message,
                camera=answer.camera,
                question_id=answer.question.id,
                result_code=int(answer.result_code),
            )

    # -- cameras, time, health ----------------------------------------------------------------------------------------

    def _now_ns(self) -> int:
        return int(self.get_clock().now().nanoseconds)

    def _look(self) -> None:
        """Look for cameras on the graph, and for frozen ones; follow the settings that the worker does not read."""
        for camera in self._cameras:
            camera.look()
        if self._frames is None:
            return
        if self._session is not None:
            self._session.encode_ahead(self.settings.ahead)
        limit_s = self.get_parameter('max_frame_age_s').value
        for status in self._frames.status():
            is_lost = status.age_s is not None and status.age_s > limit_s
            if is_lost and status.camera not in self._lost:
                message = f'camera {status.camera}: no new image for {status.age_s:.1f} s'
                self.get_logger().warning(message)
                self._event(EventMsg.CAMERA_LOST, message, camera=status.camera)
            (self._lost.add if is_lost else self._lost.discard)(status.camera)

    def _on_notice(self, camera: str, notice: CameraNotice, message: str) -> None:
        # Two calls: rclpy remembers the severity of each place that logs, and refuses another.
        if notice is CameraNotice.CONNECTED:
            self.get_logger().info(f'camera {camera}: {message}')
        else:
            self.get_logger().error(f'camera {camera}: {message}')
        self._event(_NOTICES[notice], message, camera=camera)

    def _on_time_jump(self, jump: Any) -> None:
        if self._frames is not None:
            self._frames.clear()
            self.get_logger().warning('time jumped: the frames that were kept are forgotten')

    def _event(self, kind: int, message: str, **fields: Any) -> None:
        if self._event_publisher is not None and self.context.ok():
            stamp = stamp_msg(self._now_ns())
            self._event_publisher.publish(EventMsg(stamp=stamp, kind=kind, message=message, **fields))

    def _diagnostics(self) -> DiagnosticArray:
        settings = self.settings
        cameras = self._frames.status() if self._frames is not None else []
        before_s, before = self._counted
        now_s = time.monotonic()
        counts = {
            status.camera: (status.n_frames, camera.n_lost)
            for status, camera in zip(cameras, self._cameras, strict=False)
        }
        self._counted = (now_s, counts)
        new = [np.subtract(counts[name], before.get(name, (0, 0))) for name in counts]
        session = self._session
        state = NodeState(
            active=session is not None,
            model_id=session.model_id if session else '',
            warning=session.warning if session else '',
            n_waiting=session.worker.n_waiting if session else 0,
            queue_size=settings.queue_size,
            max_frame_age_s=settings.max_frame_age_s,
            cameras=cameras,
            camera_rates_hz=[frames / (now_s - before_s) for frames, _ in new],
            camera_losses=[int(lost) for _, lost in new],
            camera_problems=[camera.problem for camera in self._cameras],
            ahead=replace(session.ahead.counts) if session else AheadCounts(),
        )
        array = DiagnosticArray(status=statuses(self.get_fully_qualified_name().strip('/'), state, self._health))
        array.header.stamp = stamp_msg(self._now_ns())
        return array

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _on_set_parameters(self, changes: list[Any]) -> SetParametersResult:
        """Accept a change only if the whole set stays valid and the node can follow it now."""
        ours = {parameter.name for parameter in parameters.PARAMETERS}
        values = parameters.read(self)
        for change in changes:
            known = change.name in ours or change.name.startswith('cameras.')
            if not known:
                continue
            if (
                self._session is not None
                and not parameters.is_live(change.name)
                and change.value != values.get(change.name)
            ):
                reason = f'{change.name} cannot change while the node is active: deactivate it first'
                return SetParametersResult(successful=False, reason=reason)
            values[change.name] = change.value
        try:
            parameters.settings_from(values)
        except (SettingsError, TypeError) as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)
