"""Makes bundles. The assembly of the embedded default needs ``onnx``, ``gguf`` and ``safetensors``, but no torch."""
