"""Answers questions about frames. Knows neither ROS nor PyTorch nor transformers."""
