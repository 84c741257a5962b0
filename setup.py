"""Shim for pip: every setting is in setup.cfg. What stands here: the native engine is compiled on the way.

Without a compiler the package installs all the same, as pure Python; a wheel that holds the library is one for the
platform and for any Python 3.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools below 70
    from wheel.bdist_wheel import bdist_wheel

ENGINE = "bnnfree/engine"
# Why by its path: importing bnnfree.engine needs numpy, which is not there yet
spec = importlib.util.spec_from_file_location("build_native", Path(__file__).resolve().parent / ENGINE / "build.py")
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)


class BuildPy(build_py):
    """Python files as ever, then the library: beside them, or for an editable install in the checkout."""

    library = None  # where it is, once built

    def run(self):
        super().run()
        folder = native.PLACE if self.editable_mode else Path(self.build_lib) / ENGINE / native.PLACE.name
        for old in [] if self.editable_mode else folder.glob("*"):  # of an earlier build with other sources
            old.unlink()
        self.library = native.build(folder / native.name(), verbose=True)
        if self.library is None:
            print("warning: bnnfree: native engine not built, numpy runs the models: slower, same results",
                  file=sys.stderr)  # fmt: skip

    def get_outputs(self, include_bytecode=1):
        library = [] if self.library is None or self.editable_mode else [str(self.library)]
        return super().get_outputs(include_bytecode) + library


class Wheel(bdist_wheel):
    """py3-none-<platform> with the library, py3-none-any without."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = self.get_finalized_command("build_py").library is None
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self):
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})
