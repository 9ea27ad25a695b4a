"""The command ``mobilevlm``: reads arguments, calls the room that does the work, prints."""

from mobilevlm_ros.cli.main import build_parser, main

__all__ = ['build_parser', 'main']
