"""Contestants in their own processes: results, errors, and that none is left behind or busy while idle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from processes import alive, wait_for

from mobilevlm_ros.bench.process import Contestant, memory_of
from mobilevlm_ros.errors import BundleMissingError, EngineError


def test_a_method_is_called_in_the_child() -> None:
    with Contestant('limits', n_threads=1, seconds=0.0) as child:
        assert child.pid != os.getpid()
        assert child.call('fp32_flops', product=(4, 4, 4)) > 0
        assert child.memory()['peak'] > 1 << 20
    assert not alive(child.pid)


def test_the_child_inherits_variables_and_the_parent_loses_them_again() -> None:
    with Contestant('limits', {'BENCH_TEST_VARIABLE': '7'}, n_threads=1, seconds=0.0) as child:
        assert psutil.Process(child.pid).environ()['BENCH_TEST_VARIABLE'] == '7'
    assert 'BENCH_TEST_VARIABLE' not in os.environ


def test_an_error_of_ours_comes_back_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(BundleMissingError, match='there is no bundle'):
        Contestant('ours', bundle=str(tmp_path / 'none'), n_threads=1, height=8, width=8)
    wait_for(lambda: not contestants())


def contestants() -> list[psutil.Process]:
    children = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if 'spawn_main' in ' '.join(child.cmdline()):
                children.append(child)
    return children


def test_another_error_comes_back_with_its_traceback_and_the_child_goes_on() -> None:
    with Contestant('limits', n_threads=1, seconds=0.0) as child:
        with pytest.raises(EngineError, match='ValueError'):
            child.call('fp32_flops', product=(1, 2))
        assert child.call('fp32_flops', product=(4, 4, 4)) > 0


def test_a_child_that_died_is_reported() -> None:
    with Contestant('limits', n_threads=1, seconds=0.0) as child:
        os.kill(child.pid, signal.SIGKILL)
        wait_for(lambda: not alive(child.pid))
        with pytest.raises(EngineError, match='ended with code -9'):
            child.call('fp32_flops', product=(4, 4, 4))


def test_an_idle_contestant_does_not_spin(tiny_bundle: Path) -> None:
    with Contestant('ours', bundle=str(tiny_bundle), n_threads=2, height=32, width=32) as child:
        child.call('first_token', index=1, question='What is it?')
        process = psutil.Process(child.pid)
        time.sleep(0.1)
        before = process.cpu_times()
        time.sleep(0.5)
        after = process.cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.05


PARENT = """
import sys, time
from mobilevlm_ros.bench.process import Contestant
if __name__ == '__main__':
    child = Contestant('limits', n_threads=1, seconds=60.0)
    print(child.pid, flush=True)
    child.call('fp32_flops', product=(8, 8, 8))
"""


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_contestant_survives_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / 'parent.py'
    script.write_text(PARENT)
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(root)},
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(how)
        parent.wait(20.0)
        wait_for(lambda: not alive(child))


def test_memory_is_told_apart() -> None:
    memory = memory_of()
    assert memory['peak'] >= memory['own'] > 0
    assert memory['mapped'] > 0
