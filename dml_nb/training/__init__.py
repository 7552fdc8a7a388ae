"Training: a fastai Learner for metric learning, its DataLoaders, metrics and checkpoints."

from dml_nb.training.learner import dml_learner, feature_dls, image_dls

__all__ = ["dml_learner", "feature_dls", "image_dls"]
