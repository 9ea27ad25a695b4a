"""MobileVLM itself: its shapes, its PyTorch modules, and published checkpoints in and out."""
