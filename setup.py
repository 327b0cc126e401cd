"""The one thing that pyproject.toml cannot say: an extension in C that may be missing.

Everything works without it (direct.py and frames.py do the same in Python), so a machine without a compiler
installs the package all the same.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "tornado_bcast._speedups", ["tornado_bcast/_speedups.c"], optional=True, py_limited_api=True
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
