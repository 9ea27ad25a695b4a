"""Trains: data, stages and what they leave. May use model, build and runtime; only the commands know it."""
