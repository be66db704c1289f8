"""Packaging of ln-images. ``pip install .`` installs the command ``ln-images``."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.findall(
    r'__version__ = "(.+)"', (HERE / "ln_images" / "__init__.py").read_text(encoding="utf-8")
)[0]

CLOUDS = ["openstacksdk>=1.0.0"]
METRICS = ["prometheus-client>=0.16.0"]
TEST = [
    *CLOUDS,
    *METRICS,
    "coverage>=7.10",
    "hypothesis>=6.90",
    "jsonschema>=4.20",
    "oslo.config>=9.0",
    "pytest>=8.0",
    "pytest-xdist>=3.5",
    "requests>=2.28",
    "vermin>=1.6",
]

setup(
    name="ln-images",
    version=VERSION,
    description="Hard-links finished Glance images into Nova's shared image cache, so that first boots fetch nothing",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=["ln_images"],
    package_data={"ln_images": ["py.typed"]},
    data_files=[("share/man/man1", ["docs/ln-images.1"])],
    python_requires=">=3.11",
    install_requires=[
        "click>=8.3.0",
        "inotify_simple>=1.3.5",
        "keystoneauth1>=5.10.0",
        "oslo.utils[image-inspection]>=8.0.0",
        "python-glanceclient>=4.2.0",
        "wcwidth>=0.3.0",
    ],
    extras_require={
        "clouds": CLOUDS,
        "metrics": METRICS,
        "test": TEST,
        "dev": [
            *TEST,
            "mypy>=1.8",
            "ruff>=0.6",
            "types-jsonschema",
            "types-requests",
            "types-setuptools",
        ],
    },
    entry_points={"console_scripts": ["ln-images = ln_images.__main__:start"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: OpenStack",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: System :: Systems Administration",
    ],
)
