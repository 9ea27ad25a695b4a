#!/usr/bin/env python3
"""Make the project's environment in .venv: ROS 2 wheels, llama-cpp-python, mobilevlm_msgs, this package.

Run it as often as you like: a step whose inputs have not changed is skipped. This file only checks the
interpreter, in syntax that Python 3.6 parses; the work is in envkit.
"""

import sys

SUPPORTED = ((3, 10), (3, 11), (3, 12))


def python_problem(version, implementation):
    """Return what is wrong with an interpreter, or None; `version` starts with (major, minor)."""
    if tuple(version[:2]) in SUPPORTED and implementation == 'cpython':
        return None
    return (
        f'found:    {implementation} {version[0]}.{version[1]} ({sys.executable})\n'
        + 'expected: CPython 3.10, 3.11 or 3.12, for which ROS 2 wheels exist\n'
        + 'run:      make venv PYTHON=/path/to/python3.11   (or install one, e.g. with uv or pyenv)'
    )


def main():
    """Check the interpreter, then set up."""
    problem = python_problem(sys.version_info, sys.implementation.name)
    if problem:
        sys.stderr.write('set-up cannot start\n' + problem + '\n')
        return 2
    from envkit.main import main as set_up

    return set_up(sys.argv[1:])


if __name__ == '__main__':
    sys.exit(main())
