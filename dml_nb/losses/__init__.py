"Losses: `create_loss(name, ...)` builds any of `list_losses()`. Importing the families here is what registers them."

from dml_nb.losses.abe import ABELoss
from dml_nb.losses.adversarial import AdversarialLoss
from dml_nb.losses.angular import AngularLoss
from dml_nb.losses.base import DMLLoss, create_loss, list_losses, loss_parameters, register
from dml_nb.losses.bier import BIERLoss
from dml_nb.losses.binomial_deviance import BinomialDevianceLoss
from dml_nb.losses.calibrate_proxy import CalibrateProxyLoss
from dml_nb.losses.cbml import CBMLLoss
from dml_nb.losses.center import CenterLoss
from dml_nb.losses.circle import CircleLoss
from dml_nb.losses.cluster import ClusterLoss
from dml_nb.losses.contrastive import ContrastiveLoss
from dml_nb.losses.cosface_arcface import ArcFaceLoss, CosFaceLoss
from dml_nb.losses.cp_readings import CPReading
from dml_nb.losses.deml import DeMLLoss
from dml_nb.losses.divide_and_conquer import DivideAndConquerLoss
from dml_nb.losses.easy_positive import EasyPositiveLoss
from dml_nb.losses.facility_location import FacilityLocationLoss
from dml_nb.losses.global_loss import GlobalLoss
from dml_nb.losses.hard_mining import HardMiningLoss
from dml_nb.losses.hdc import HDCLoss
from dml_nb.losses.hierarchical_proxy import HPLLoss
from dml_nb.losses.histogram import HistogramLoss
from dml_nb.losses.horde import HordeLoss
from dml_nb.losses.htl import HTLLoss
from dml_nb.losses.instance_discrimination import InstanceDiscriminationLoss
from dml_nb.losses.lifted_structure import LiftedStructureCosLoss, LiftedStructureLoss
from dml_nb.losses.manifold_proxy import ManifoldProxyLoss
from dml_nb.losses.margin import MarginLoss
from dml_nb.losses.mcl import MCLLoss
from dml_nb.losses.memvir import MemVirLoss
from dml_nb.losses.mic import MICLoss
from dml_nb.losses.miners import create_miner, list_miners
from dml_nb.losses.multi_similarity import MultiSimilarityLoss
from dml_nb.losses.nca import NCALoss
from dml_nb.losses.npair import NPairLoss
from dml_nb.losses.prism import PrismLoss
from dml_nb.losses.proxy_anchor import ProxyAnchorLoss
from dml_nb.losses.proxy_deviation import deviation
from dml_nb.losses.proxy_hosts import calibrate
from dml_nb.losses.proxy_nca import ProxyNCALoss, ProxyNCAPlusPlusLoss
from dml_nb.losses.proxy_synthesis import ProxySynthesisLoss
from dml_nb.losses.pseudo_labels import PseudoLabelLoss
from dml_nb.losses.quadruplet import QuadrupletLoss
from dml_nb.losses.ranked_list import RankedListLoss
from dml_nb.losses.ranked_list_levels import RankedListLevelsLoss
from dml_nb.losses.self_feeding import remember_previous
from dml_nb.losses.smart_mining import SmartMiningLoss
from dml_nb.losses.smooth_proxy import SmoothProxyAnchorLoss
from dml_nb.losses.softmax import CrossEntropyLoss, NormSoftmaxLoss
from dml_nb.losses.softtriple import SoftTripleLoss
from dml_nb.losses.stml import STMLLoss
from dml_nb.losses.training_set_base import TrainingSetLoss
from dml_nb.losses.triplet import TripletLoss
from dml_nb.losses.tuplet_margin import IntraPairVarianceLoss, TupletMarginLoss
from dml_nb.losses.xbm import XBMLoss

__all__ = [
    "ABELoss",
    "AdversarialLoss",
    "AngularLoss",
    "ArcFaceLoss",
    "BIERLoss",
    "BinomialDevianceLoss",
    "CBMLLoss",
    "CPReading",
    "CalibrateProxyLoss",
    "CenterLoss",
    "CircleLoss",
    "ClusterLoss",
    "ContrastiveLoss",
    "CosFaceLoss",
    "CrossEntropyLoss",
    "DMLLoss",
    "DeMLLoss",
    "DivideAndConquerLoss",
    "EasyPositiveLoss",
    "FacilityLocationLoss",
    "GlobalLoss",
    "HDCLoss",
    "HPLLoss",
    "HTLLoss",
    "HardMiningLoss",
    "HistogramLoss",
    "HordeLoss",
    "InstanceDiscriminationLoss",
    "IntraPairVarianceLoss",
    "LiftedStructureCosLoss",
    "LiftedStructureLoss",
    "MCLLoss",
    "MICLoss",
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
    "PseudoLabelLoss",
    "QuadrupletLoss",
    "RankedListLevelsLoss",
    "RankedListLoss",
    "STMLLoss",
    "SmartMiningLoss",
    "SmoothProxyAnchorLoss",
    "SoftTripleLoss",
    "TrainingSetLoss",
    "TripletLoss",
    "TupletMarginLoss",
    "XBMLoss",
    "calibrate",
    "create_loss",
    "create_miner",
    "deviation",
    "list_losses",
    "list_miners",
    "loss_parameters",
    "register",
    "remember_previous",
]
