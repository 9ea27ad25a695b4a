"""The demonstration: the real node in its own process, real footage as ROS messages, questions through every door."""
