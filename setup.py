"Reads every piece of metadata from settings.ini and ships the papermill templates inside the package."

from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
cfg = ConfigParser(delimiters=["="])
cfg.read(here / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


class BuildWithTemplates(build_py):
    "An installed package has no nbs/ folder, so the row notebooks travel as package data."

    def run(self):
        super().run()
        target = Path(self.build_lib) / cfg["lib_name"] / "experiments" / "templates"
        for notebook in sorted((here / "nbs" / "rows").glob("*.ipynb")):
            target.mkdir(parents=True, exist_ok=True)
            copy2(notebook, target / notebook.name)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    classifiers=[
        f"Intended Audience :: {cfg['audience']}",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={name: cfg[f"{name}_requirements"].split() for name in cfg["extras"].split()},
    packages=find_packages(include=[cfg["lib_name"], f"{cfg['lib_name']}.*"]),
    package_data={
        cfg["lib_name"]: ["core/*.csv", "data/*.zip", "data/*.txt", "experiments/*.csv", "experiments/*.json"]
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    cmdclass={"build_py": BuildWithTemplates},
    zip_safe=False,
)
