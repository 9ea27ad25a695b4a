"""Entry point of the node: one process, one node, one executor thread."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import rclpy
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor

from mobilevlm_ros.node.vqa_node import VqaNode

__all__ = ['main', 'spin']


class _RosLogHandler(logging.Handler):
    """Sends records of Python's logging to the node's logger, so that they reach /rosout."""

    def __init__(self, node: VqaNode) -> None:
        super().__init__(level=logging.INFO)
        self._logger = node.get_logger()

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._logger.error(text)
        elif record.levelno >= logging.WARNING:
            self._logger.warning(text)
        else:
            self._logger.info(text)


def spin(node: VqaNode, executor: SingleThreadedExecutor) -> None:
    """Run callbacks until the context is shut down; a callback that raises is logged and does not end the node."""
    while node.context.ok():
        try:
            executor.spin()
            return
        except (KeyboardInterrupt, ExternalShutdownException):
            return
        except Exception as error:  # for example a message that is no valid UTF-8, raised while it is taken
            if node.context.ok():
                node.get_logger().error(f'a callback failed: {type(error).__name__}: {error}')


def main(args: Sequence[str] | None = None) -> int:
    """Run the node until it is told to stop."""
    rclpy.init(args=list(args) if args is not None else None)
    executor = SingleThreadedExecutor()
    node = VqaNode()
    handler = _RosLogHandler(node)
    logging.getLogger('mobilevlm_ros').addHandler(handler)
    try:
        executor.add_node(node)
        if node.get_parameter('autostart').value:
            node.autostart()
        spin(node, executor)
    except KeyboardInterrupt:
        pass
    finally:
        logging.getLogger('mobilevlm_ros').removeHandler(handler)
        node.destroy_node()
        executor.shutdown()
        rclpy.try_shutdown()
    return 0


if __name__ == '__main__':
    sys.exit(main())
