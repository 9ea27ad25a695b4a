"""Where things are: what is shipped with the package, and what is made on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mobilevlm_ros.errors import SettingsError

__all__ = ['bundle_dir', 'cache_dir', 'shared_file']


def shared_file(relative: str) -> Path:
    """A data file of the package (``models/...``, ``engines/...``, ``config/...``).

    Looks in the source tree, then where colcon and pip install data files.

    :raise SettingsError: if it is nowhere.
    """
    prefixes = [Path(prefix) for prefix in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if prefix]
    places = [Path(__file__).resolve().parent.parent]
    places += [prefix / 'share' / 'mobilevlm_ros' for prefix in (*prefixes, Path(sys.prefix))]
    for place in places:
        if (place / relative).exists():
            return place / relative
    raise SettingsError(
        f'{relative} of mobilevlm_ros is missing; looked in {", ".join(map(str, places))}. Install the package again.'
    )


def cache_dir() -> Path:
    """Folder for what this machine downloads and builds: ``$XDG_CACHE_HOME/mobilevlm_ros``, by default in ~/.cache."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base) / 'mobilevlm_ros'


def bundle_dir(model: str, profile: str) -> Path:
    """Where ``mobilevlm build`` puts a bundle unless told otherwise."""
    return cache_dir() / 'bundles' / f'{model}-{profile}'
