# Copyright 2026 The dd_jax authors.
# SPDX-License-Identifier: Apache-2.0
"""Metadata of the package."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

# Read as text: to import the package would need what is not installed yet.
VERSION = re.search(
    r"^__version__ = '(.+)'$",
    (ROOT / 'dd_jax' / '__init__.py').read_text(),
    re.MULTILINE,
).group(1)

# The oldest versions that the tests have run with. clu is exact because the
# event writer replaces one of its modules.
REQUIRED = [
    'absl-py',
    'array_record>=0.8.6',
    'chex>=0.1.92',
    'clu==0.0.12',
    'etils[epath]>=1.15.0',
    'flax>=0.12.8',
    'grain>=0.2.18',
    'importlib_resources',  # tensorflow-datasets forgets to ask for it
    'jax>=0.10',
    'matplotlib',
    'ml_collections>=1.1.0',
    'ml_dtypes',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'pillow',
    'rich',
    'safetensors',
    'scipy',
    'tensorboardX',
    'tensorflow-datasets>=4.9.10',
]
DATA = ['mlxtend', 'scikit-learn']
EXTRAS = {
    'colab': ['tensorboard'],
    'cuda': ['jax[cuda12]'],
    'data': DATA,
    'eval': ['sacrebleu'],
    'hub': ['huggingface_hub'],
    'parity': [
        'diffusers', 'sentencepiece', 'torch==2.13.0', 'transformers',
    ],
    'test': [*DATA, 'pytest', 'pytest-xdist', 'ruff'],
    'text': ['sentencepiece', 'tokenizers'],
    'tpu': ['jax[tpu]'],
}

setuptools.setup(
    name='dd_jax',
    version=VERSION,
    description='Expensive generative models made cheap, in JAX.',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    author='The dd_jax authors',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['dd_jax', 'dd_jax.*']),
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={'console_scripts': ['dd_jax = dd_jax.main:cli']},
    classifiers=[
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX :: Linux',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
