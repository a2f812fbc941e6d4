"""Copies the demo and the recipes into the package; everything else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("pipeline.yaml", "recipes", "examples")


class BuildWithDemo(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # they are found in the checkout
        target = Path(self.build_lib) / "stages" / "shipped"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in SHIPPED:
            if Path(name).is_dir():
                shutil.copytree(name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(name, target)


setup(cmdclass={"build_py": BuildWithDemo})
