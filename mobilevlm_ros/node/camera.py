"""One camera's subscription: finds the image type on the graph, keeps the newest frame, reports what goes wrong.

Messages are taken serialised and stored as they are: a frame that no question asks about is never deserialised, let
alone decoded, which keeps a 30 Hz camera at a few per cent of one core. Only the stamp is read, out of the first bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Any

from rclpy.node import Node
from rclpy.qos import (
    DurabilityPolicy,
    HistoryPolicy,
    QoSProfile,
    ReliabilityPolicy,
    qos_policy_name_from_kind,
)
from rclpy.qos_overriding_options import QoSOverridingOptions
from sensor_msgs.msg import CompressedImage, Image

from mobilevlm_ros.node.parameters import CameraSettings
from mobilevlm_ros.runtime.camera_message import decode_message
from mobilevlm_ros.runtime.cdr import stamp_of
from mobilevlm_ros.runtime.frames import FrameStore, PendingFrame

try:
    from rclpy.event_handler import SubscriptionEventCallbacks
except ImportError:  # ROS 2 Humble
    from rclpy.qos_event import SubscriptionEventCallbacks

__all__ = ['CameraInput', 'CameraNotice']

_TYPES: dict[str, type[Any]] = {'raw': Image, 'compressed': CompressedImage}
_TYPE_NAMES = {'sensor_msgs/msg/Image': 'raw', 'sensor_msgs/msg/CompressedImage': 'compressed'}
_MESSAGE_TYPES = {image_type: name for name, image_type in _TYPE_NAMES.items()}
_QUIET_LOOKS = 6


class CameraNotice(Enum):
    """What a camera input reports."""

    CONNECTED = auto()
    INCOMPATIBLE_QOS = auto()
    UNSUPPORTED = auto()


class CameraInput:
    """See the module.

    :param on_notice: told of connections and problems, once each.
    """

    def __init__(
        self,
        node: Node,
        settings: CameraSettings,
        store: FrameStore,
        now_ns: Callable[[], int],
        on_notice: Callable[[str, CameraNotice, str], None],
    ) -> None:
        self._node = node
        self._settings = settings
        self._store = store
        self._now_ns = now_ns
        self._on_notice = on_notice
        self._subscription: Any = None
        self._unsupported: set[str] = set()
        self._incompatible: set[str] = set()
        self._n_received = 0
        self._quiet_looks = 0
        self.n_lost = 0
        self.image_type = ''
        self.topic = node.resolve_topic_name(settings.topic)

    @property
    def problem(self) -> str:
        """What keeps frames from coming, as far as is known; empty if nothing."""
        if self._incompatible:
            return f'incompatible QoS on {self.topic}: {", ".join(sorted(self._incompatible))}'
        if self._subscription is None and self._unsupported:
            return f'{self.topic} has type {", ".join(sorted(self._unsupported))}, which is no image'
        return '' if self._subscription is not None else f'nobody publishes {self.topic}'

    def look(self) -> None:
        """Look at the graph: subscribe when the type is known, or again when another type is published instead."""
        wanted = self._settings.type
        if wanted == 'auto':
            types = {info.topic_type for info in self._node.get_publishers_info_by_topic(self.topic)}
            images = {_TYPE_NAMES[name] for name in types if name in _TYPE_NAMES}
            self._report_unsupported(types - set(_TYPE_NAMES))
            if self._may_stay(images):
                return
            images.discard(self.image_type)
            wanted = 'raw' if 'raw' in images else 'compressed'
        elif self._subscription is not None:
            return
        self.close()
        self._subscribe(wanted)

    def _may_stay(self, images: set[str]) -> bool:
        """Whether there is nothing else to listen to, or what is listened to still speaks."""
        self._quiet_looks = 0 if self._n_received else self._quiet_looks + 1
        self._n_received = 0
        if not images or images == {self.image_type}:
            return True
        # A publisher that crashed stays on the graph for a while beside its successor of another type.
        return self.image_type in images and self._quiet_looks < _QUIET_LOOKS

    def _report_unsupported(self, types: set[str]) -> None:
        for name in sorted(types - self._unsupported):
            self._unsupported.add(name)
            message = f'{self.topic} has type {name}; expected sensor_msgs/msg/Image or CompressedImage'
            self._on_notice(self._settings.name, CameraNotice.UNSUPPORTED, message)

    def _subscribe(self, image_type: str) -> None:
        qos = QoSProfile(
            depth=1,
            history=HistoryPolicy.KEEP_LAST,
            reliability=ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.VOLATILE,
        )
        message_type = _MESSAGE_TYPES[image_type]

        def on_message(serialized: bytes) -> None:
            pending = PendingFrame(
                stamp_of(serialized), self._now_ns(), lambda: decode_message(serialized, message_type)
            )
            self._n_received += 1
            self._store.put(self._settings.name, pending)

        self._incompatible.clear()
        self._quiet_looks = 0
        self._subscription = self._node.create_subscription(
            _TYPES[image_type],
            self._settings.topic,
            on_message,
            qos,
            raw=True,
            event_callbacks=SubscriptionEventCallbacks(
                incompatible_qos=self._on_incompatible_qos,
                message_lost=self._on_message_lost,
                use_default_callbacks=False,
            ),
            qos_overriding_options=QoSOverridingOptions.with_default_policies(),
        )
        self.image_type = image_type
        self._on_notice(self._settings.name, CameraNotice.CONNECTED, f'listening to {self.topic} ({image_type} images)')

    def _on_incompatible_qos(self, info: Any) -> None:
        try:
            policy = qos_policy_name_from_kind(info.last_policy_kind)
        except ValueError:
            policy = str(info.last_policy_kind)
        if policy in self._incompatible:
            return
        self._incompatible.add(policy)
        message = (
            f'{self.topic} offers an incompatible QoS: policy {policy}; no images will arrive from that publisher. '
            f'Change the publisher, or set qos_overrides.{self.topic}.subscription.*'
        )
        self._on_notice(self._settings.name, CameraNotice.INCOMPATIBLE_QOS, message)

    def _on_message_lost(self, info: Any) -> None:
        self.n_lost += info.total_count_change

    def close(self) -> None:
        """Stop listening; may be called again."""
        if self._subscription is not None:
            self._node.destroy_subscription(self._subscription)
            self._subscription = None
            self.image_type = ''
