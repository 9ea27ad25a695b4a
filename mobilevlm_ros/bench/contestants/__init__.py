"""Those who are measured, each in a process of its own (``bench.process``).

They share method names and take and return plain data; all times are seconds of a steady clock, taken around the work
and inside the process, so that the pipe costs nothing:

- ``first_token(index, question)``: a frame and a question to the first token of the answer; ``total_s``, ``vision_s``
  (the vision engine alone), ``prompt_tokens``, ``reused_tokens``.
- ``prefill(tokens)``: a prompt of tokens into an empty context, up to its logits, in seconds.
- ``decode(tokens, n_tokens)``: seconds for ``n_tokens`` greedy steps after a prompt, which is not counted.
- ``load_s``: seconds to load.

No contestant stops early: end tokens are tokens like all others here, because random weights may choose them any time.
"""
