"""What pyproject.toml cannot say: the wheel carries the configs, as kdrl_jax/shipped/configs.

In a checkout they stay where they are; `kdrl_jax.config.CONFIGS` is either place.
"""

from setuptools import find_packages, setup

configs = {f"kdrl_jax.shipped.{name}": name for name in find_packages(include=["configs*"])}
setup(
    packages=[*find_packages(include=["kdrl_jax*"]), *configs],
    package_dir={name: source.replace(".", "/") for name, source in configs.items()},
)
