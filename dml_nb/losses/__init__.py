"Losses: `create_loss(name, ...)` builds any of `list_losses()`. Importing the families here is what registers them."

from dml_nb.losses.adversarial import AdversarialLoss
from dml_nb.losses.calibrate import CalibrateProxyLoss
from dml_nb.losses.calibrate_hosts import calibrate
from dml_nb.losses.cbml import CBMLLoss
from dml_nb.losses.classification import ArcFaceLoss, CosFaceLoss, CrossEntropyLoss, NormSoftmaxLoss
from dml_nb.losses.clusters import CenterLoss, ClusterLoss, FacilityLocationLoss
from dml_nb.losses.core import DMLLoss, create_loss, list_losses, register
from dml_nb.losses.deviation import deviation
from dml_nb.losses.distributions import HistogramLoss, NCALoss, RankedListLoss
from dml_nb.losses.hierarchy import HPLLoss
from dml_nb.losses.lifted import EasyPositiveLoss, LiftedStructureCosLoss, LiftedStructureLoss
from dml_nb.losses.manifold import ManifoldProxyLoss
from dml_nb.losses.memory import CrossBatchLoss
from dml_nb.losses.mining import create_miner, list_miners
from dml_nb.losses.multi_similarity import CircleLoss, MultiSimilarityLoss
from dml_nb.losses.npair import AngularLoss, NPairLoss
from dml_nb.losses.pairs import BinomialDevianceLoss, ContrastiveLoss, HardMiningLoss
from dml_nb.losses.prism import PrismLoss
from dml_nb.losses.proxy import ProxyAnchorLoss
from dml_nb.losses.proxy_nca import ProxyNCALoss, ProxyNCAPlusPlusLoss, SoftTripleLoss
from dml_nb.losses.synthesis import ProxySynthesisLoss, SmoothProxyAnchorLoss
from dml_nb.losses.triplet import MarginLoss, TripletLoss
from dml_nb.losses.tuplets import IntraPairVarianceLoss, TupletMarginLoss
from dml_nb.losses.virtual import MemVirLoss

__all__ = ["AdversarialLoss", "AngularLoss", "ArcFaceLoss", "BinomialDevianceLoss", "CBMLLoss", "CalibrateProxyLoss", "CenterLoss", "CircleLoss", "ClusterLoss", "ContrastiveLoss", "CosFaceLoss", "CrossBatchLoss", "CrossEntropyLoss", "DMLLoss", "EasyPositiveLoss", "FacilityLocationLoss", "HPLLoss", "HardMiningLoss", "HistogramLoss", "IntraPairVarianceLoss", "LiftedStructureCosLoss", "LiftedStructureLoss", "ManifoldProxyLoss", "MarginLoss", "MemVirLoss", "MultiSimilarityLoss", "NCALoss", "NPairLoss", "NormSoftmaxLoss", "PrismLoss", "ProxyAnchorLoss", "ProxyNCALoss", "ProxyNCAPlusPlusLoss", "ProxySynthesisLoss", "RankedListLoss", "SmoothProxyAnchorLoss", "SoftTripleLoss", "TripletLoss", "TupletMarginLoss", "calibrate", "create_loss", "create_miner", "deviation", "list_losses", "list_miners", "register"]
