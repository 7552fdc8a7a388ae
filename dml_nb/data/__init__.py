"Data sets, samplers and loaders."

from dml_nb.data.datasets import list_datasets, load_dataset

__all__ = ["list_datasets", "load_dataset"]
