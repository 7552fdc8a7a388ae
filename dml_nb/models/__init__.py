"Backbones, pooling, embedding layer, and features from them."

from dml_nb.models.embedder import create_backbone, create_embedder, list_backbones

__all__ = ["create_backbone", "create_embedder", "list_backbones"]
