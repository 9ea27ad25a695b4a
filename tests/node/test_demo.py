"""The demonstration's parts; `make demo` runs the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rclpy.qos import qos_profile_sensor_data
from robot import Robot, wait_until

from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.node.conversions import stamp_ns
from mobilevlm_ros.node.demo.footage import CLIPS, Player
from mobilevlm_ros.node.demo.picture import draw_answer

Pixels = NDArray[np.uint8]


@pytest.fixture
def clips(tmp_path: Path, photo: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both clips of the demo, replaced by a short one made here."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    for clip in CLIPS:
        clip.path.parent.mkdir(parents=True, exist_ok=True)
        writer = cv2.VideoWriter(str(clip.path), cv2.VideoWriter_fourcc(*'mp4v'), 25.0, (64, 48))
        assert writer.isOpened()
        for shift in range(5):
            writer.write(np.roll(photo, shift * 8, axis=1))
        writer.release()


@pytest.mark.parametrize('clip', CLIPS, ids=[clip.camera for clip in CLIPS])
def test_player_plays_and_remembers_frames_by_stamp(robot: Robot, clips: None, clip: Any) -> None:
    from sensor_msgs.msg import CompressedImage
    from sensor_msgs.msg import Image as ImageMsg

    seen: list[Any] = []
    message_type = CompressedImage if clip.compressed else ImageMsg
    robot.node.create_subscription(message_type, clip.topic, seen.append, qos_profile_sensor_data)
    player = Player(robot.client, clip)
    message = wait_until(lambda: seen and seen[-1])
    frame = player.frame_at(stamp_ns(message.header.stamp))
    assert frame is not None and frame.shape == (48, 64, 3)
    assert message.header.frame_id == f'{clip.camera}_optical_frame'
    assert player.frame_at(1) is None


def test_clip_that_cannot_be_decoded(robot: Robot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    CLIPS[0].path.parent.mkdir(parents=True)
    CLIPS[0].path.write_bytes(b'no video')
    with pytest.raises(BuildError, match='cannot be decoded'):
        Player(robot.client, CLIPS[0])


def test_picture_shows_frame_and_text(tmp_path: Path, photo: Pixels) -> None:
    path = tmp_path / 'folder' / 'answer.png'
    bgr = np.zeros((48, 64, 3), np.uint8)
    bgr[:, :, 0] = 255
    draw_answer(bgr, 'Is it blue?', 'yes', 'camera, age 3 ms', path)
    picture = np.asarray(Image.open(path))
    assert tuple(picture[10, 10]) == (0, 0, 255)
    text = picture[720:]
    assert text.max() == 255 and len(np.unique(text.reshape(-1, 3), axis=0)) > 3
