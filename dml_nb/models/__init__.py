"Backbones, pooling, embedding layer, and features from them."

__all__ = ["create_backbone", "create_embedder", "list_backbones", "why_no_weights"]


def __getattr__(name: str):
    "Import torch only when a network is asked for, because `why_no_weights` must answer at once."
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module("dml_nb.models." + ("weights" if name == "why_no_weights" else "embedder"))
    return getattr(module, name)
