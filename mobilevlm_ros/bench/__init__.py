"""How fast an engine is on this machine, beside what the machine allows and beside others who do the same.

A benchmark that starts with the limits: the cost card says what an answer must read and compute, and what this machine
can read and compute in a second; every figure after it is printed with its share of that bound. It measures bundles
through the runtime, as a robot uses them, and knows nothing of ROS.
"""
