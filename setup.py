"""Lists the packages of the wheel. Everything else is in pyproject.toml, which cannot say where a package comes from and find them too.

The bundled pictures, manifests and configs stay in `gcs/` and `configs/`; in the wheel they lie in `glip_jax/bundled`.
`glip_jax.io.assets.bundled` finds them in both places.
"""

from setuptools import find_namespace_packages, find_packages, setup

BUNDLED = "glip_jax.bundled"

setup(
    packages=[
        *find_packages(include=["glip_jax", "glip_jax.*"]),
        f"{BUNDLED}.gcs",
        f"{BUNDLED}.configs",
        *(f"{BUNDLED}.configs.{name}" for name in find_namespace_packages("configs")),
    ],
    package_dir={f"{BUNDLED}.gcs": "gcs", f"{BUNDLED}.configs": "configs"},
    package_data={
        "glip_jax.cli.reports": ["templates/*"],
        "glip_jax.cli.serving": ["page/*", "page/examples/*"],
        "glip_jax.evaluation.benchmark": ["*.json"],
        f"{BUNDLED}.gcs": [
            "manifests/*.json",
            "sample/names.txt",
            "sample/descriptions.json",
            "sample/LICENSE-unicode.txt",
            "sample/pictures/**/*",
        ],
    },
)
