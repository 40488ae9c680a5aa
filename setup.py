"""A wheel with kernels, for the torch that is installed: `ISW_KERNELS=1 pip wheel --no-build-isolation --no-deps .`

Without the variable nothing is compiled, neither here nor for an editable install: kernels are built at first use.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WITH_KERNELS = os.environ.get("ISW_KERNELS", "0") != "0"


class BuildPackage(build_py):
    def run(self) -> None:
        super().run()
        package = Path(self.build_lib, "isw_plugin")
        shutil.rmtree(package / "ops" / "built", ignore_errors=True)  # of an earlier wheel
        if WITH_KERNELS and not self.editable_mode:
            sys.path.insert(0, str(Path(__file__).parent))
            try:
                from isw_plugin.ops.build import ship
            except ImportError as error:
                raise SystemExit(
                    f"ISW_KERNELS: {error}. Kernels are built for the torch that is installed: "
                    "`pip install torch`, then give pip --no-build-isolation"
                ) from error
            ship(package)


class Wheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not WITH_KERNELS

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
