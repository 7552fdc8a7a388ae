"Deep metric learning in notebooks. The package imports nothing heavy: import what you need from its submodules."

from dml_nb.core.renamed import install_old_names

install_old_names()  # stored run notebooks import modules by the names of their day


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import version

        return version("dml_nb")
    if name == "load_model":
        from dml_nb.face.model_folder import load_model

        return load_model
    raise AttributeError(f"module 'dml_nb' has no attribute {name!r}")
