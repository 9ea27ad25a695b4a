"""Cameras: found by their type, newest frame only, QoS, simulated time, damaged messages."""

from __future__ import annotations

import time
import uuid
from typing import Any

import cv2
import numpy as np
import pytest
from mobilevlm_msgs.msg import Answer, Event
from numpy.typing import NDArray
from rclpy.qos import QoSProfile, ReliabilityPolicy
from robot import Robot, wait_until
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import CompressedImage, Image, PointCloud2

Pixels = NDArray[np.uint8]


def jpeg(robot: Robot, rgb_hwc: Pixels) -> CompressedImage:
    data = cv2.imencode('.jpg', rgb_hwc[:, :, ::-1])[1].tobytes()
    message = CompressedImage(format='bgr8; jpeg compressed bgr8', data=data)
    robot.stamp(message)
    return message


def event_of(robot: Robot, kind: int) -> Any:
    return wait_until(lambda: next((event for event in robot.events if event.kind == kind), None))


def test_compressed_images_are_found_by_their_type(robot: Robot, photo: Pixels) -> None:
    message = robot.show(jpeg(robot, photo))
    answer = robot.ask()
    assert answer.result_code == Answer.OK
    assert answer.header == message.header
    assert 'compressed' in event_of(robot, Event.CAMERA_CONNECTED).message


def test_a_camera_may_change_its_type(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    robot.client.destroy_publisher(robot._publishers.pop('image'))
    wait_until(lambda: robot.node.count_publishers(f'{robot.ns}/image') == 0)
    robot.show(jpeg(robot, photo))
    assert robot.ask().result_code == Answer.OK


def test_type_can_be_given(make_robot: Any, photo: Pixels) -> None:
    robot = make_robot(cameras__camera__type='compressed').start()
    robot.show(jpeg(robot, photo))
    assert robot.ask().result_code == Answer.OK


def test_topic_that_is_no_image_is_reported(robot: Robot) -> None:
    robot.publish(PointCloud2())
    event = event_of(robot, Event.CAMERA_UNSUPPORTED)
    assert 'PointCloud2' in event.message
    assert robot.ask().result_code == Answer.NO_FRAME


def test_incompatible_qos_is_reported_once_with_topic_and_policy(make_robot: Any, photo: Pixels) -> None:
    topic = f'/camera_{uuid.uuid4().hex[:8]}'
    overrides = {f'qos_overrides.{topic}.subscription.reliability': 'reliable'}
    robot = make_robot(cameras__camera__topic=topic, **overrides).start()
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    robot.publish(robot.image(photo), topic, best_effort)
    event = event_of(robot, Event.CAMERA_INCOMPATIBLE_QOS)
    assert topic in event.message
    assert 'RELIABILITY' in event.message.upper()
    time.sleep(0.6)  # another look at the graph
    assert [e.kind for e in robot.events].count(Event.CAMERA_INCOMPATIBLE_QOS) == 1


def test_qos_override_makes_a_reliable_subscription(make_robot: Any, photo: Pixels) -> None:
    topic = f'/camera_{uuid.uuid4().hex[:8]}'
    overrides = {f'qos_overrides.{topic}.subscription.reliability': 'reliable'}
    robot = make_robot(cameras__camera__topic=topic, **overrides).start()
    robot.publish(robot.image(photo), topic, QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE))
    robot.show(robot.image(photo), topic)
    (info,) = robot.client.get_subscriptions_info_by_topic(topic)
    assert info.qos_profile.reliability == ReliabilityPolicy.RELIABLE


def test_default_qos_is_sensor_data(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    (info,) = robot.client.get_subscriptions_info_by_topic(f'{robot.ns}/image')
    assert info.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT


def test_only_the_newest_frame_is_asked_about(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo))
    for shift in range(5):
        newest = robot.show(robot.image(np.roll(photo, shift, axis=0)))
    assert robot.ask().header == newest.header


def test_damaged_message_is_bad_image_and_the_next_is_answered(robot: Robot, photo: Pixels) -> None:
    broken = robot.image(photo)
    broken.step = 5
    robot.show(broken)
    answer = robot.ask()
    assert answer.result_code == Answer.BAD_IMAGE
    assert 'step' in answer.message
    robot.show(robot.image(photo))
    assert robot.ask().result_code == Answer.OK


def test_damaged_jpeg_is_bad_image_and_the_next_is_answered(robot: Robot, photo: Pixels) -> None:
    broken = jpeg(robot, photo)
    broken.data = broken.data[: len(broken.data) // 2]
    robot.show(broken)
    assert robot.ask().result_code == Answer.BAD_IMAGE
    robot.show(jpeg(robot, photo))
    assert robot.ask().result_code == Answer.OK


def test_image_without_a_stamp_has_the_age_of_its_arrival(robot: Robot, photo: Pixels) -> None:
    message = robot.image(photo)
    message.header.stamp.sec = message.header.stamp.nanosec = 0
    robot.show(message)
    time.sleep(0.3)
    answer = robot.ask(max_frame_age_s=30.0)
    assert answer.result_code == Answer.OK
    assert 0.3 <= answer.age_s < 10.0
    assert robot.ask(max_frame_age_s=0.2).result_code == Answer.STALE


def test_stamp_in_the_future_does_not_keep_a_frame_fresh(robot: Robot, photo: Pixels) -> None:
    robot.show(robot.image(photo, age_s=-100.0))
    time.sleep(0.3)
    assert robot.ask(max_frame_age_s=0.2).result_code == Answer.STALE


class TestSimulatedTime:
    """Ages follow /clock; deadlines and diagnostics do not stop with it."""

    @pytest.fixture
    def sim(self, make_robot: Any) -> Robot:
        robot = make_robot(use_sim_time=True)
        self.clock = robot.client.create_publisher(Clock, '/clock', QoSProfile(depth=1))
        self.set_time(robot, 1000.0)
        return robot.start()

    def set_time(self, robot: Robot, seconds: float) -> None:
        message = Clock()
        message.clock.sec, message.clock.nanosec = int(seconds), int(seconds % 1 * 1e9)

        def reached() -> bool:
            self.clock.publish(message)
            return abs(robot.node.get_clock().now().nanoseconds / 1e9 - seconds) < 1e-3

        wait_until(reached)

    def frame(self, robot: Robot, photo: Pixels, stamp_s: float) -> Image:
        message = robot.image(photo)
        message.header.stamp.sec, message.header.stamp.nanosec = int(stamp_s), int(stamp_s % 1 * 1e9)
        return message

    def test_age_follows_the_clock(self, sim: Robot, photo: Pixels) -> None:
        sim.show(self.frame(sim, photo, 999.5))
        answer = sim.ask(max_frame_age_s=1.0)
        assert answer.result_code == Answer.OK
        assert answer.age_s == pytest.approx(0.5, abs=1e-3)
        self.set_time(sim, 1010.0)
        assert sim.ask(max_frame_age_s=1.0).result_code == Answer.STALE

    def test_paused_clock_keeps_the_age(self, sim: Robot, photo: Pixels) -> None:
        sim.show(self.frame(sim, photo, 999.9))
        time.sleep(0.3)
        assert sim.ask(max_frame_age_s=0.2).result_code == Answer.OK

    def test_deadline_is_wall_time(self, sim: Robot, photo: Pixels) -> None:
        sim.show(self.frame(sim, photo, 1000.0))
        assert sim.ask(max_tokens=1900, deadline_s=0.2).result_code == Answer.TIMEOUT

    def test_jump_back_forgets_the_frames(self, sim: Robot, photo: Pixels) -> None:
        sim.show(self.frame(sim, photo, 1000.0))
        self.set_time(sim, 100.0)
        assert sim.ask().result_code == Answer.NO_FRAME
        sim.show(self.frame(sim, photo, 100.0))
        assert sim.ask().result_code == Answer.OK
