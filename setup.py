"""Builds qempo_fast._C with CMake and installs kernels/ as qempo_fast.kernels."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake build of csrc/ per install, in setuptools' own temporary folder."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        # A fresh tree each time: with build isolation cmake, ninja and pybind11 sit in a folder that is new
        # for each build, and a cache that names the last one fails.
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "--fresh", "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        if not target.is_file():
            raise FileNotFoundError(f"CMake built no {target.name}: it and setuptools disagree on the suffix")


# Out of the tree: a build/ kept in it would put modules that are gone into the next wheel.
with tempfile.TemporaryDirectory(prefix="qempo-fast-build-") as build_base:
    setup(
        packages=[*find_packages(include=["qempo_fast", "qempo_fast.*"]), "qempo_fast.kernels"],
        package_dir={"qempo_fast.kernels": "kernels"},
        package_data={"qempo_fast": ["py.typed", "*.pyi"]},
        ext_modules=[Extension("qempo_fast._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        options={"build": {"build_base": build_base}},
    )
