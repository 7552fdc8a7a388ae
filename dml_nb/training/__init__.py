"Training: a fastai Learner for metric learning, its DataLoaders, metrics and checkpoints."

from dml_nb.training.learner import dml_learner, feature_dls, image_dls
from dml_nb.training.self_taught import MomentumTeacher  # gives the losses their `callbacks`
from dml_nb.training.training_set import RefreshFromTrainingSet  # gives the losses their `callbacks`

__all__ = ["MomentumTeacher", "RefreshFromTrainingSet", "dml_learner", "feature_dls", "image_dls"]
