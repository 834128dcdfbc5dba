"""Compile the CPU kernels of SyncBatchNorm. Without a C compiler, SyncBatchNorm uses torch's own operators."""

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
