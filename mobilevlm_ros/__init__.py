"""Answers questions about what a robot's cameras see."""

__version__ = '0.1.0'
