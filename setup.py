import os
import platform

from setuptools import Extension, find_packages, setup

PACKAGE = 'mobilevlm_ros'
# colcon runs a link to this file in its build folder, where not all of the sources are.
ROOT = os.path.dirname(os.path.realpath(__file__))
SHARED = ('launch', 'config', 'engines', 'models')


def version():
    """Read the version from package.xml, its one source."""
    import xml.etree.ElementTree as ElementTree

    return ElementTree.parse(os.path.join(ROOT, 'package.xml')).getroot().findtext('version')


def pins(name):
    """Read direct requirements of an extra, loosened from == to >= for those who install it elsewhere."""
    with open(os.path.join(ROOT, 'requirements', name + '.txt'), encoding='utf-8') as stream:
        lines = [line.split('#')[0].strip() for line in stream]
    return [line.replace('==', '>=', 1) for line in lines if line and not line.startswith('-')]


def shared_files():
    """List all files below the shared folders, each to go to the same place below share/mobilevlm_ros."""
    found = [
        ('share/ament_index/resource_index/packages', ['resource/' + PACKAGE]),
        ('share/' + PACKAGE, ['package.xml', 'NOTICE', 'LICENSE']),
    ]
    for top in SHARED:
        for path, folders, names in sorted(os.walk(os.path.join(ROOT, top))):
            folders[:] = [name for name in folders if name != '__pycache__']
            folder = os.path.relpath(path, ROOT)
            files = [os.path.join(folder, name) for name in sorted(names) if not name.startswith('.')]
            if files:
                found.append((os.path.join('share', PACKAGE, folder), files))
    return found


def compiled():
    """Name what is compiled: faster products for x86-64 CPUs. Optional: llama.cpp's own do without a compiler."""
    if platform.machine() not in ('x86_64', 'AMD64'):
        return []
    folder = PACKAGE + '/runtime/language/'
    return [
        Extension(
            PACKAGE + '.runtime.language._q4_kernel',
            [folder + name for name in ('q4_gemm.c', 'q4_gemv.c', 'q4_names.c')],
            depends=[folder + 'q4_formats.h'],
            extra_compile_args=['-std=c11', '-O3', '-mavx2', '-mfma', '-mf16c'],
            optional=True,
        )
    ]


setup(
    name=PACKAGE,
    version=version(),
    description="Answers questions about what a robot's cameras see, on the robot, with MobileVLM.",
    maintainer='mobilevlm_ros maintainers',
    maintainer_email='maintainers@mobilevlm-ros.example',
    license='Apache-2.0',
    packages=find_packages(include=[PACKAGE, PACKAGE + '.*']),
    package_data={PACKAGE: ['py.typed'], PACKAGE + '.evaluate': ['templates/*']},
    ext_modules=compiled(),
    data_files=shared_files(),
    python_requires='>=3.10',
    # ROS packages are named in package.xml; llama-cpp-python and onnxruntime have no rosdep key, so pip provides them.
    install_requires=['setuptools'],
    extras_require={
        'runtime': [*pins('runtime'), 'llama-cpp-python==0.3.36'],
        'build': pins('build'),
        'convert': pins('convert'),
        'openvino': pins('openvino'),
        'train': [*pins('convert'), *pins('train')],
        'evaluate': pins('evaluate'),
        'dev': [*pins('convert'), *pins('train'), *pins('evaluate'), *pins('dev')],
        'test': ['pytest'],
    },
    entry_points={
        'console_scripts': [
            'vqa_node = mobilevlm_ros.node.main:main',
            'mobilevlm = mobilevlm_ros.cli:main',
        ],
    },
    zip_safe=False,
)
