"""Reads camera images out of recorded bags, where no ROS is installed.

``open_bag`` takes a folder or a file that ``ros2 bag record`` wrote and gives its frames one after the other, decoded
when they are looked at, by the code that decodes them on the robot.
"""

from mobilevlm_ros.bags.bag import Bag, BrokenMessage, Topic, open_bag
from mobilevlm_ros.bags.frame import BagFrame, Clock

__all__ = ['Bag', 'BagFrame', 'BrokenMessage', 'Clock', 'Topic', 'open_bag']
