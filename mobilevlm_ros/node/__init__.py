"""The ROS 2 node. The only room that imports rclpy; callbacks store a frame or enqueue a question, nothing more."""
