"Deep metric learning in notebooks. Importing this package imports nothing heavy: take what you need from its submodules."


def __getattr__(name):
    if name == "__version__":
        from importlib.metadata import version

        return version("dml_nb")
    raise AttributeError(f"module 'dml_nb' has no attribute {name!r}")
