"""Trains: data, stages and what they leave behind. May use the model, the build and the runtime; only the commands know it."""
