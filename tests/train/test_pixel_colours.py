"""Names for pixels: what people would call them."""

from __future__ import annotations

import numpy as np
import pytest

from mobilevlm_ros.train.pixel_colours import COLOURS, UNNAMED, clear_colour, colour_indices


@pytest.mark.parametrize(
    ('rgb', 'name'),
    [
        ((255, 0, 0), 'red'),
        ((255, 140, 0), 'orange'),
        ((255, 230, 0), 'yellow'),
        ((0, 128, 0), 'green'),
        ((30, 60, 200), 'blue'),
        ((120, 40, 160), 'purple'),
        ((255, 160, 200), 'pink'),
        ((110, 65, 30), 'brown'),
        ((10, 10, 10), 'black'),
        ((250, 250, 250), 'white'),
        ((128, 128, 128), 'gray'),
    ],
)
def test_a_pixel_has_the_name_that_people_give_it(rgb: tuple[int, int, int], name: str) -> None:
    assert COLOURS[int(colour_indices(np.array([rgb], np.uint8))[0])] == name


def test_beige_has_no_name() -> None:
    assert colour_indices(np.array([(235, 215, 170)], np.uint8)).tolist() == [UNNAMED]


def test_a_colour_is_clear_if_most_pixels_have_it() -> None:
    red, blue = np.full((6, 3), (230, 10, 10), np.uint8), np.full((4, 3), (20, 40, 210), np.uint8)
    assert clear_colour(np.concatenate([red, blue]), 10) == 'red'
    assert clear_colour(np.concatenate([red, blue]), 11) is None
    assert clear_colour(np.concatenate([red, blue, blue]), 10) == 'blue'
    assert clear_colour(np.concatenate([red[:4], blue]), 1) is None
