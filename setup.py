"""Shim for pip: every setting is in setup.cfg. What stands here: the C libraries are compiled on the way.

Without a compiler the package installs all the same, as pure Python; a wheel that holds one is for the
platform and for any Python 3.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools below 70
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
# Why by its path: the folder of this file is not where pip looks for packages
spec = importlib.util.spec_from_file_location("build_library", ROOT / "bnnfree" / "library.py")
native = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = native  # a dataclass looks itself up there
spec.loader.exec_module(native)


SHELF = ("recipes/*.yaml", "recipes/sweeps/*.yaml", "models/pretrained/*")  # bnnfree.shelf looks for them there


class BuildPy(build_py):
    """Python files as ever, recipes and networks beside bnnfree.shelf, then the libraries: beside them, or for an
    editable install in the checkout."""

    libraries: tuple[Path, ...] = ()  # where they are, once built

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, copy in self.shelved():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copy)
        made = [self.make(library) for library in native.LIBRARIES]
        self.libraries = tuple(path for path in made if path is not None)

    def shelved(self):
        """Each file that comes with the package, and its place in it."""
        sources = [path for pattern in SHELF for path in sorted(ROOT.glob(pattern)) if path.is_file()]
        shelf = Path(self.build_lib) / "bnnfree" / "shelf"
        return [(path, shelf / path.relative_to(ROOT)) for path in sources]

    def make(self, library):
        """Where the library is, or None, with a line of warning."""
        folder = library.place
        if not self.editable_mode:
            folder = Path(self.build_lib) / folder.relative_to(ROOT)
            for old in folder.glob("*"):  # of an earlier build with other sources
                old.unlink()
        path = library.build(folder / library.name(), verbose=True)
        if path is None:
            print(f"warning: bnnfree: {library.without}", file=sys.stderr)
        return path

    def get_outputs(self, include_bytecode=1):
        files = [file for path in self.libraries for file in (path, native.digest_of(path))]
        copies = [copy for _, copy in self.shelved()]
        made = [] if self.editable_mode else [str(file) for file in (*files, *copies)]
        return super().get_outputs(include_bytecode) + made


class Wheel(bdist_wheel):
    """py3-none-<platform> with a library, py3-none-any without."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.get_finalized_command("build_py").libraries
        self.distribution.has_ext_modules = lambda: not self.root_is_pure
        super().run()

    def get_tag(self):
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": Wheel})
