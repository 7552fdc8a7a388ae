"Losses: `create_loss(name, ...)` builds any of `list_losses()`. Importing the families here is what registers them."

from dml_nb.losses.calibrate import CalibrateProxyLoss, deviation
from dml_nb.losses.core import DMLLoss, create_loss, list_losses, register
from dml_nb.losses.proxy import ProxyAnchorLoss

__all__ = ["CalibrateProxyLoss", "DMLLoss", "ProxyAnchorLoss", "create_loss", "deviation", "list_losses", "register"]
