"""Packaging of fastpo.

``kernels/`` and ``benchmarks/`` at the top level are installed as ``fastpo.kernels`` and ``fastpo.benchmarks``:
in the tree through the committed links ``fastpo/kernels -> ../kernels`` and ``fastpo/benchmarks ->
../benchmarks``, in a wheel as the one copy that setuptools finds behind each link. Results and pytest suites
stay in the tree.
"""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (ROOT / "fastpo/version.py").read_text(encoding="utf-8"), re.M
)[1]

EXTRAS = {
    "deepspeed": ["deepspeed>=0.18"],
    "flash": ["flash-attn>=2.7"],
    "liger": ["liger-kernel>=0.8.5"],
    "openai": ["openai>=2", "tenacity>=9"],
    "peft": ["peft>=0.21"],
    "bench": [
        "pytest-benchmark>=5",
        "liger-kernel>=0.8.5",
        "cut-cross-entropy>=25.1",
        "trl>=1.16",
    ],
    "dev": [
        "cut-cross-entropy>=25.1",
        "deepspeed>=0.18",
        "hypothesis>=6.100",
        "liger-kernel>=0.8.5",
        "mypy>=1.15",
        "openai>=2",
        "peft>=0.21",
        "pytest>=8",
        "pytest-benchmark>=5",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "tenacity>=9",
        "trl>=1.16",
        "types-PyYAML",
    ],
}

setup(
    name="fastpo",
    version=VERSION,
    description="Preference optimisation of language models without materialised logits",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_namespace_packages(
        include=["fastpo", "fastpo.*"],
        exclude=["fastpo.benchmarks.results", "fastpo.benchmarks.suites"],
    ),
    package_data={"fastpo": ["py.typed", "selfplay/templates/*.txt"]},
    install_requires=[
        "torch>=2.10",
        "triton>=3.5; sys_platform == 'linux'",
        "transformers>=5.10",
        "accelerate>=1.10",
        "datasets>=4.0",
        "safetensors>=0.5",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "PyYAML>=6",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["fastpo = fastpo.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
