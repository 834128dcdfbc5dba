"""Compiles the passes of SyncBatchNorm where there is a compiler; without one, torch's own operators do the work."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "ddparity.batchnorm._fused",
            ["src/ddparity/batchnorm/_fused.c"],
            depends=["src/ddparity/batchnorm/_kernels.h"],
            extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno"],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ]
)
