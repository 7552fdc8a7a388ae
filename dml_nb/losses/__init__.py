"Losses: `create_loss(name, ...)` builds any of `list_losses()`. Importing the families here is what registers them."

from dml_nb.losses.adversarial import AdversarialLoss
from dml_nb.losses.calibrate_proxy import CalibrateProxyLoss
from dml_nb.losses.calibrate_hosts import calibrate
from dml_nb.losses.cbml import CBMLLoss
from dml_nb.losses.softmax import ArcFaceLoss, CosFaceLoss, CrossEntropyLoss, NormSoftmaxLoss
from dml_nb.losses.cluster import CenterLoss, ClusterLoss, FacilityLocationLoss
from dml_nb.losses.base import DMLLoss, create_loss, list_losses, register
from dml_nb.losses.proxy_deviation import deviation
from dml_nb.losses.histogram import HistogramLoss, NCALoss, RankedListLoss
from dml_nb.losses.hierarchical_proxy import HPLLoss
from dml_nb.losses.lifted_structure import EasyPositiveLoss, LiftedStructureCosLoss, LiftedStructureLoss
from dml_nb.losses.manifold_proxy import ManifoldProxyLoss
from dml_nb.losses.xbm import CrossBatchLoss
from dml_nb.losses.miners import create_miner, list_miners
from dml_nb.losses.multi_similarity import CircleLoss, MultiSimilarityLoss
from dml_nb.losses.npair import AngularLoss, NPairLoss
from dml_nb.losses.contrastive import BinomialDevianceLoss, ContrastiveLoss, HardMiningLoss
from dml_nb.losses.prism import PrismLoss
from dml_nb.losses.proxy_anchor import ProxyAnchorLoss
from dml_nb.losses.proxy_nca import ProxyNCALoss, ProxyNCAPlusPlusLoss, SoftTripleLoss
from dml_nb.losses.proxy_synthesis import ProxySynthesisLoss, SmoothProxyAnchorLoss
from dml_nb.losses.triplet import MarginLoss, TripletLoss
from dml_nb.losses.tuplet_margin import IntraPairVarianceLoss, TupletMarginLoss
from dml_nb.losses.memvir import MemVirLoss

__all__ = [
    "AdversarialLoss",
    "AngularLoss",
    "ArcFaceLoss",
    "BinomialDevianceLoss",
    "CBMLLoss",
    "CalibrateProxyLoss",
    "CenterLoss",
    "CircleLoss",
    "ClusterLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CrossBatchLoss",
    "CrossEntropyLoss",
    "DMLLoss",
    "EasyPositiveLoss",
    "FacilityLocationLoss",
    "HPLLoss",
    "HardMiningLoss",
    "HistogramLoss",
    "IntraPairVarianceLoss",
    "LiftedStructureCosLoss",
    "LiftedStructureLoss",
    "ManifoldProxyLoss",
    "MarginLoss",
    "MemVirLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "NPairLoss",
    "NormSoftmaxLoss",
    "PrismLoss",
    "ProxyAnchorLoss",
    "ProxyNCALoss",
    "ProxyNCAPlusPlusLoss",
    "ProxySynthesisLoss",
    "RankedListLoss",
    "SmoothProxyAnchorLoss",
    "SoftTripleLoss",
    "TripletLoss",
    "TupletMarginLoss",
    "calibrate",
    "create_loss",
    "create_miner",
    "deviation",
    "list_losses",
    "list_miners",
    "register",
]
