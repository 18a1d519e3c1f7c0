"""Where the packages lie: passes/ is installed as graphopt.passes and specs/ as graphopt.specs; the rest is in pyproject.toml.

They sit beside the compiler, not in it, because the compiler imports none of them (passes are found by entry point).
"""

from setuptools import find_packages, setup

BESIDE = {"graphopt.passes": "passes", "graphopt.specs": "specs"}

setup(
    package_dir={"graphopt": "graphopt", **BESIDE},
    packages=[
        *find_packages(include=["graphopt", "graphopt.*"]),
        *(name for package, folder in BESIDE.items() for name in (package, *(f"{package}.{sub}" for sub in find_packages(folder)))),
    ],
)
